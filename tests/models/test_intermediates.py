"""Feature maps and attention weights of every block against timm's; timm's weights are read by hooks on its softmax."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitrail
from models.test_parity import CONVNEXT, SWIN, VIT, assert_close, pair, randomize
from vitrail.errors import ModelError
from vitrail.layers.window import plan_windows
from vitrail.models.base import ImageModel
from vitrail.models.build import build_model
from vitrail.models.configs import ConvNeXtConfig, ModelConfig, ResNetConfig, SwinConfig, ViTConfig

SQUARE, WIDE = (32, 32), (40, 24)
VITS: dict[str, ViTConfig] = {
    "vit": ViTConfig(img_size=SQUARE, **VIT),
    "deit": ViTConfig(img_size=SQUARE, dist_token=True, **VIT),
    "dinov2": ViTConfig(img_size=SQUARE, reg_tokens=4, no_embed_class=True, init_values=0.1, **VIT),
    "vit, average pooling": ViTConfig(img_size=SQUARE, global_pool="avg", fc_norm=True, class_token=False, **VIT),
}
SWINS: dict[str, SwinConfig] = {
    "swin": SwinConfig(img_size=SQUARE, window_size=4, num_classes=5, **SWIN),
    "swin, one window": SwinConfig(img_size=(8, 16), window_size=4, num_classes=5, **SWIN),
}
MODELS: dict[str, ModelConfig] = {
    **VITS,
    **SWINS,
    "resnet": ResNetConfig(layers=(1, 2, 1, 1), img_size=SQUARE, num_classes=5),
    "convnext": ConvNeXtConfig(img_size=(64, 64), num_classes=5, **CONVNEXT),
}


def sizes(config: ModelConfig) -> list[tuple[int, int]]:
    """timm's distilled DeiT and Swin take the size that they are built for."""
    fixed = isinstance(config, SwinConfig) or (isinstance(config, ViTConfig) and config.dist_token)
    return [config.img_size] if fixed else [config.img_size, (2 * config.img_size[0], 3 * config.img_size[1] // 2)]


def flat(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [tensor for part in found for tensor in flat(part)]


def cases() -> Iterator[Any]:
    for name, config in MODELS.items():
        shapes = [config, replace(config, img_size=(config.img_size[0], 2 * config.img_size[1]))]
        for built in shapes:
            for size in sizes(built):
                yield pytest.param(built, size, id=f"{name}, {built.img_size}, {size}")


@pytest.mark.parametrize(("config", "size"), [*cases()])
@torch.no_grad()
def test_intermediates_are_timms(config: ModelConfig, size: tuple[int, int]) -> None:
    ours, theirs = (model.eval() for model in pair(config))
    x = torch.randn(2, 3, *size)
    options: list[dict[str, Any]] = [
        {},
        {"norm": True},
        {"indices": 2, "norm": True},
        {"indices": [0], "stop_early": True},
        {"indices": [-2, 0], "stop_early": True},
        {"indices": (1,), "intermediates_only": True},
    ]
    if isinstance(config, ViTConfig):
        options += [{"return_prefix_tokens": True}, {"output_fmt": "NLC", "return_prefix_tokens": True, "norm": True}]
    for option in options:
        found, expected = (flat(model.forward_intermediates(x, **option)) for model in (ours, theirs))
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    features, _ = ours.forward_intermediates(x)
    assert_close(features, ours.forward_features(x))


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_an_index_or_format_out_of_range(config: ModelConfig) -> None:
    model, x = build_model(config), torch.zeros(1, 3, *config.img_size)
    indices: Any
    for indices in (0, 9, [9], [-9], []):
        with pytest.raises(ModelError, match=str(indices).replace("[", r"\[")):
            model.forward_intermediates(x, indices)
    with pytest.raises(ModelError, match="NHWC"):
        model.forward_intermediates(x, output_fmt="NHWC")


@contextmanager
def weights_of_timm(model: nn.Module) -> Iterator[list[Tensor]]:
    """The input of every `attn_drop`, with fused attention off."""
    found: list[Tensor] = []
    hooks = []
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
            hooks.append(module.attn_drop.register_forward_hook(lambda _module, inputs, _out: found.append(inputs[0])))
    yield found
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def assert_timms_weights(config: ModelConfig, size: tuple[int, int], batch: int = 2) -> None:
    ours, theirs = (model.eval() for model in pair(config))
    x = torch.randn(batch, 3, *size)
    found = vitrail.attention_weights(ours, x)
    with weights_of_timm(theirs) as expected:
        theirs(x)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-5
    for one, other in zip(vitrail.attention_weights(ours, x[0]), found, strict=True):  # one image
        torch.testing.assert_close(one, other[: len(other) // batch], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [SQUARE, WIDE], ids=str)
@pytest.mark.parametrize("config", VITS.values(), ids=VITS)
def test_weights_of_vit_are_timms(config: ViTConfig, size: tuple[int, int]) -> None:
    assert_timms_weights(replace(config, img_size=size) if config.dist_token else config, size)


@pytest.mark.parametrize("config", SWINS.values(), ids=SWINS)
def test_weights_of_swin_are_timms(config: SwinConfig) -> None:
    assert_timms_weights(config, config.img_size)


@pytest.mark.parametrize("size", [(32, 32), (36, 20), (18, 50)], ids=str)
@torch.no_grad()
def test_weights_of_a_padded_swin(size: tuple[int, int]) -> None:
    """timm pads differently. The weights applied to the values give the fused output of the block; padding gets 0."""
    model = build_model(SWINS["swin"]).eval()
    randomize(model)
    x, inputs = torch.randn(2, 3, *size), []
    blocks = [block for stage in model.layers for block in stage.blocks]  # type: ignore[union-attr]
    hooks = [block.register_forward_hook(lambda _block, args, _out: inputs.append(args[0])) for block in blocks]
    model(x)
    for hook in hooks:
        hook.remove()
    for block, into, weights in zip(blocks, inputs, vitrail.attention_weights(model, x), strict=True):
        plan = plan_windows((into.shape[1], into.shape[2]), block.attn.window, block.shifted, into.device)
        cut = plan.partition(block.norm1(into))
        v = block.attn.split_heads(block.attn.qkv(cut))[2]
        out = block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        assert_close(plan.reverse(out, 2), block.attn(block.norm1(into), plan))
        is_token = torch.zeros(len(plan.gather), dtype=torch.bool).index_fill(0, plan.inverse, True)
        is_token = is_token.view(-1, cut.shape[1]).repeat(2, 1)  # (B M) n
        on_padding = weights.masked_fill(is_token[:, None, None, :], 0).sum(-1)  # (B M) A n
        assert (on_padding.masked_fill(~is_token[:, None], 0) == 0).all()


def state(model: ImageModel) -> list[Any]:
    modules = list(model.modules())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules]
    grads = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    return [[module.training for module in modules], hooks, grads]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("config", [*VITS.values(), *SWINS.values(), replace(VITS["vit"], stem="conv")], ids=str)
def test_attention_weights_leave_the_model_unchanged(config: Any, training: bool) -> None:
    model = build_model(replace(config, pos_drop_rate=0.5) if isinstance(config, ViTConfig) else config)
    randomize(model)
    x = torch.randn(2, 3, *config.img_size)
    expected = vitrail.attention_weights(model.eval(), x)
    logits = model(x)
    model.train(training)
    next(model.parameters()).requires_grad_(False)
    before, tensors = state(model), [tensor.clone() for tensor in model.state_dict().values()]
    found = vitrail.attention_weights(model, x)
    assert state(model) == before
    assert all(torch.equal(a, b) for a, b in zip(tensors, model.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(model.eval()(x), logits)


@pytest.mark.parametrize("name", ["deit", "swin"])
def test_gradients_reach_the_parameters_of_a_model_in_training_mode(name: str) -> None:
    model = build_model(MODELS[name]).train()
    x = torch.randn(1, 3, *SQUARE, requires_grad=True)
    qkv = [parameter for key, parameter in model.named_parameters() if key.endswith("qkv.weight")]
    vitrail.attention_weights(model, x)[-1].square().sum().backward()
    for tensor in (x, *qkv):
        assert tensor.grad is not None
        assert tensor.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["resnet", "convnext"])
def test_a_model_without_attention(name: str) -> None:
    model = build_model(MODELS[name])
    with pytest.raises(ModelError, match=type(model).__name__):
        vitrail.attention_weights(model, torch.zeros(1, 3, 32, 32))
