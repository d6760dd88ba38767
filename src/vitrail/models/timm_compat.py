"""A config of ours in timm's words: which of timm's constructors builds the same model, and with what arguments.

The config dataclasses use timm's names, so most of this is which fields to leave out.
"""

import dataclasses
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
            same = config.norm_eps == SwinConfig.norm_eps and not _pads(config, size or config.img_size)
            return "swin_tiny_patch4_window7_224" if same else None
        case ResNetConfig():
            if config.small_stem or len(config.layers) != 4:
                return None
            return {"basic": "resnet18", "bottleneck": "resnet50"}[config.block]
        case ConvNeXtConfig():
            return "convnext_tiny"
    return None


def _pads(config: SwinConfig, size: tuple[int, int]) -> bool:
    """Whether a Swin pads its feature maps to whole windows: timm's tokens then attend to the padding, ours do not."""
    for stage in range(len(config.depths)):
        stride = config.patch_size * 2**stage
        for side, built in zip(size, config.img_size, strict=True):
            if side % config.patch_size or -(-side // stride) % min(-(-built // stride), config.window_size):
                return True
    return False


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
