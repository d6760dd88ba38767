"""The catalog: every named variant in one table, with timm's names. Importing this module does not import torch."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from vitrail.errors import ModelError, did_you_mean
from vitrail.images.preprocess import Preprocess
from vitrail.models.configs import ConvNeXtConfig, ModelConfig, ResNetConfig, SwinConfig, ViTConfig
from vitrail.weights.published import PUBLISHED
from vitrail.weights.record import WeightsRecord


@dataclass(frozen=True)
class Variant:
    """One row: a name, its config, its cost, and its published weights."""

    family: str
    name: str
    config: ModelConfig
    params: int  # exact, checked by a test
    gmacs: float  # 1e9 multiply-accumulate operations per image with all tokens in every block, as papers count

    @property
    def weights(self) -> tuple[WeightsRecord, ...]:
        """Published weights, the default first."""
        return PUBLISHED.get(self.name, ())

    @property
    def preprocess(self) -> Preprocess:
        """The preprocessing of the default weights; without any, mean and std of 0.5 at `config.img_size`."""
        if self.weights:
            return self.weights[0].preprocess
        channels = self.config.in_chans
        return Preprocess(size=self.config.img_size, mean=(0.5,) * channels, std=(0.5,) * channels, channels=channels)


_FOR_SMALL_IMAGES = {"mlp_ratio": 2.0, "stem": "conv", "num_classes": 10}
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    "nano": {"embed_dim": 64, "depth": 4, "num_heads": 2, **_FOR_SMALL_IMAGES},
    "micro": {"embed_dim": 96, "depth": 4, "num_heads": 3, **_FOR_SMALL_IMAGES},
    "mini": {"embed_dim": 128, "depth": 6, "num_heads": 4, **_FOR_SMALL_IMAGES},
    "small_64": {"embed_dim": 192, "depth": 8, "num_heads": 6, **_FOR_SMALL_IMAGES},
}
_DEIT3 = {"no_embed_class": True, "init_values": 1e-6}
_DINOV2 = {"init_values": 1e-5, "num_classes": 0}
_AVERAGE = {"class_token": False, "global_pool": "avg", "fc_norm": True, "stem_depth": 2}
_DISTILLED = {"dist_token": True, "stem_depth": 2}
_DINOV2_REG = {**_DINOV2, "reg_tokens": 4, "no_embed_class": True}


def _vit(size: str, patch: int, side: int, **options: Any) -> ViTConfig:
    return ViTConfig(patch_size=patch, img_size=(side, side), **_SIZES[size], **options)


def _swin(dim: int, depth: int, window: int, side: int) -> SwinConfig:
    heads = tuple(dim // 32 * 2**stage for stage in range(4))
    return SwinConfig(
        embed_dim=dim, depths=(2, 2, depth, 2), num_heads=heads, window_size=window, img_size=(side, side)
    )


_RESNET20 = ResNetConfig(
    block="basic", layers=(3, 3, 3), channels=(16, 32, 64), small_stem=True, img_size=(32, 32), num_classes=10
)

_ROWS = (
    # ViT: Dosovitskiy et al., 2020 (https://arxiv.org/abs/2010.11929); Ti and S: Steiner et al., 2021
    # (https://arxiv.org/abs/2106.10270)
    Variant("vit", "vit_tiny_patch16_224", _vit("tiny", 16, 224), 5_717_416, 1.254),
    Variant("vit", "vit_tiny_patch16_384", _vit("tiny", 16, 384), 5_790_376, 4.682),
    Variant("vit", "vit_small_patch16_224", _vit("small", 16, 224), 22_050_664, 4.599),
    Variant("vit", "vit_small_patch16_384", _vit("small", 16, 384), 22_196_584, 15.490),
    Variant("vit", "vit_base_patch32_224", _vit("base", 32, 224), 88_224_232, 4.409),
    Variant("vit", "vit_base_patch32_384", _vit("base", 32, 384), 88_297_192, 13.044),
    Variant("vit", "vit_base_patch16_224", _vit("base", 16, 224), 86_567_656, 17.564),
    Variant("vit", "vit_base_patch16_384", _vit("base", 16, 384), 86_859_496, 55.484),
    Variant("vit", "vit_large_patch32_224", _vit("large", 32, 224), 306_535_400, 15.378),
    Variant("vit", "vit_large_patch32_384", _vit("large", 32, 384), 306_632_680, 45.276),
    Variant("vit", "vit_large_patch16_224", _vit("large", 16, 224), 304_326_632, 61.555),
    Variant("vit", "vit_large_patch16_384", _vit("large", 16, 384), 304_715_752, 191.066),
    Variant("vit", "vit_huge_patch14_224", _vit("huge", 14, 224), 632_045_800, 167.295),
    # DeiT: Touvron et al., 2020 (https://arxiv.org/abs/2012.12877)
    Variant("deit", "deit_tiny_patch16_224", _vit("tiny", 16, 224), 5_717_416, 1.254),
    Variant("deit", "deit_small_patch16_224", _vit("small", 16, 224), 22_050_664, 4.599),
    Variant("deit", "deit_base_patch16_224", _vit("base", 16, 224), 86_567_656, 17.564),
    Variant("deit", "deit_base_patch16_384", _vit("base", 16, 384), 86_859_496, 55.484),
    Variant("deit", "deit_tiny_distilled_patch16_224", _vit("tiny", 16, 224, dist_token=True), 5_910_800, 1.261),
    Variant("deit", "deit_small_distilled_patch16_224", _vit("small", 16, 224, dist_token=True), 22_436_432, 4.624),
    Variant("deit", "deit_base_distilled_patch16_224", _vit("base", 16, 224, dist_token=True), 87_338_192, 17.657),
    Variant("deit", "deit_base_distilled_patch16_384", _vit("base", 16, 384, dist_token=True), 87_630_032, 55.591),
    # DeiT III: Touvron et al., 2022 (https://arxiv.org/abs/2204.07118)
    Variant("deit3", "deit3_small_patch16_224", _vit("small", 16, 224, **_DEIT3), 22_059_496, 4.599),
    Variant("deit3", "deit3_small_patch16_384", _vit("small", 16, 384, **_DEIT3), 22_205_416, 15.490),
    Variant("deit3", "deit3_base_patch16_224", _vit("base", 16, 224, **_DEIT3), 86_585_320, 17.564),
    Variant("deit3", "deit3_base_patch16_384", _vit("base", 16, 384, **_DEIT3), 86_877_160, 55.484),
    Variant("deit3", "deit3_large_patch16_224", _vit("large", 16, 224, **_DEIT3), 304_374_760, 61.555),
    Variant("deit3", "deit3_large_patch16_384", _vit("large", 16, 384, **_DEIT3), 304_763_880, 191.066),
    # DINOv2: Oquab et al., 2023 (https://arxiv.org/abs/2304.07193); registers: Darcet et al., 2023
    # (https://arxiv.org/abs/2309.16588). Published without a head.
    Variant("dinov2", "vit_small_patch14_dinov2", _vit("small", 14, 518, **_DINOV2), 22_056_192, 46.697),
    Variant("dinov2", "vit_base_patch14_dinov2", _vit("base", 14, 518, **_DINOV2), 86_579_712, 151.574),
    Variant("dinov2", "vit_large_patch14_dinov2", _vit("large", 14, 518, **_DINOV2), 304_367_616, 506.804),
    Variant("dinov2", "vit_small_patch14_reg4_dinov2", _vit("small", 14, 518, **_DINOV2_REG), 22_057_344, 46.883),
    Variant("dinov2", "vit_base_patch14_reg4_dinov2", _vit("base", 14, 518, **_DINOV2_REG), 86_582_016, 152.116),
    Variant("dinov2", "vit_large_patch14_reg4_dinov2", _vit("large", 14, 518, **_DINOV2_REG), 304_370_688, 508.551),
    # Swin: Liu et al., 2021 (https://arxiv.org/abs/2103.14030)
    Variant("swin", "swin_tiny_patch4_window7_224", _swin(96, 6, 7, 224), 28_288_354, 4.491),
    Variant("swin", "swin_small_patch4_window7_224", _swin(96, 18, 7, 224), 49_606_258, 8.741),
    Variant("swin", "swin_base_patch4_window7_224", _swin(128, 18, 7, 224), 87_768_224, 15.431),
    Variant("swin", "swin_large_patch4_window7_224", _swin(192, 18, 7, 224), 196_532_476, 34.476),
    Variant("swin", "swin_base_patch4_window12_384", _swin(128, 18, 12, 384), 87_903_584, 47.083),
    Variant("swin", "swin_large_patch4_window12_384", _swin(192, 18, 12, 384), 196_735_516, 103.919),
    # Not in timm: for small images, trained from scratch. Narrow and shallow, with a convolutional stem and few tokens.
    # Top-1 on digits (1,437 training images, 60 epochs, test split, 2 to 4 seeds): 93 % with a patch projection of 2,
    # 99 % with the stem; six blocks are no better than four, and 40 epochs lose 0.5 points. On Fashion-MNIST (one
    # epoch, one seed, test split): 85.7 % with 16 tokens of width 96 (patches of 8, images at 32 px), 82 % with 49
    # tokens of width 64 (patches of 4); average pooling gains 1 point over a class token. With two convolutions per
    # resolution of the stem (three epochs, one seed, validation split): 89.8 %, and 88.0 % with one, at 0.75 of the
    # speed.
    Variant("vit", "vit_nano_patch2_8", _vit("nano", 2, 8), 159_466, 0.002793),
    Variant("vit", "vit_nano_patch2_16", _vit("nano", 2, 16), 162_538, 0.012346),
    Variant("vit", "vit_micro_patch8_32", _vit("micro", 8, 32, **_AVERAGE), 432_394, 0.012068),
    Variant("deit", "deit_micro_distilled_patch8_32", _vit("micro", 8, 32, **_DISTILLED), 433_748, 0.012711),
    Variant("vit", "vit_mini_patch4_32", _vit("mini", 4, 32, **_AVERAGE), 933_962, 0.072271),
    Variant("vit", "vit_small_patch8_64", _vit("small_64", 8, 64, **_AVERAGE), 2_909_962, 0.276236),
    # CNN baselines. ResNet: He et al., 2015 (https://arxiv.org/abs/1512.03385); ConvNeXt: Liu et al., 2022
    # (https://arxiv.org/abs/2201.03545)
    Variant("resnet", "resnet18", ResNetConfig(block="basic", layers=(2, 2, 2, 2)), 11_689_512, 1.814),
    Variant("resnet", "resnet34", ResNetConfig(block="basic", layers=(3, 4, 6, 3)), 21_797_672, 3.664),
    Variant("resnet", "resnet50", ResNetConfig(layers=(3, 4, 6, 3)), 25_557_032, 4.089),
    Variant("resnet", "resnet101", ResNetConfig(layers=(3, 4, 23, 3)), 44_549_160, 7.801),
    Variant("convnext", "convnext_tiny", ConvNeXtConfig(), 28_589_128, 4.456),
    # For small images, trained from scratch: the 20-layer network of section 4.2 of the paper.
    Variant("resnet", "resnet20_32", _RESNET20, 272_474, 0.040813),
)

VARIANTS: dict[str, Variant] = {row.name: row for row in _ROWS}


def list_models(pattern: str = "*") -> list[str]:
    """Names that match `pattern`, a shell pattern (`swin*`) or a part of a name (`distilled`)."""
    if not any(wildcard in pattern for wildcard in "*?["):
        pattern = f"*{pattern}*"
    return [name for name in VARIANTS if fnmatchcase(name, pattern)]


def variant(name: str) -> Variant:
    """The row of the model called `name`.

    Raises:
        ModelError: there is none; the message has the closest names.
    """
    if name not in VARIANTS:
        raise ModelError(f"unknown model {name!r}{did_you_mean(name, VARIANTS)}: `vitrail models` lists all names")
    return VARIANTS[name]
