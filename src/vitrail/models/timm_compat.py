"""The timm equivalent of a config: the variant whose constructor builds the same model, and its arguments.

The fields of the configs have timm's names already, so this is mostly about which of them to omit.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from vitrail.images.preprocess import Preprocess
from vitrail.models.configs import ConvNeXtConfig, ModelConfig, ResNetConfig, SwinConfig, ViTConfig, differences

# They affect training only; timm's own config files omit them too.
RATES = {"drop_rate", "drop_path_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate"}


@dataclass(frozen=True)
class Family:
    """A row of `FAMILIES`. `first_conv` and `classifier` are names of modules."""

    config: type[ModelConfig]
    first_conv: str
    classifier: str
    fixed_size: bool  # the constructor takes img_size, and the model accepts only that size
    not_args: frozenset[str]  # fields that timm's constructor does not have


FAMILIES = {
    "vit": Family(
        ViTConfig,
        "patch_embed.proj",
        "head",
        True,
        frozenset({"dist_token", "dist_head", "stem", "stem_depth", "norm_eps", "merge"}),
    ),
    "swin": Family(SwinConfig, "patch_embed.proj", "head.fc", True, frozenset({"norm_eps"})),
    "resnet": Family(ResNetConfig, "conv1", "fc", False, frozenset({"img_size", "block", "small_stem"})),
    "convnext": Family(ConvNeXtConfig, "stem.0", "head.fc", False, frozenset({"img_size"})),
}


def family_of(config: ModelConfig) -> str:
    """The key of the config's family in `FAMILIES`."""
    return next(name for name, family in FAMILIES.items() if type(config) is family.config)


def timm_base_variant(config: ModelConfig, size: tuple[int, int] | None = None) -> str | None:
    """The timm variant that `model_args` turns into this model; None if timm has no equivalent.

    size: height and width of the images, if not `config.img_size`.
    """
    match config:
        case ViTConfig():
            headless = config.dist_token and not config.dist_head
            if headless or any(config.merge) or config.stem != "patch" or config.norm_eps != ViTConfig.norm_eps:
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


def timm_mismatch(config: ModelConfig, size: tuple[int, int] | None = None) -> str | None:
    """Why the model's logits at this image size differ from those that timm's architecture gives with its weights.

    None if they are equal, or if timm has no such architecture.
    """
    if isinstance(config, ViTConfig) and any(config.merge):
        if timm_base_variant(dataclasses.replace(config, merge=()), size) is None:
            return None
        return (
            f"merged tokens ({', '.join(map(str, config.merge))} by block): timm cannot merge tokens and does not load "
            "this model; with merge=0 its weights are those of a timm model"
        )
    return window_mismatch(config, size)


