"""Build a model from its config, or from another model."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from vitrail.errors import ModelError, did_you_mean
from vitrail.models.base import ImageModel
from vitrail.models.configs import ConvNeXtConfig, ModelConfig, ResNetConfig, SwinConfig, ViTConfig
from vitrail.models.convnext import ConvNeXt
from vitrail.models.deit import DistilledVisionTransformer
from vitrail.models.resnet import ResNet
from vitrail.models.swin import SwinTransformer
from vitrail.models.vit import VisionTransformer
from vitrail.utils.text import one_line


def build_model(config: ModelConfig) -> ImageModel:
    """The model that `config` describes, with newly initialised weights.

    Raises:
        ModelError: the values are inconsistent (for example a width that is not a multiple of num_heads).
    """
    try:
        match config:
            case ViTConfig(dist_token=True, dist_head=True):
                return DistilledVisionTransformer(config)
            case ViTConfig():
                return VisionTransformer(config)
            case SwinConfig():
                return SwinTransformer(config)
            case ResNetConfig():
                return ResNet(config)
            case ConvNeXtConfig():
                return ConvNeXt(config)
    except ValueError as error:
        raise ModelError(f"invalid {type(config).__name__}: {error}") from error
    raise TypeError(f"unknown config type {type(config).__name__}")


def build_on_meta(config: ModelConfig, max_blocks: int, where: str) -> ImageModel:
    """The model on the meta device, without memory for its tensors: for a config that is not trusted.

    Raises:
        ModelError: it is not valid, or has more than `max_blocks` blocks, which take long to build.
    """
    blocks = [getattr(config, name, 0) for name in ("depth", "depths", "layers")]
    if max(sum(b) if isinstance(b, tuple) else b for b in blocks) > max_blocks:
        raise ModelError(f"{where} describes a different model from the weights next to it: it has too many blocks")
    try:
        with torch.device("meta"), _SkipInit():
            return build_model(config)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ModelError(f"{where} does not describe a valid model: {one_line(error)}") from None


class _SkipInit(TorchFunctionMode):
    """Skips random initialisation, which on the meta device would import torch's compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def configure(config: ModelConfig, **changes: Any) -> ModelConfig:
    """`config` with `changes`, of which None values are ignored. `img_size` may be an int for a square, and `merge` a
    number for `ViTConfig.even_merge`.

    Raises:
        ModelError: the architecture has no such option, or the value is invalid.
    """
    changes = {key: value for key, value in changes.items() if value is not None}
    known = {field.name for field in fields(config)}
    for key in changes.keys() - known:
        raise ModelError(
            f"{type(config).__name__.removesuffix('Config')} has no option {key!r}{did_you_mean(key, known)}"
        )
    if isinstance(changes.get("img_size"), int):
        changes["img_size"] = (changes["img_size"],) * 2
    merge = changes.pop("merge") if isinstance(changes.get("merge"), int | float) else None
    try:
        if merge is not None and isinstance(config, ViTConfig):
            config = replace(config, **changes, merge=())
            changes = {"merge": config.even_merge(merge)}
        return replace(config, **changes)
    except (TypeError, ValueError) as error:
        raise ModelError(f"invalid {type(config).__name__}: {error}") from error


def merged_model(model: nn.Module, merge: float | Sequence[int]) -> VisionTransformer:
    """`model` with merged tokens, in its mode, with the same parameters (shared, not copied).

    merge: patch tokens that each block merges, by block; or a number, as in `ViTConfig.even_merge`; 0 for none.

    Raises:
        ModelError: not a ViT or DeiT of this package, or more tokens than can be merged.
    """
    if not isinstance(model, VisionTransformer):
        raise ModelError(f"{type(model).__name__} cannot merge tokens: use a ViT or DeiT of vitrail")
    schedule = merge if isinstance(merge, int | float) else tuple(merge)
    config = configure(model.config, merge=schedule, num_classes=model.num_classes)
    with torch.device("meta"):
        merged = build_model(config)
    merged.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    assert isinstance(merged, VisionTransformer)
    return merged.train(model.training)
