"""Windows: partition, relative positions, shift, masks; and the fused attention against the explicit path."""

import pytest
import timm.models.swin_transformer as timm_swin
import torch

from tolerance import assert_near
from vitrail.layers import window as window_module
from vitrail.layers.window import (
    WindowAttention,
    Windows,
    plan_windows,
    relative_position_index,
)

CPU = torch.device("cpu")
# size of the feature map, window, shifted: whole windows, padding, maps smaller than the window, one row
CASES = [
    ((8, 8), (4, 4), False),
    ((8, 12), (4, 4), True),
    ((9, 6), (4, 4), False),
    ((9, 6), (4, 4), True),
    ((5, 7), (3, 2), True),
    ((3, 9), (4, 4), True),
    ((2, 3), (4, 4), True),
    ((1, 9), (4, 4), True),
]


@pytest.mark.parametrize("window", [(7, 7), (3, 5), (1, 4)])
def test_relative_position_index_is_timms(window: tuple[int, int]) -> None:
    assert torch.equal(relative_position_index(window), timm_swin.get_relative_position_index(*window))


@pytest.mark.parametrize(("size", "window", "shifted"), CASES)
def test_partition_is_pad_then_roll_then_windows(size: tuple[int, int], window: tuple[int, int], shifted: bool) -> None:
    plan = plan_windows(size, window, shifted, CPU)
    x = torch.randn(2, *size, 3)
    bottom, right = -size[0] % plan.window[0], -size[1] % plan.window[1]
    padded = torch.nn.functional.pad(x, (0, 0, 0, right, 0, bottom), value=float("nan"))
    rolled = padded.roll((-plan.shift[0], -plan.shift[1]), (1, 2))
    expected = timm_swin.window_partition(rolled, plan.window).flatten(1, 2)
    cut = plan.partition(x)
    assert cut.shape == expected.shape
    assert torch.equal(cut[~expected.isnan()], expected[~expected.isnan()])
    assert torch.equal(plan.reverse(cut, 2), x)


def allowed_pairs(plan: Windows) -> set[tuple[int, int]]:
    """Pairs of tokens (row by row) that may attend to each other, read from the plan."""
    n = plan.window[0] * plan.window[1]
    places = {int(place): token for token, place in enumerate(plan.inverse)}
    pairs = set()
    for start in range(0, len(plan.gather), n):
        for i in range(n):
            for j in range(n):
                if plan.mask is None or plan.mask[start // n, i, j] == 0:
                    pairs.add((places.get(start + i, -1), places.get(start + j, -1)))
    return pairs


@pytest.mark.parametrize(("size", "window", "shifted"), CASES)
def test_no_token_attends_across_an_edge_or_to_padding(
    size: tuple[int, int], window: tuple[int, int], shifted: bool
) -> None:
    """Against the definition: windows on an infinite grid, moved by the shift, and cut off at the image edges."""
    shift = [w // 2 if shifted and s > w else 0 for s, w in zip(size, window, strict=True)]
    window_of = {
        (row, column): ((row - shift[0]) // window[0], (column - shift[1]) // window[1])
        for row in range(size[0])
        for column in range(size[1])
    }
    tokens = list(window_of)  # row by row
    expected = {(i, j) for i, a in enumerate(tokens) for j, b in enumerate(tokens) if window_of[a] == window_of[b]}
    pairs = allowed_pairs(plan_windows(size, window, shifted, CPU))
    assert {pair for pair in pairs if pair[0] >= 0} == expected


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("size", "window", "shifted"), CASES)
def test_fused_attention_equals_the_explicit_path(
    size: tuple[int, int], window: tuple[int, int], shifted: bool, training: bool
) -> None:
    attention = WindowAttention(12, 3, window).train(training)
    torch.nn.init.normal_(attention.relative_position_bias_table)
    plan = plan_windows(size, window, shifted, CPU)
    x = torch.randn(2, *size, 12)
    with torch.set_grad_enabled(training):  # with gradients, another path runs on the CPU
        fused = attention(x, plan)
    twin, weights = attention.forward_with_weights(plan.partition(x), plan)
    assert_near(fused, plan.reverse(twin, 2))
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    if plan.mask is not None:
        forbidden = plan.mask.isinf().repeat(2, 1, 1)[:, None].expand_as(weights)
        assert forbidden.any()
        assert (weights[forbidden] == 0).all()


@pytest.mark.parametrize(("size", "window", "shifted"), CASES)
def test_gradients_equal_those_of_the_explicit_path(
    size: tuple[int, int], window: tuple[int, int], shifted: bool
) -> None:
    attention = WindowAttention(12, 3, window).double()
    plan = plan_windows(size, window, shifted, CPU)
    x = torch.randn(2, *size, 12, dtype=torch.double, requires_grad=True)
    target = torch.randn(2, *size, 12, dtype=torch.double)
    inputs = [x, *attention.parameters()]
    fused = torch.autograd.grad((attention(x, plan) * target).sum(), inputs)
    twin = torch.autograd.grad(
        (plan.reverse(attention.forward_with_weights(plan.partition(x), plan)[0], 2) * target).sum(), inputs
    )
    for ours, expected in zip(fused, twin, strict=True):
        torch.testing.assert_close(ours, expected)


def test_gradients_in_bfloat16_equal_those_of_the_explicit_path() -> None:
    attention = WindowAttention(12, 3, (4, 4))
    plan = plan_windows((9, 6), (4, 4), True, CPU)
    x = torch.randn(2, 9, 6, 12, requires_grad=True)
    target = torch.randn(2, 9, 6, 12)
    inputs = [x, *attention.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        fused = attention(x, plan)
    assert fused.dtype is torch.bfloat16
    fused = torch.autograd.grad((fused * target).sum(), inputs)
    twin = torch.autograd.grad(
        (plan.reverse(attention.forward_with_weights(plan.partition(x), plan)[0], 2) * target).sum(), inputs
    )
    for ours, expected in zip(fused, twin, strict=True):
        assert ours.dtype is torch.float32
        assert (ours - expected).norm() < 0.02 * expected.norm()


def test_attention_dropout_drops_weights_in_training_alone() -> None:
    attention = WindowAttention(8, 2, (2, 2), attn_drop=0.5)
    plan = plan_windows((4, 4), (2, 2), True, CPU)
    x = torch.randn(1, 4, 4, 8)
    assert not torch.equal(attention(x, plan), attention(x, plan))
    attention.eval()
    twin = attention.forward_with_weights(plan.partition(x), plan)[0]
    torch.testing.assert_close(attention(x, plan), plan.reverse(twin, 1))


def test_windows_are_cached_by_size_and_usable_in_training_after_inference() -> None:
    window_module._plans.clear()
    with torch.inference_mode():
        plan = plan_windows((9, 6), (4, 4), True, CPU)
    assert plan_windows((9, 6), (4, 4), True, CPU) is plan
    assert not plan.gather.is_inference()
    attention = WindowAttention(8, 2, (4, 4))
    attention(torch.randn(1, 9, 6, 8), plan).sum().backward()


def test_width_must_be_a_multiple_of_num_heads() -> None:
    with pytest.raises(ValueError, match=r"10 .*num_heads=3"):
        WindowAttention(10, 3, (2, 2))
