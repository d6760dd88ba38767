"""From a name or a config to a model."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from vitrail.errors import VitrailError, did_you_mean
from vitrail.models.base import ImageModel
from vitrail.models.catalog import variant
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


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    **options: Any,
) -> ImageModel:
    """Create the catalog's model `name`.

    Args:
        name: as `list_models` gives it.
        pretrained: load the default of its published weights.
        weights: load these instead: a tag of the published ones, hf:org/repo, timm:name, torchvision:name, an URL with
            #sha256=..., a file or a folder.
        num_classes: classes of the head; 0 leaves the head out, so that the model gives features. Pretrained weights
            keep their own head where this is not given.
        img_size: height and width in pixels, or one number for both.
        in_chans: channels of the image.
        options: any other field of the architecture's config, such as `drop_path_rate=0.1`.

    Raises:
        VitrailError: no such name, option, combination or weights; or weights that do not fit.
    """
    row = variant(name)
    changes = {"num_classes": num_classes, "img_size": img_size, "in_chans": in_chans, **options}
    if not pretrained and weights is None:
        return build_model(configure(row.config, **changes))
    from vitrail.sources.pretrained import load_pretrained  # a model made from nothing needs none of it

    return load_pretrained("default" if weights is None else weights, name, **changes).model
