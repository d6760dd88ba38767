"""A config of ours in timm's words: which of timm's constructors builds the same model, and with what arguments.

The config dataclasses use timm's names, so most of this is which fields to leave out.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from vitrail.images.preprocess import Preprocess
from vitrail.models.configs import ConvNeXtConfig, ModelConfig, ResNetConfig, SwinConfig, ViTConfig

# They change training only. timm's own files leave them out too.
RATES = {"drop_rate", "drop_path_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate"}


@dataclass(frozen=True)
class Family:
    """What timm wants to know of a family. `first_conv` and `classifier` are the names of modules."""

    config: type[ModelConfig]
    first_conv: str
    classifier: str
    fixed_size: bool  # the constructor takes img_size, and the model no other size
    not_args: frozenset[str]  # fields that are no arguments of timm's constructor


FAMILIES = {
    "vit": Family(
        ViTConfig,
        "patch_embed.proj",
        "head",
        True,
        frozenset({"dist_token", "dist_head", "stem", "stem_depth", "norm_eps"}),
    ),
    "swin": Family(SwinConfig, "patch_embed.proj", "head.fc", True, frozenset({"norm_eps"})),
    "resnet": Family(ResNetConfig, "conv1", "fc", False, frozenset({"img_size", "block", "small_stem"})),
    "convnext": Family(ConvNeXtConfig, "stem.0", "head.fc", False, frozenset({"img_size"})),
}


def family_of(config: ModelConfig) -> str:
    """The key of the config's family in `FAMILIES`."""
    return next(name for name, family in FAMILIES.items() if type(config) is family.config)


def timm_stand_in(config: ModelConfig, size: tuple[int, int] | None = None) -> str | None:
    """A variant of timm's that becomes this model when given `model_args`; None where timm has no such model.

    size: the height and width of its images, if other than `config.img_size`.
    """
    match config:
        case ViTConfig():
            headless = config.dist_token and not config.dist_head
            if headless or config.stem != "patch" or config.norm_eps != ViTConfig.norm_eps:
                return None
            return "deit_tiny_distilled_patch16_224" if config.dist_token else "vit_tiny_patch16_224"
        case SwinConfig():
            same = config.norm_eps == SwinConfig.norm_eps and window_mismatch(config, size) is None
            return "swin_tiny_patch4_window7_224" if same else None
        case ResNetConfig():
            if config.small_stem or len(config.layers) != 4:
                return None
            return {"basic": "resnet18", "bottleneck": "resnet50"}[config.block]
        case ConvNeXtConfig():
            return "convnext_tiny"
    return None


def window_mismatch(config: ModelConfig, size: tuple[int, int] | None = None) -> str | None:
    """Why a Swin's logits at this image size differ from timm's, and the nearest sizes at which they are equal.

    None where they are equal, and for every other architecture. size: height and width, if other than
    `config.img_size`.
    """
    size = size or config.img_size
    if not isinstance(config, SwinConfig) or all(
        _has_whole_windows(config, side, built) for side, built in zip(size, config.img_size, strict=True)
    ):
        return None
    rebuilt = size == config.img_size  # the windows then follow the size; else they stay those of config.img_size
    height, width = (
        " or ".join(str(near) for near in _nearest_sides(config, side, None if rebuilt else built))
        for side, built in zip(size, config.img_size, strict=True)
    )
    return (
        f"Swin at {size[0]}x{size[1]} px: some feature maps are not a whole number of windows of {config.window_size}, "
        "and the logits differ from timm's, which shifts before it pads and lets tokens attend to padding and across "
        f"the edge of the image; equal to timm at height {height} and width {width}"
    )


def _has_whole_windows(config: SwinConfig, side: int, built: int) -> bool:
    """Whether every stage's feature map has a whole number of windows along a side of the image (in pixels), in a
    model built for images with the side `built`."""
    strides = [config.patch_size * 2**stage for stage in range(len(config.depths))]
    return side % config.patch_size == 0 and all(
        -(-side // stride) % min(-(-built // stride), config.window_size) == 0 for stride in strides
    )


def _nearest_sides(config: SwinConfig, side: int, built: int | None) -> list[int]:
    """The largest side up to `side` and the smallest from `side` on with whole windows, in a model built for that
    side (None) or for `built`."""
    step = config.patch_size
    below = range(side // step * step, 0, -step)
    above = itertools.count(-(-side // step) * step, step)  # ends: a multiple of all strides and windows always fits
    found = [next((s for s in sides if _has_whole_windows(config, s, built or s)), None) for sides in (below, above)]
    return sorted({near for near in found if near is not None})


def same_but_for_args(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether timm's constructor for `one` builds `other` when it is given `model_args`."""
    if type(one) is not type(other):
        return False
    fixed = FAMILIES[family_of(one)].not_args - {"img_size"}
    return all(getattr(one, name) == getattr(other, name) for name in fixed)


def model_args(config: ModelConfig, preprocess: Preprocess) -> dict[str, Any]:
    """The arguments with which timm's constructor builds this model, whatever its own defaults are."""
    family = FAMILIES[family_of(config)]
    left_out = (
        RATES | family.not_args | {"num_classes"}
    )  # timm reads it beside, and transformers passes it on by itself
    args = {key: value for key, value in dataclasses.asdict(config).items() if key not in left_out}
    if family.fixed_size and preprocess.size != config.img_size:
        args["dynamic_img_size"] = True  # the model runs at another size than it was built for
    return args


def pretrained_cfg(config: ModelConfig, preprocess: Preprocess) -> dict[str, Any]:
    """timm's record of the weights: preprocessing, and the modules that it adapts to other channels and classes."""
    family = FAMILIES[family_of(config)]
    heads: str | list[str] = family.classifier
    if isinstance(config, ViTConfig) and config.dist_token:
        heads = ["head", "head_dist"]
    return {
        **preprocess.to_timm(),
        "num_classes": config.num_classes,
        "fixed_input_size": family.fixed_size and preprocess.size == config.img_size,
        "pool_size": None,
        "first_conv": family.first_conv,
        "classifier": heads,
    }


def global_pool(config: ModelConfig) -> str:
    """How features are pooled: "token" or "avg"."""
    return config.global_pool if isinstance(config, ViTConfig) else "avg"
