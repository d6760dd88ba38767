"""From images to tokens: patch embedding, convolutional stem, and resampling of position embeddings.

Shapes: B batch, I channels of the image, H W its height and width, P side of a patch, h = H / P and w = W / P the
grid, N = h w patches, C width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import ModelError


def check_divides(height: int, width: int, patch_size: int) -> None:
    """Raise ModelError unless both sides are multiples of the patch size."""
    if height % patch_size or width % patch_size or not height or not width:
        raise ModelError(
            f"the image size {height}x{width} is not a multiple of the patch size {patch_size}: use for example "
            f"{max(1, round(height / patch_size)) * patch_size}x{max(1, round(width / patch_size)) * patch_size}"
        )


class PatchConv(nn.Conv2d):
    """The convolution of patches with stride P: B I H W -> B C h w.

    On CUDA it is computed as what it is, a linear layer of flattened patches: cuDNN's convolution in bfloat16 took an
    eighth of the time of a ViT-S (128 images on an H200).
    """

    def forward(self, x: Tensor) -> Tensor:
        whole = all(side % patch == 0 for side, patch in zip(x.shape[2:], self.kernel_size, strict=True))
        return self.as_linear(x) if x.is_cuda and whole else super().forward(x)

    def as_linear(self, x: Tensor) -> Tensor:
        """`forward` of whole patches as a product."""
        rows, columns = self.kernel_size
        patches = x.unflatten(2, (-1, rows)).unflatten(4, (-1, columns))  # B I h P w P
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # B h w (I P P)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """Linear projection of every patch, by a convolution with stride P (`proj`): B I H W -> B N C.

    Equation 1 of ViT (https://arxiv.org/abs/2010.11929).
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchConv(in_chans, dim, kernel_size=patch_size, stride=patch_size)
        # LeCun normal with the fan-in of one patch, as in ViT's code.
        nn.init.trunc_normal_(self.proj.weight, std=(in_chans * patch_size**2) ** -0.5)
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]  # bias=True

    def forward(self, x: Tensor) -> Tensor:
        check_divides(x.shape[2], x.shape[3], self.patch_size)
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


def channels_last(images: Tensor) -> Tensor:
    """Images in channels_last memory format, except on MPS, where it was not measured. On CPUs, training steps of a
    ResNet or convolutional stem then take 0.8 to 0.9 of the time; tensor cores of GPUs need this format."""
    return images if images.device.type == "mps" else images.contiguous(memory_format=torch.channels_last)


class ConvStem(nn.Module):
    """Overlapping 3x3 convolutions instead of the patch projection: B I H W -> B N C, with as many tokens.

    Xiao et al., "Early Convolutions Help Transformers See Better", 2021 (https://arxiv.org/abs/2106.14881). Each
    convolution has stride 2 (for patches of 2, after one of stride 1), the widths increase linearly to `dim`, and a
    1x1 convolution follows. `depth`: convolutions per resolution, except the last, which has one. Accuracies with and
    without this stem are in `vitrail.models.catalog`.
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int, depth: int = 1) -> None:
        super().__init__()
        halvings = int(math.log2(patch_size))
        if 2**halvings != patch_size or not halvings:
            raise ValueError(
                f"a convolutional stem needs a patch size of 2, 4, 8 or a higher power of 2, not {patch_size}"
            )
        self.patch_size = patch_size
        count = max(halvings, 2)
        layers: list[nn.Module] = []
        width = in_chans
        for step in range(1, count + 1):
            stride = 1 if step <= count - halvings else 2
            for position in range(depth if step < count else 1):
                before, width = width, dim * step // count
                layers += [
                    nn.Conv2d(before, width, 3, stride=1 if position else stride, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
        self.convs = nn.Sequential(*layers)
        self.proj = nn.Conv2d(dim, dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        check_divides(x.shape[2], x.shape[3], self.patch_size)
        tokens: Tensor = self.proj(self.convs(channels_last(x))).flatten(2).transpose(1, 2)
        return tokens


def resample_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int = 0) -> Tensor:
    """Resample a position embedding 1 (prefix + h w) C from the grid `old` to the grid `new`; prefix rows are copied.

    Bicubic with antialiasing in float32, as in timm (`timm.layers.resample_abs_pos_embed`).
    """
    if old == new:
        return table
    head, grid = table[:, :prefix], table[:, prefix:]
    image = grid.transpose(1, 2).unflatten(2, old).float()  # 1 C h w
    image = F.interpolate(image, size=new, mode="bicubic", antialias=True)
    return torch.cat([head, image.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
