"""Every family against timm: weights copied across by name, strictly; features, logits and gradients compared.

Small widths in the quick tests; the catalog's own rows in the slow ones.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXt as TimmConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.resnet import ResNet as TimmResNet
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn

from tolerance import assert_near
from vitrail.models.base import ImageModel
from vitrail.models.build import build_model
from vitrail.models.catalog import VARIANTS
from vitrail.models.configs import ConvNeXtConfig, ModelConfig, ResNetConfig, SwinConfig, ViTConfig
from vitrail.pretrained.create import create_model

Size = tuple[int, int]

VIT: dict[str, Any] = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 11}
VIT_OPTIONS: dict[str, dict[str, Any]] = {
    "vit": {},
    "vit grey": {"in_chans": 1},
    "vit without qkv bias": {"qkv_bias": False},
    "vit with layer scale (deit3)": {"init_values": 0.1, "no_embed_class": True},
    "vit with registers (dinov2)": {"init_values": 0.1, "no_embed_class": True, "reg_tokens": 4},
    "vit with embedded registers": {"reg_tokens": 2},
    "vit without a head": {"num_classes": 0},
    "vit, average pooling": {"global_pool": "avg", "fc_norm": True},
    "vit, average pooling, norm first": {"global_pool": "avg", "fc_norm": False, "mlp_ratio": 3.0},
    "vit without a class token": {"global_pool": "avg", "class_token": False, "fc_norm": True},
}
SWIN: dict[str, Any] = {"patch_size": 2, "embed_dim": 16, "depths": (2, 2, 3), "num_heads": (2, 4, 8)}
CONVNEXT: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
RESNET_BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


def timm_twin(config: ModelConfig) -> nn.Module:
    """timm's model with the same options."""
    options = {name: getattr(config, name) for name in config.__dataclass_fields__}
    size = options.pop("img_size")
    match config:
        case ViTConfig():
            distilled = options.pop("dist_token")
            for ours_alone in ("stem", "stem_depth", "dist_head", "merge"):
                options.pop(ours_alone)
            norm = partial(nn.LayerNorm, eps=options.pop("norm_eps"))
            if distilled:
                for name in ("class_token", "reg_tokens", "no_embed_class", "fc_norm", "global_pool"):
                    options.pop(name)
            build = VisionTransformerDistilled if distilled else TimmViT
            return build(img_size=size, norm_layer=norm, dynamic_img_size=not distilled, **options)
        case SwinConfig():
            options.pop("norm_eps")
            return TimmSwin(img_size=size, **options)
        case ResNetConfig():
            options["block"] = RESNET_BLOCKS[options["block"]]
            options.pop("small_stem")
            return TimmResNet(**options)
        case ConvNeXtConfig():
            return TimmConvNeXt(**options)
    raise AssertionError(config)


def randomize(model: nn.Module) -> None:
    """Weights and statistics far from their initial values, so that each one has an effect."""
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        fan_in = value[0].numel() if value.dim() > 1 else 1
        match value.dim():
            case 1:
                value.uniform_(0.5, 1.5) if "weight" in name or "var" in name else value.normal_(0, 0.3)
            case _:
                value.normal_(0, 1.5 * fan_in**-0.5)
        if name.endswith(("pos_embed", "token", "bias_table")):
            value.normal_(0, 1)


def pair(config: ModelConfig) -> tuple[ImageModel, nn.Module]:
    theirs = timm_twin(config)
    randomize(theirs)
    ours = build_model(config)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 1e-3 * theirs.abs().max()
    assert_near(ours, theirs)


@torch.no_grad()
def assert_same_inference(ours: ImageModel, theirs: nn.Module, size: Size) -> None:
    ours.eval(), theirs.eval()
    x = torch.randn(2, ours.config.in_chans, *size)
    features = ours.forward_features(x)
    assert_close(features, theirs.forward_features(x))
    assert_close(ours.forward_head(features, pre_logits=True), theirs.forward_head(features, pre_logits=True))
    assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("size", [(32, 32), (56, 56), (40, 24)], ids=str)
@pytest.mark.parametrize("options", VIT_OPTIONS.values(), ids=VIT_OPTIONS)
def test_vit(options: dict[str, Any], size: Size) -> None:
    assert_same_inference(*pair(ViTConfig(img_size=(32, 32), **VIT | options)), size)


@pytest.mark.parametrize("size", [(32, 32), (40, 24)], ids=str)
def test_distilled_deit(size: Size) -> None:
    assert_same_inference(*pair(ViTConfig(img_size=size, dist_token=True, **VIT)), size)


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (64, 32), (32, 96), (16, 16), (16, 32)], ids=str)
def test_swin_built_for_a_size(size: Size) -> None:
    """Whole windows in each stage, or one that is smaller than a window: elsewhere timm attends to padding."""
    assert_same_inference(*pair(SwinConfig(img_size=size, window_size=4, num_classes=11, **SWIN)), size)


