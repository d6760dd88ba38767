"""Resampling against timm's, to 8 sizes and 3 patch sizes."""

import pytest
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed, resize_rel_pos_bias_table
from timm.models._manipulate import adapt_input_conv

from vitrail.layers.embed import resample_positions
from vitrail.weights.resample import adapt_channels, resample_bias_table, resample_patches

GRIDS = [(7, 7), (12, 12), (16, 16), (24, 24), (12, 20), (20, 12), (37, 37), (1, 30)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_positions_are_timms(grid: tuple[int, int], prefix: int) -> None:
    table = torch.randn(1, prefix + 14 * 14, 24)
    ours = resample_positions(table, (14, 14), grid, prefix)
    theirs = resample_abs_pos_embed(table, new_size=list(grid), old_size=[14, 14], num_prefix_tokens=prefix)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert torch.equal(ours[:, :prefix], table[:, :prefix])


@pytest.mark.filterwarnings("ignore:torch.searchsorted")  # in timm
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("window", [(2, 2), (6, 6), (8, 8), (12, 12), (16, 16), (24, 24), (6, 10), (12, 7)])
@pytest.mark.parametrize("old", [7, 12])
def test_bias_tables_are_timms(window: tuple[int, int], old: int) -> None:
    table = torch.randn((2 * old - 1) ** 2, 4)
    rows = (2 * window[0] - 1) * (2 * window[1] - 1)
    ours = resample_bias_table(table, (old, old), window)
    theirs = resize_rel_pos_bias_table(table, new_window_size=window, new_bias_shape=(rows, 4))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (16, 8),
        (8, 12),
        (8, 16),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in [(16, 14), (14, 16), (16, 32), (32, 16)]),
    ],
)
def test_patches_are_timms(old: int, new: int) -> None:
    kernel = torch.randn(6, 3, old, old)
    ours = resample_patches(kernel, (new, new))
    theirs = resample_patch_embed(kernel, [new, new])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_larger_patches_see_the_same_in_a_larger_image() -> None:
    kernel, patch = torch.randn(6, 3, 8, 8), torch.randn(1, 3, 8, 8)
    larger = torch.nn.functional.interpolate(patch, size=(16, 16), mode="bicubic", antialias=True)
    before = (kernel * patch).sum(dim=(1, 2, 3))
    after = (resample_patches(kernel, (16, 16)) * larger).sum(dim=(1, 2, 3))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8])
def test_channels_are_timms(channels: int) -> None:
    kernel = torch.randn(6, 3, 4, 4)
    torch.testing.assert_close(adapt_channels(kernel, channels), adapt_input_conv(channels, kernel.clone()))


def test_grey_kernels_for_colour() -> None:
    """timm refuses this one. A grey image repeated thrice must give what it gave as one channel."""
    kernel, image = torch.randn(6, 1, 4, 4), torch.randn(2, 1, 4, 4)
    grey = torch.nn.functional.conv2d(image, kernel)
    colour = torch.nn.functional.conv2d(image.expand(-1, 3, -1, -1), adapt_channels(kernel, 3))
    torch.testing.assert_close(colour, grey)


def test_half_precision_is_kept() -> None:
    assert resample_positions(torch.randn(1, 4, 8).half(), (2, 2), (3, 3)).dtype == torch.float16
    assert resample_patches(torch.randn(2, 3, 4, 4).bfloat16(), (2, 2)).dtype == torch.bfloat16
    assert resample_bias_table(torch.randn(9, 2).half(), (2, 2), (3, 3)).dtype == torch.float16
    assert adapt_channels(torch.randn(2, 3, 4, 4).half(), 1).dtype == torch.float16
