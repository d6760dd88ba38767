"""The table of methods: which model has which, and that all of them leave model and process as they were."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tolerance import assert_near
from vitrail.errors import ModelError
from vitrail.explanation.methods.method import FAMILIES, Method, Request, family_of
from vitrail.explanation.methods.table import ANY, METHODS, choose_method, default_method, methods_of
from vitrail.models.build import build_model
from vitrail.models.configs import ConvNeXtConfig, ModelConfig, ResNetConfig, SwinConfig, ViTConfig
from vitrail.utils.eval_view import eval_view

SIZE = (32, 48)
VIT = ViTConfig(patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5, img_size=SIZE, drop_path_rate=0.2)
CONFIGS: dict[str, ModelConfig] = {
    "vit": VIT,
    "deit": replace(VIT, dist_token=True),
    "dinov2": replace(VIT, reg_tokens=2, init_values=0.5, no_embed_class=True),
    "swin": SwinConfig(
        patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=5, img_size=SIZE
    ),
    "resnet": ResNetConfig(block="basic", layers=(1, 1), channels=(8, 16), num_classes=5, img_size=SIZE),
    "convnext": ConvNeXtConfig(depths=(1, 1), dims=(8, 16), num_classes=5, img_size=SIZE),
}
with torch.random.fork_rng():
    torch.manual_seed(0)
    MODELS = {name: build_model(config) for name, config in CONFIGS.items()}
PAIRS = [
    (method, name) for method in METHODS.values() for name, model in MODELS.items() if method.name in methods_of(model)
]
every_pair = pytest.mark.parametrize(("method", "name"), PAIRS, ids=[f"{m.name}-{n}" for m, n in PAIRS])


def target(logits: Tensor) -> Tensor:
    return logits[:, 3]


def state(model: nn.Module) -> dict[str, Any]:
    """All that could change in a model, and in the process."""
    return {
        "values": {key: value.clone() for key, value in model.state_dict().items()},
        "versions": [value._version for value in model.state_dict(keep_vars=True).values()],
        "grad": [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        "modules": [(id(m), type(m), m.training, sorted(vars(m))) for m in model.modules()],
        "hooks": [len(v) for m in model.modules() for k, v in vars(m).items() if "hook" in k and hasattr(v, "__len__")],
        "random": torch.get_rng_state(),
        "flags": [
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
        ],
    }


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in before:
        if key == "values":
            assert all(torch.equal(before[key][name], after[key][name]) for name in before[key])
        elif key == "random":
            assert torch.equal(before[key], after[key])
        else:
            assert before[key] == after[key], key


@every_pair
def test_model_and_process_are_unchanged(method: Method, name: str) -> None:
    model = MODELS[name].train()
    images = torch.randn(2, 3, *SIZE)
    before, pixels = state(model), images.clone()
    maps = method.compute(Request(eval_view(model), images, target))
    assert_unchanged(before, state(model))
    assert torch.equal(images, pixels)
    assert not images.requires_grad
    assert maps.dtype == torch.float32
    assert maps.dim() == 3
    assert len(maps) == 2
    assert not maps.requires_grad
    assert method.signed or maps.min() >= 0
    height, width = maps.shape[1:]
    cell = -(-SIZE[0] // height)
    assert (-(-SIZE[0] // cell), -(-SIZE[1] // cell)) == (height, width)  # square cells cover the image


@every_pair
def test_two_threads_and_frozen_parameters(method: Method, name: str) -> None:
    model, images = MODELS[name].eval(), torch.randn(2, 2, 3, *SIZE)
    expected = [method.compute(Request(eval_view(model), batch, target)) for batch in images]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    maps: dict[int, Tensor] = {}

    def run(index: int) -> None:
        with torch.inference_mode():
            maps[index] = method.compute(Request(eval_view(model), images[index], target))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    model.requires_grad_(True)
    for index in range(2):
        assert_near(maps[index].clone(), expected[index], 1e-4)


@every_pair
def test_a_batch_gives_the_maps_of_single_images_in_bfloat16_too(method: Method, name: str) -> None:
    images = torch.randn(3, 3, *SIZE)
    maps = method.compute(Request(eval_view(MODELS[name]), images, target))
    single = torch.cat([method.compute(Request(eval_view(MODELS[name]), image[None], target)) for image in images])
    assert_near(maps, single, 1e-4)
    half = build_model(CONFIGS[name]).bfloat16()
    half.load_state_dict(MODELS[name].state_dict())
    rough = method.compute(Request(eval_view(half), images.bfloat16(), target))
    assert rough.dtype == torch.float32
    assert rough.shape == maps.shape


@every_pair
def test_only_class_specific_methods_read_the_target(method: Method, name: str) -> None:
    model, images = eval_view(MODELS[name]), torch.randn(2, 3, *SIZE)
    maps = [method.compute(Request(model, images, lambda x, k=k: x[:, k])) for k in (0, 1)]
    assert torch.equal(*maps) != method.class_specific


def test_families_are_known() -> None:
    for name, method in METHODS.items():
        assert name == method.name
        assert set(method.families) <= set(ANY)
        assert method.reference


def test_defaults() -> None:
    assert {name: default_method(model) for name, model in MODELS.items()} == {
        "vit": "relevance",
        "deit": "relevance",
        "dinov2": "relevance",
        "swin": "relevance",
        "resnet": "gradcam",
        "convnext": "gradcam",
    }
    external = timm.create_model("resnet10t", pretrained=False)
    assert default_method(external) == "gradcam"
    assert choose_method(None, external).name == "gradcam"
    assert set(FAMILIES) == {family_of(model) for model in MODELS.values()}


def test_unknown_methods_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"'gradcan'.*did you mean 'gradcam'"):
        choose_method("gradcan", MODELS["vit"])
    for model in MODELS.values():
        for name in METHODS.keys() - set(methods_of(model)):
            with pytest.raises(ModelError, match=rf"{name} does not apply to .*: use .*{methods_of(model)[0]}"):
                choose_method(name, model)