@pytest.mark.parametrize("size", [(64, 64), (32, 64), (96, 32)], ids=str)
def test_swin_at_another_size_than_it_was_built_for(size: Size) -> None:
    """Equal to timm's model that is built for that size, with the same weights."""
    small = build_model(SwinConfig(img_size=(32, 32), window_size=4, num_classes=11, **SWIN))
    theirs = timm_twin(SwinConfig(img_size=size, window_size=4, num_classes=11, **SWIN))
    randomize(theirs)
    small.load_state_dict(theirs.state_dict())
    assert_same_inference(small, theirs, size)


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (75, 45)], ids=str)
@pytest.mark.parametrize("block", RESNET_BLOCKS)
def test_resnet(block: Any, size: Size) -> None:
    assert_same_inference(*pair(ResNetConfig(block=block, layers=(1, 2, 1, 1), num_classes=11)), size)


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (75, 45)], ids=str)
def test_convnext(size: Size) -> None:
    assert_same_inference(*pair(ConvNeXtConfig(num_classes=11, in_chans=2, ls_init_value=0.3, **CONVNEXT)), size)


def gradients(model: nn.Module, loss: Callable[[Any], Tensor], x: Tensor) -> dict[str, Tensor]:
    """In float64: batch norm over the four values of a last stage multiplies float32's rounding by a thousand."""
    model.double().train()
    model.zero_grad()
    loss(model(x.double())).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert ours.keys() == theirs.keys() != set()
    for name, expected in theirs.items():
        assert expected.norm() > 0, name
        assert (ours[name] - expected).norm() <= tolerance * expected.norm(), name


TRAINED: dict[str, ModelConfig] = {
    **{name: ViTConfig(img_size=(32, 32), **VIT | options) for name, options in VIT_OPTIONS.items()},
    "swin": SwinConfig(img_size=(32, 64), window_size=4, num_classes=11, drop_path_rate=0, **SWIN),
    "resnet basic": ResNetConfig(block="basic", layers=(1, 1, 1, 1), num_classes=11),
    "resnet bottleneck": ResNetConfig(block="bottleneck", layers=(1, 1, 1, 2), num_classes=11),
    "convnext": ConvNeXtConfig(num_classes=11, ls_init_value=0.3, **CONVNEXT),
}


@pytest.mark.parametrize("config", TRAINED.values(), ids=TRAINED)
def test_gradients_of_one_step(config: ModelConfig) -> None:
    """Cross-entropy, training mode, every parameter; for token-pooled ViTs timm computes the whole last block."""
    ours, theirs = pair(config)
    size = config.img_size if isinstance(config, ViTConfig | SwinConfig) else (32, 32)
    x = torch.randn(4, config.in_chans, *size)
    labels = torch.tensor([1, 5, 9, 1])
    loss = lambda logits: F.cross_entropy(logits, labels)  # noqa: E731
    assert_same_gradients(gradients(ours, loss, x), gradients(theirs, loss, x))


def test_gradients_of_both_heads_of_a_distilled_deit() -> None:
    ours, theirs = pair(ViTConfig(img_size=(32, 32), dist_token=True, **VIT))
    theirs.set_distilled_training(True)
    x = torch.randn(3, 3, 32, 32)
    labels, teacher = torch.tensor([1, 5, 9]), torch.tensor([1, 4, 9])
    loss = lambda out: F.cross_entropy(out[0], labels) + 0.5 * F.cross_entropy(out[1], teacher)  # noqa: E731
    assert_same_gradients(gradients(ours, loss, x), gradients(theirs, loss, x))


def test_batch_norm_statistics_equal_timms() -> None:
    ours, theirs = pair(ResNetConfig(block="basic", layers=(1, 1, 1, 1), num_classes=11))
    x = torch.randn(4, 3, 64, 64, dtype=torch.double)
    ours.double().train()(x), theirs.double().train()(x)
    expected = theirs.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9)


# The larger ones repeat these with more blocks; their names and shapes are compared in test_catalog.py.
FULL_SIZE = [name for name, row in VARIANTS.items() if timm.is_model(name) and row.params < 100e6 and row.gmacs < 60]


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_catalog_rows_at_full_size(name: str) -> None:
    ours = create_model(name)
    theirs = timm.create_model(name, num_classes=ours.num_classes)
    for parameter in theirs.parameters():
        if parameter.abs().max() < 1e-4 and parameter.dim() == 1:  # branches that start at (or near) zero would hide
            parameter.data.uniform_(0.1, 0.3)
    ours.load_state_dict(theirs.state_dict())
    ours.eval(), theirs.eval()
    x = torch.randn(1, ours.config.in_chans, *ours.config.img_size)
    with torch.no_grad():
        assert_close(ours.forward_features(x), theirs.forward_features(x))
        assert_close(ours(x), theirs(x))
