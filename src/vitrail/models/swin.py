"""Swin Transformer: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", 2021
(https://arxiv.org/abs/2103.14030).

Shapes: B batch, I channels of the image, H W height and width of the image or of a feature map, C width, M windows,
n tokens of a window, A heads, K classes.
"""

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import ModelError
from vitrail.layers.block import DropPath, Mlp, drop_path_rates, init_linear
from vitrail.layers.embed import PatchEmbed
from vitrail.layers.norm import LayerNorm
from vitrail.layers.window import Pair, WindowAttention, Windows, plan_windows, relative_position_index
from vitrail.models.base import PoolHead, Stage, StagedModel, head_layer
from vitrail.models.configs import SwinConfig
from vitrail.weights.resample import resample_bias_table


class SwinPatchEmbed(PatchEmbed):
    """Project patches and normalise: B I H W -> B H/P W/P C, for patches of side P. Sides that are not multiples of P
    are padded with zeros."""

    def __init__(self, patch_size: int, in_chans: int, dim: int, norm_eps: float) -> None:
        super().__init__(patch_size, in_chans, dim)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = _pad_to_multiple(x, self.patch_size)
        tokens: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return tokens


class PatchMerging(nn.Module):
    """Merge 2x2 tokens into one of twice the width: B H W C -> B H/2 W/2 2C. Odd sides are padded with zeros."""

    def __init__(self, dim: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = LayerNorm(4 * dim, eps=norm_eps)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = _pad_to_multiple(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        batch, height, width, dim = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, dim)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # B H/2 W/2 4C; column before row within the 2x2, as published
        merged: Tensor = self.reduction(self.norm(x))
        return merged


class SwinBlock(nn.Module):
    """x + window attention(norm(x)), then x + MLP(norm(x)), on a feature map B H W C; equation 3 of the paper."""

    def __init__(
        self, dim: int, num_heads: int, window: Pair, shifted: bool, drop_path: float, config: SwinConfig
    ) -> None:
        super().__init__()
        self.shifted = shifted
        self.norm1 = LayerNorm(dim, eps=config.norm_eps)
        self.attn = WindowAttention(
            dim, num_heads, window, config.qkv_bias, config.attn_drop_rate, config.proj_drop_rate
        )
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = LayerNorm(dim, eps=config.norm_eps)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), config.proj_drop_rate)
        self.drop_path2 = DropPath(drop_path)

    def windows(self, x: Tensor) -> Windows:
        """The partition of the feature map x, B H W C, into windows."""
        return plan_windows((x.shape[1], x.shape[2]), self.attn.window, self.shifted, x.device)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x), self.windows(x)))
        out: Tensor = x + self.drop_path2(self.mlp(self.norm2(x)))
        return out

    def forward_with_weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` without dropout or drop path: the output B H W C and the attention weights (B M) A n n.

        `self.windows(x)` maps windows to tokens.
        """
        windows = self.windows(x)
        attended, weights = self.attn.forward_with_weights(windows.partition(self.norm1(x)), windows)
        x = x + windows.reverse(attended, len(x))
        return x + self.mlp(self.norm2(x)), weights


class SwinTransformer(StagedModel):
    """Images B I H W to logits B K, through feature maps B H W C; each stage halves H and W and doubles C.

    Images may have any size. A feature map that is not a whole number of windows is padded and then shifted, and no
    token attends to padding or across an edge of the image (timm shifts first, see `window_mismatch`). Along a side no
    longer than the window, the window has that length and there is no shift. The sizes of the bias tables follow
    `config.img_size`, as in timm.
    """

    config: SwinConfig
    stage_list = "layers"
    output_fmt = "NHWC"  # of `forward_features`, for timm

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_dim = config.embed_dim
        self.num_classes = config.num_classes
        self.num_stages = len(config.depths)
        self.num_features = config.embed_dim * 2 ** (len(config.depths) - 1)
        self.patch_embed = SwinPatchEmbed(config.patch_size, config.in_chans, config.embed_dim, config.norm_eps)
        rates = iter(drop_path_rates(config.drop_path_rate, sum(config.depths)))
        self.layers = nn.Sequential()
        for index, depth in enumerate(config.depths):
            window = _window(config, index)
            dim, heads = config.embed_dim * 2**index, config.num_heads[index]
            merging = PatchMerging(dim // 2, config.norm_eps) if index else nn.Identity()
            blocks = (SwinBlock(dim, heads, window, i % 2 == 1, next(rates), config) for i in range(depth))
            self.layers.append(Stage(merging, blocks))
        self.norm = nn.LayerNorm(self.num_features, eps=config.norm_eps)
        self.head = PoolHead((1, 2), nn.Identity(), config.drop_rate, head_layer(self.num_features, config.num_classes))
        self.apply(init_linear)

    def forward_stages(self, x: Tensor, norm: bool) -> Iterator[tuple[Tensor, Tensor]]:
        x = self.patch_embed(x)
        for index, stage in enumerate(self.layers, start=1):
            x = stage(x, self.run_block)
            features = self.norm(x) if index == self.num_stages else x  # B H W C
            yield (features if norm else x).permute(0, 3, 1, 2), features

    def resize_to(self, config: SwinConfig) -> None:
        """Make the windows of all stages those of a model made for the new size, with resampled bias tables."""
        if self.pruned:
            raise ModelError("set the input size before pruning: a pruned model keeps its size")
        for index, stage in enumerate(self.layers):
            window = _window(config, index)
            for attention in (module for module in stage.modules() if isinstance(module, WindowAttention)):
                table = attention.relative_position_bias_table
                resampled = resample_bias_table(table.detach().cpu(), attention.window, window).to(table)
                attention.window = window
                attention.relative_position_bias_table = nn.Parameter(resampled, requires_grad=table.requires_grad)
                attention.relative_position_index = relative_position_index(window).to(table.device)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}


def _window(config: SwinConfig, stage: int) -> Pair:
    """The size of a stage's windows: the config's, or that of the feature map if it is smaller."""
    stride = config.patch_size * 2**stage
    size = (-(-config.img_size[0] // stride), -(-config.img_size[1] // stride))
    return min(size[0], config.window_size), min(size[1], config.window_size)


def _pad_to_multiple(x: Tensor, step: int) -> Tensor:
    """Pad B C H W with zeros at the bottom and right to multiples of `step`."""
    pad: Any = (0, -x.shape[3] % step, 0, -x.shape[2] % step)
    return F.pad(x, pad) if any(pad) else x
