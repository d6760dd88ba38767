"""Patch embedding by convolution and by matrix product, the convolutional stem, and resampled positions."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import nn

from tolerance import assert_near
from vitrail.errors import ModelError
from vitrail.layers.embed import ConvStem, PatchConv, PatchEmbed, resample_positions


@pytest.mark.parametrize(("size", "patch"), [((8, 8), 4), ((6, 9), 3), ((28, 14), 14)])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_convolution_equals_a_matrix_product_for_each_patch(size: tuple[int, int], patch: int, in_chans: int) -> None:
    embed = PatchEmbed(patch, in_chans, 5)
    torch.nn.init.normal_(embed.proj.bias)
    x = torch.randn(2, in_chans, *size)
    expected = F.unfold(x, patch, stride=patch).transpose(1, 2) @ embed.proj.weight.flatten(1).t() + embed.proj.bias
    assert_near(embed(x), expected)
    assert_near(embed.proj.as_linear(x).flatten(2).transpose(1, 2), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(224, 224), (32, 60)])  # 60: not a multiple
def test_the_convolution_of_patches_on_a_gpu(size: tuple[int, int]) -> None:
    conv = PatchConv(3, 96, kernel_size=16, stride=16)
    x = torch.randn(2, 3, *size)
    expected = conv(x)
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert_near(conv.cuda()(x.cuda()).cpu(), expected)


def test_patches_are_in_row_major_order() -> None:
    image = torch.arange(24.0).view(1, 1, 4, 6)
    expected = [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11], [12, 13, 18, 19], [14, 15, 20, 21], [16, 17, 22, 23]]
    embed = PatchEmbed(2, 1, 4)
    torch.nn.init.zeros_(embed.proj.bias)
    embed.proj.weight.data.copy_(torch.eye(4).view(4, 1, 2, 2))
    assert embed(image)[0].tolist() == expected


@pytest.mark.parametrize("size", [(9, 8), (8, 9), (3, 8)])
@pytest.mark.parametrize("embed", [PatchEmbed, ConvStem])
def test_image_size_must_be_a_multiple_of_the_patch_size(
    embed: type[PatchEmbed | ConvStem], size: tuple[int, int]
) -> None:
    with pytest.raises(ModelError, match=f"{size[0]}x{size[1]} .*patch size 4.* (8x8|4x8)$"):
        embed(4, 3, 8)(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_stem_returns_one_token_per_patch(patch: int) -> None:
    stem = ConvStem(patch, 1, 16).eval()
    assert stem(torch.randn(2, 1, 16, 24)).shape == (2, 16 * 24 // patch**2, 16)


def test_a_deeper_stem_has_more_convolutions_at_each_size_but_the_last() -> None:
    convolutions = [m for m in ConvStem(8, 1, 24, depth=2).modules() if isinstance(m, nn.Conv2d)]
    assert [(c.out_channels, c.stride[0]) for c in convolutions] == [(8, 2), (8, 1), (16, 2), (16, 1), (24, 2), (24, 1)]


@pytest.mark.parametrize("patch", [1, 3, 6])
def test_a_stem_needs_a_power_of_two(patch: int) -> None:
    with pytest.raises(ValueError, match="2, 4, 8"):
        ConvStem(patch, 3, 16)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("new", [(7, 7), (3, 9), (2, 2)])
def test_positions_are_resampled_as_in_timm(new: tuple[int, int], prefix: int) -> None:
    table = torch.randn(1, prefix + 4 * 5, 6)
    expected = resample_abs_pos_embed(table, list(new), [4, 5], num_prefix_tokens=prefix)
    torch.testing.assert_close(resample_positions(table, (4, 5), new, prefix), expected)


def test_positions_of_the_same_grid_are_unchanged() -> None:
    table = torch.randn(1, 21, 6)
    assert resample_positions(table, (4, 5), (4, 5), 1) is table
