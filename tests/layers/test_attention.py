"""The fused attention against the explicit path, against PyTorch's own module, and with fewer queries."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tolerance import assert_near
from vitrail.layers.attention import Attention, attend, attention_weights


@pytest.mark.parametrize("bias", [None, "shared", "masked"])
def test_fused_attention_equals_the_explicit_weights(bias: str | None) -> None:
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    added = None if bias is None else torch.randn(1, 3, 4, 6)
    if bias == "masked":
        added[..., 4:] = float("-inf")
    weights = attention_weights(q, k, added)
    assert_near(attend(q, k, v, added), weights @ v)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 4))
    assert bias != "masked" or (weights[..., 4:] == 0).all()


def test_attention_equals_pytorchs_module() -> None:
    ours, theirs = Attention(12, 3), nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x = torch.randn(2, 5, 12)
    expected, weights = theirs(x, x, x, average_attn_weights=False)
    assert_near(ours(x), expected)
    out, ours_weights = ours.attend_with_weights(x)
    assert_near(out, expected)
    assert_near(ours_weights, weights)


@pytest.mark.parametrize("queries", [None, 1])
def test_gradients_in_bfloat16_are_pytorchs_own(queries: int | None) -> None:
    """On the CPU they are computed in float32: their error is no larger than that of PyTorch's in bfloat16."""
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (queries or 17, 17, 17))
    up = torch.randn_like(q)

    def gradients(attention: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        return [g.double() for g in torch.autograd.grad(attention(*leaves), leaves, up.to(dtype))]

    exact = gradients(F.scaled_dot_product_attention, torch.float64)
    theirs = gradients(F.scaled_dot_product_attention, torch.bfloat16)
    ours = gradients(attend, torch.bfloat16)
    for one, other, right in zip(ours, theirs, exact, strict=True):
        assert (one - right).norm() <= 1.05 * (other - right).norm()
        assert (one - right).norm() < 0.02 * right.norm()
    leaf = q.bfloat16().requires_grad_()
    assert "AttendInBf16" in type(attend(leaf, leaf, leaf).grad_fn).__name__
    with torch.no_grad():
        assert torch.equal(attend(leaf, leaf, leaf), F.scaled_dot_product_attention(leaf, leaf, leaf))


@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_fewer_queries_give_the_first_rows_of_all(queries: int, qkv_bias: bool) -> None:
    attention = Attention(12, 3, qkv_bias)
    x = torch.randn(2, 5, 12)
    assert_near(attention(x, queries), attention(x)[:, :queries])


def test_dropout_only_in_training() -> None:
    attention = Attention(12, 3, attn_drop=0.5)
    x = torch.randn(2, 5, 12)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert_near(attention(x), attention.attend_with_weights(x)[0])


def test_width_must_be_a_multiple_of_num_heads() -> None:
    with pytest.raises(ValueError, match=r"10 .*num_heads=3"):
        Attention(10, 3)
