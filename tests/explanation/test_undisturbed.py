"""Explaining changes nothing: neither the model, nor its training, nor torch's global state."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from training.test_golden import FILE, RUNS, losses
from vitrail.explanation.explain import compute_maps, compute_scores
from vitrail.explanation.methods.method import family_of
from vitrail.explanation.methods.table import METHODS
from vitrail.explanation.targets import parse_target
from vitrail.models.build import build_model
from vitrail.models.configs import ResNetConfig, SwinConfig, ViTConfig
from vitrail.training.engine.trainer import Trainer

NAMES = [str(k) for k in range(10)]
TARGET = parse_target(None, NAMES)
MODELS = {
    "vit": ViTConfig(
        img_size=(32, 32), num_classes=10, patch_size=8, embed_dim=32, depth=3, num_heads=2, drop_rate=0.3
    ),
    "swin": SwinConfig(
        img_size=(32, 32), num_classes=10, patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4
    ),
    "cnn": ResNetConfig(num_classes=10, layers=(1, 1), channels=(8, 16), block="basic", small_stem=True),
}


def methods_of(model: nn.Module) -> list[str]:
    return [name for name, method in METHODS.items() if family_of(model) in method.families]


def explain_with(model: nn.Module, name: str, images: torch.Tensor) -> torch.Tensor:
    return compute_maps(model, images, METHODS[name], TARGET)[0]


def state_of(model: nn.Module) -> dict[str, Any]:
    """What a method could change of a model and of the process."""
    modules = {
        name: (id(module), module.training, sorted(vars(module)), *(len(vars(module)[key]) for key in HOOKS))
        for name, module in model.named_modules()
    }
    tensors = {
        name: (id(t), t.requires_grad, t.grad, t.grad_fn, t._version, t.detach().clone())
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    }
    process = {
        "random state": torch.get_rng_state(),
        "gradients": torch.is_grad_enabled(),
        "fused attention": [torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()],
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "default dtype": torch.get_default_dtype(),
    }
    return {"modules": modules, "tensors": tensors, "process": process}


HOOKS = [name for name in vars(nn.Module()) if name.endswith("hooks")]


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_equal(left, right)
    else:
        assert one == other


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_model_and_global_state_are_bit_identical_after_every_method(family: str, training: bool) -> None:
    model = build_model(MODELS[family]).train(training)
    images = torch.randn(2, 3, 32, 32)
    model(images)  # batch norms have seen something
    before, batch = state_of(model), images.clone()
    for name in methods_of(model):
        maps = explain_with(model, name, images)
        assert maps.dtype == torch.float32
        assert not maps.requires_grad
    compute_scores(model, images, explain_with(model, "occlusion", images), TARGET)
    assert_equal(state_of(model), before)
    assert torch.equal(images, batch)


@pytest.mark.parametrize("family", MODELS)
def test_two_threads_explain_at_once(family: str) -> None:
    model = build_model(MODELS[family]).train()
    batches = [torch.randn(2, 3, 32, 32) for _ in range(6)]
    for name in methods_of(model):
        alone = [explain_with(model, name, images) for images in batches]
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(lambda images, name=name: explain_with(model, name, images), batches))
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize(
    "name", ["deit, mixed", pytest.param("swin, erased", marks=pytest.mark.slow), "resnet, cropped"]
)
def test_losses_are_the_golden_ones_when_the_model_is_explained_between_steps(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = losses(RUNS[name])
    step, explained = Trainer.step, []

    def explain_then_step(self: Trainer, batch: Any) -> Any:
        images = torch.linspace(-1, 1, 1024).expand(1, self.model.config.in_chans, 1024).unflatten(2, (32, 32))
        for method in methods_of(self.model):
            if method not in ("occlusion", "integrated_gradients"):  # many forward passes, nothing else
                explained.append(explain_with(self.model, method, images))
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", explain_then_step)
    found = losses(RUNS[name])
    assert explained
    assert found == undisturbed == pytest.approx(json.loads(FILE.read_text())[name], rel=2e-4)


@pytest.mark.parametrize("family", MODELS)
def test_frozen_models_and_callers_without_gradients(family: str) -> None:
    model = build_model(MODELS[family]).eval().requires_grad_(False)
    images = torch.randn(2, 3, 32, 32)
    for name in methods_of(model):
        expected = explain_with(model, name, images)
        for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
            with context:
                assert torch.equal(explain_with(model, name, images.clone()), expected)


@pytest.mark.parametrize("family", MODELS)
def test_models_in_bfloat16(family: str) -> None:
    model = build_model(MODELS[family]).eval().to(torch.bfloat16)
    for name in methods_of(model):
        maps = explain_with(model, name, torch.randn(2, 3, 32, 32))
        assert maps.dtype == torch.float32
        assert bool(maps.isfinite().all())


@pytest.mark.gpu
@pytest.mark.parametrize("family", MODELS)
def test_maps_on_a_gpu_are_those_of_the_cpu(family: str) -> None:
    model = build_model(MODELS[family]).eval()
    images = torch.randn(2, 3, 32, 32)
    for name in methods_of(model):
        expected = explain_with(model, name, images)
        found = explain_with(model.cuda(), name, images.cuda()).cpu()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
        model.cpu()
