"""The form of a Swin: a list of tokens instead of feature maps, with every change of their order as one gather.

All layers of a block but attention treat tokens one by one, so that their order does not matter: `fold_orders` keeps
them sorted by window from block to block.

Shapes: B batch, I channels of the image, H W height and width, T tokens (H W, or M n with the padding of M windows of n
tokens), C width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.deploy.fold.attention import WindowedAttention
from vitrail.layers.window import Pair, plan_windows
from vitrail.models.swin import PatchMerging, SwinBlock, SwinPatchEmbed, SwinTransformer


class Reorder(nn.Module):
    """B T C -> B T' C: tokens by index. The index T is a token of zeros, if there is any."""

    index: Tensor

    def __init__(self, index: Tensor, zeros: bool = False) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.zeros = zeros

    def forward(self, x: Tensor) -> Tensor:
        return (F.pad(x, (0, 0, 0, 1)) if self.zeros else x).index_select(1, self.index)


class WindowEmbed(nn.Module):
    """Patch projection and norm: B I H W -> B T C. Sides that are not multiples of the patch are padded with zeros."""

    def __init__(self, embed: SwinPatchEmbed, size: Pair) -> None:
        super().__init__()
        self.proj, self.norm = embed.proj, embed.norm
        self.pad = (0, -size[1] % embed.patch_size, 0, -size[0] % embed.patch_size)
        self.grid = (-(-size[0] // embed.patch_size), -(-size[1] // embed.patch_size))

    def forward(self, images: Tensor) -> Tensor:
        x = F.pad(images, self.pad) if any(self.pad) else images
        tokens: Tensor = self.norm(self.proj(x).flatten(2).transpose(1, 2))
        return tokens


class WindowMerge(nn.Module):
    """The second half of `PatchMerging`: B 4T C, four after another that become one, -> B T 2C."""

    def __init__(self, merging: PatchMerging) -> None:
        super().__init__()
        self.norm, self.reduction = merging.norm, merging.reduction

    def forward(self, x: Tensor) -> Tensor:
        merged: Tensor = self.reduction(self.norm(x.reshape(-1, x.shape[1] // 4, 4 * x.shape[2])))
        return merged


class WindowBlock(nn.Module):
    """A block on B T C. partition, reverse: around attention; the identity if the tokens are sorted by window."""

    def __init__(self, block: SwinBlock, size: Pair) -> None:
        super().__init__()
        windows = plan_windows(size, block.attn.window, block.shifted, torch.device("cpu"))
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.attn = WindowedAttention(block.attn, windows)
        self.partition: nn.Module = Reorder(windows.gather)
        self.reverse: nn.Module = Reorder(windows.inverse)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.reverse(self.attn(self.partition(self.norm1(x))))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class WindowBody(nn.Module):
    """Swin: images B I H W to B 1 C."""

    def __init__(self, model: SwinTransformer, size: Pair) -> None:
        super().__init__()
        self.embed = WindowEmbed(model.patch_embed, size)
        self.layers = nn.Sequential()
        grid = self.embed.grid
        for stage in model.layers:
            if isinstance(merging := stage.downsample, PatchMerging):
                order = merging_order(grid)
                self.layers.extend([Reorder(order, bool(grid[0] % 2 or grid[1] % 2)), WindowMerge(merging)])
                grid = (-(-grid[0] // 2), -(-grid[1] // 2))
            self.layers.extend(WindowBlock(block, grid) for block in stage.blocks)  # type: ignore[union-attr]
        self.norm = model.norm

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.norm(self.layers(self.embed(images)))
        return tokens.mean(dim=1, keepdim=True)


def merging_order(grid: Pair) -> Tensor:
    """The tokens of a grid H W, row by row, as `PatchMerging` takes them, 4 for each of the next grid; H W at padding.
    Column before row within the 2x2, as published."""
    height, width = grid
    index = torch.full((height + height % 2, width + width % 2), height * width)
    index[:height, :width] = torch.arange(height * width).view(height, width)
    return index.view(len(index) // 2, 2, -1, 2).permute(0, 2, 3, 1).flatten()


def fold_orders(body: WindowBody) -> None:
    """Sort the tokens by window before each block, from the order of the block before it, in one gather, and not around
    the attention of each."""
    layers: list[nn.Module] = []
    places: Tensor | None = None  # where each token of the grid, row by row, is now; None: in this order
    length = 0  # tokens now, with the padding of windows
    for layer in body.layers:
        if isinstance(layer, WindowBlock):
            assert isinstance(layer.partition, Reorder)
            assert isinstance(layer.reverse, Reorder)
            wanted, after = layer.partition.index, layer.reverse.index
            index = wanted if places is None else places[wanted]
            if not torch.equal(index, torch.arange(len(after) if places is None else length)):
                layers.append(Reorder(index))
            layer.partition = layer.reverse = nn.Identity()
            places, length = after, len(wanted)
        elif isinstance(layer, Reorder) and places is not None:
            layer = Reorder(torch.cat([places, torch.tensor([length])])[layer.index], layer.zeros)
            places = None
        layers.append(layer)
    if places is not None and length != len(places):
        layers.append(Reorder(places))  # without the padding, which must not be in the mean
    body.layers = nn.Sequential(*layers)
