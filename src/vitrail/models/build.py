"""From a name or a config to a model."""

from dataclasses import fields, replace
from typing import Any

from vitrail.errors import VitrailError, did_you_mean
from vitrail.models.base import ImageModel
from vitrail.models.configs import ConvNeXtConfig, ModelConfig, ResNetConfig, SwinConfig, ViTConfig
from vitrail.models.convnext import ConvNeXt
from vitrail.models.deit import DistilledVisionTransformer
from vitrail.models.resnet import ResNet
from vitrail.models.swin import SwinTransformer
from vitrail.models.vit import VisionTransformer


def build_model(config: ModelConfig) -> ImageModel:
    """A model of `config`'s architecture with fresh weights.

    Raises:
        VitrailError: the values do not fit together (a width that the heads do not divide, say).
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
        raise VitrailError(f"no such model can be built: {error}") from error
    raise TypeError(f"no architecture goes with a {type(config).__name__}")


def configure(config: ModelConfig, **changes: Any) -> ModelConfig:
    """`config` with `changes`; those that are None change nothing. `img_size` may be one number for a square.

    Raises:
        VitrailError: the architecture has no such option, or the value does not fit.
    """
    changes = {key: value for key, value in changes.items() if value is not None}
    known = {field.name for field in fields(config)}
    for key in changes.keys() - known:
        raise VitrailError(
            f"{type(config).__name__.removesuffix('Config')} has no option {key!r}{did_you_mean(key, known)}"
        )
    if isinstance(changes.get("img_size"), int):
        changes["img_size"] = (changes["img_size"],) * 2
    try:
        return replace(config, **changes)
    except (TypeError, ValueError) as error:
        raise VitrailError(f"no such model can be built: {error}") from error