def window_mismatch(config: ModelConfig, size: tuple[int, int] | None = None) -> str | None:
    """Why a Swin's logits at this image size differ from timm's, and the nearest sizes at which they are equal.

    None if they are equal, and for other architectures. size: height and width, if not `config.img_size`.
    """
    size = size or config.img_size
    if not isinstance(config, SwinConfig) or all(
        _has_whole_windows(config, side, built) for side, built in zip(size, config.img_size, strict=True)
    ):
        return None
    rebuilt = size == config.img_size  # then the window sizes change with the image size
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
    """Whether the feature maps of all stages have a whole number of windows along an image side (in pixels), in a model
    built for the side `built`."""
    strides = [config.patch_size * 2**stage for stage in range(len(config.depths))]
    return side % config.patch_size == 0 and all(
        -(-side // stride) % min(-(-built // stride), config.window_size) == 0 for stride in strides
    )


def _nearest_sides(config: SwinConfig, side: int, built: int | None) -> list[int]:
    """The nearest sides below and above `side` with whole windows, for a model built for `built`, or for the new side
    if None."""
    step = config.patch_size
    below = range(side // step * step, 0, -step)
    above = itertools.count(-(-side // step) * step, step)  # finite: a common multiple of strides and windows exists
    found = [next((s for s in sides if _has_whole_windows(config, s, built or s)), None) for sides in (below, above)]
    return sorted({near for near in found if near is not None})


def differ_only_in_args(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether timm's constructor for `one` can build `other` by its `model_args`."""
    fixed = FAMILIES[family_of(one)].not_args - {"img_size"}
    return type(one) is type(other) and not fixed & differences(one, other)


def model_args(config: ModelConfig, preprocess: Preprocess) -> dict[str, Any]:
    """All arguments with which timm's constructor builds this model, independent of timm's defaults."""
    family = FAMILIES[family_of(config)]
    omitted = RATES | family.not_args | {"num_classes"}  # num_classes: timm and transformers read it elsewhere
    args = {key: value for key, value in dataclasses.asdict(config).items() if key not in omitted}
    if family.fixed_size and preprocess.size != config.img_size:
        args["dynamic_img_size"] = True  # runs at a size that it was not built for
    return args


def pretrained_cfg(config: ModelConfig, preprocess: Preprocess) -> dict[str, Any]:
    """timm's `pretrained_cfg`: preprocessing, and the modules to adapt to other in_chans and num_classes."""
    family = FAMILIES[family_of(config)]
    heads: str | list[str] = family.classifier
    if isinstance(config, ViTConfig) and config.dist_token:
        heads = ["head", "head_dist"]
    return {
        **preprocess.to_timm(),
        "num_classes": config.num_classes,
        "fixed_input_size": family.fixed_size and preprocess.size == config.img_size,
        "pool_size": None if isinstance(config, ViTConfig) else last_map(config, preprocess.size),
        "first_conv": family.first_conv,
        "classifier": heads,
    }


def last_map(config: ModelConfig, size: tuple[int, int]) -> list[int]:
    """Height and width of the last feature map of images of this size."""
    stride = feature_info(config)[-1]["reduction"]
    return [-(-side // stride) for side in size]


def feature_info(config: ModelConfig) -> list[dict[str, Any]]:
    """Channels, stride and module of each map of `forward_intermediates`."""
    match config:
        case ViTConfig():
            width, stride = config.embed_dim, config.patch_size
            found = [(f"blocks.{index}", width, stride) for index in range(config.depth)]
        case SwinConfig():
            stages = range(len(config.depths))
            found = [(f"layers.{i}", config.embed_dim * 2**i, config.patch_size * 2**i) for i in stages]
        case ResNetConfig():
            expansion, first = (4 if config.block == "bottleneck" else 1), (1 if config.small_stem else 2)
            widths = enumerate(config.channels)
            maps = [(f"layer{i + 1}", expansion * width, first**2 * 2**i) for i, width in widths]
            found = [("act", config.channels[0], first), *maps]
        case ConvNeXtConfig():
            found = [(f"stages.{i}", width, 4 * 2**i) for i, width in enumerate(config.dims)]
        case _:
            raise TypeError(f"unknown config type {type(config).__name__}")
    return [{"module": module, "num_chs": width, "reduction": stride} for module, width, stride in found]


def group_matcher(config: ModelConfig, coarse: bool) -> dict[str, Any]:
    """timm's patterns by which parameters are grouped by depth: of the stem, and of stages (coarse) or blocks."""
    last = (99999,)  # timm's number of the group with the last block
    match config:
        case ViTConfig():
            stem = r"^cls_token|dist_token|reg_token|pos_embed|patch_embed"
            return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", last)]}
        case SwinConfig():
            fine = [(r"^layers\.(\d+).downsample", (0,)), (r"^layers\.(\d+)\.\w+\.(\d+)", None), (r"^norm", last)]
            return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else fine}
        case ResNetConfig():
            return {"stem": r"^conv1|bn1|maxpool", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}
        case _:
            fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
            return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}


def global_pool(config: ModelConfig) -> str:
    """How features are pooled, "token" or "avg"."""
    return config.global_pool if isinstance(config, ViTConfig) else "avg"
