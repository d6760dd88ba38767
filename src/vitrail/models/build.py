"""Build a model from its config."""

from dataclasses import fields, replace
from typing import Any

from vitrail.errors import ModelError, did_you_mean
from vitrail.models.base import ImageModel
from vitrail.models.configs import ConvNeXtConfig, ModelConfig, ResNetConfig, SwinConfig, ViTConfig
from vitrail.models.convnext import ConvNeXt
from vitrail.models.deit import DistilledVisionTransformer
from vitrail.models.resnet import ResNet
from vitrail.models.swin import SwinTransformer
from vitrail.models.vit import VisionTransformer


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


def configure(config: ModelConfig, **changes: Any) -> ModelConfig:
    """`config` with `changes`, of which None values are ignored. `img_size` may be an int for a square.

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
    try:
        return replace(config, **changes)
    except (TypeError, ValueError) as error:
        raise ModelError(f"invalid {type(config).__name__}: {error}") from error
