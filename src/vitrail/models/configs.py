"""One frozen config per architecture. Field names are the arguments of timm's constructors.

Importing this module does not import torch, so that listing the catalog is fast.
"""

from dataclasses import dataclass, fields
from typing import Literal

_MAX_TOKENS = 32_768  # attention takes time in proportion to their square

Pool = Literal["token", "avg"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The options of every architecture."""

    img_size: tuple[int, int] = (224, 224)  # height, width
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head
    drop_rate: float = 0.0  # dropout before the head
    drop_path_rate: float = 0.0  # stochastic depth of the last block; increases linearly from 0 at the first

    def __post_init__(self) -> None:
        if min(self.img_size) < 1 or self.in_chans < 1 or self.num_classes < 0:
            raise ValueError(f"img_size and in_chans must be at least 1 and num_classes at least 0: {self}")


@dataclass(frozen=True, kw_only=True)
class ViTConfig(ModelConfig):
    """Vision Transformer, DeiT, DeiT III and DINOv2."""

    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    class_token: bool = True
    dist_token: bool = False  # DeiT's distillation token
    dist_head: bool = True  # the distillation token, if any, has a separate head
    reg_tokens: int = 0  # registers (https://arxiv.org/abs/2309.16588)
    no_embed_class: bool = False  # the position embedding covers only the patches, not the prefix tokens
    init_values: float | None = None  # initial value of LayerScale; None for no LayerScale
    global_pool: Pool = "token"
    fc_norm: bool = False  # the final norm follows pooling instead of preceding it
    stem: Literal["patch", "conv"] = "patch"  # conv: 3x3 convolutions instead of the patch projection
    stem_depth: int = 1  # convolutions per resolution of that stem, except the last, which has one
    pos_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    norm_eps: float = 1e-6
    merge: tuple[int, ...] = ()  # patch tokens that each block merges (https://arxiv.org/abs/2210.09461); (): none

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size < 1 or self.num_heads < 1:
            raise ValueError(f"patch_size and num_heads must be at least 1, not {self.patch_size} and {self.num_heads}")
        if not 0 <= self.norm_eps < 1:
            raise ValueError(f"norm_eps must be at least 0 and below 1, not {self.norm_eps}")
        tokens = (self.img_size[0] // self.patch_size) * (self.img_size[1] // self.patch_size)
        if tokens > _MAX_TOKENS:
            size = f"an image of {self.img_size[0]}x{self.img_size[1]} in patches of {self.patch_size}"
            raise ValueError(f"{size} has {tokens:,} tokens, more than {_MAX_TOKENS:,}: use a smaller img_size")
        if self.merge:
            self._check_merge()
        if self.global_pool == "token" and not self.class_token:
            raise ValueError("global_pool='token' needs class_token=True: without a class token use global_pool='avg'")
        if self.stem_depth < 1:
            raise ValueError(f"stem_depth must be at least 1, not {self.stem_depth}")
        if self.dist_token and (not self.class_token or self.global_pool != "token" or self.reg_tokens):
            raise ValueError("dist_token=True needs class_token=True, global_pool='token' and reg_tokens=0")

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class, distillation, registers."""
        return self.class_token + self.dist_token + self.reg_tokens

    @property
    def merging_blocks(self) -> int:
        """Blocks in which merging has an effect: not the last one if no patch token is read after it."""
        return self.depth - (self.global_pool == "token")

    def even_merge(self, amount: float) -> tuple[int, ...]:
        """`merge` with the same number of tokens in every block.

        amount: tokens per block, or below 1 the share of all patches, spread evenly; 0 for none.

        Raises:
            ValueError: more than can be merged: at most half of a block's patches.
        """
        blocks = self.merging_blocks
        if amount < 0 or (amount > 1 and int(amount) != amount):
            raise ValueError(f"merge={amount}: give a whole number of tokens per block, or a share below 1")
        total = round(amount * self.num_patches) if amount < 1 else int(amount) * blocks
        each = tuple((total + blocks - 1 - block) // blocks for block in range(blocks)) if blocks else ()
        return (*each, *(0 for _ in range(self.depth - blocks))) if total else ()

    @property
    def num_patches(self) -> int:
        """Patches of an image of `img_size`."""
        return (self.img_size[0] // self.patch_size) * (self.img_size[1] // self.patch_size)

    def _check_merge(self) -> None:
        if len(self.merge) != self.depth or min(self.merge) < 0:
            raise ValueError(f"merge needs {self.depth} numbers, one per block, that are at least 0: {self.merge}")
        if any(self.merge[self.merging_blocks :]):
            raise ValueError("merge must end with 0: with global_pool='token' no patch is read after the last block")
        patches = self.num_patches
        for block, r in enumerate(self.merge):
            if r > patches // 2:
                raise ValueError(f"merge={r} in block {block}: it has {patches} patch tokens, and at most half can go")
            patches -= r


@dataclass(frozen=True, kw_only=True)
class SwinConfig(ModelConfig):
    """Swin Transformer, version 1."""

    patch_size: int = 4
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    proj_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.1
    norm_eps: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class ResNetConfig(ModelConfig):
    """ResNet, version 1.5: the stride of a bottleneck is in its 3x3 convolution."""

    block: Literal["basic", "bottleneck"] = "bottleneck"
    layers: tuple[int, ...] = (3, 4, 6, 3)  # blocks of each stage
    channels: tuple[int, ...] = (64, 128, 256, 512)  # width of each stage, before a bottleneck's expansion
    small_stem: bool = False  # one 3x3 convolution with stride 1 and no pooling, for small images

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers or len(self.layers) != len(self.channels) or min(*self.layers, *self.channels) < 1:
            raise ValueError(f"layers and channels need one positive number per stage: {self.layers}, {self.channels}")


@dataclass(frozen=True, kw_only=True)
class ConvNeXtConfig(ModelConfig):
    """ConvNeXt, version 1."""

    depths: tuple[int, int, int, int] = (3, 3, 9, 3)
    dims: tuple[int, int, int, int] = (96, 192, 384, 768)
    ls_init_value: float = 1e-6
    norm_eps: float = 1e-6


def differences(one: ModelConfig, other: ModelConfig) -> set[str]:
    """The fields of `one` that `other` has not, or with another value."""
    return {field.name for field in fields(one) if getattr(one, field.name) != getattr(other, field.name, None)}
