"""Stochastic depth, LayerScale, initialisation, and the block with fewer queries."""

from functools import partial

import pytest
import timm.models.vision_transformer as timm_vit
import torch
from torch import nn

from tolerance import assert_near
from vitrail.layers.block import Block, DropPath, LayerScale, drop_path_rates, init_linear


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    layer = DropPath(0.3)
    x = torch.rand(20_000, 2, 3) + 1
    out = layer(x)
    kept = (out != 0).flatten(1)
    assert (kept.all(1) | ~kept.any(1)).all()  # all of a sample or nothing
    assert kept[:, 0].float().mean() == pytest.approx(0.7, abs=0.015)
    torch.testing.assert_close(out[kept[:, 0]], x[kept[:, 0]] / 0.7)
    torch.testing.assert_close(out.mean(0), x.mean(0), rtol=0.03, atol=0)


def test_drop_path_is_the_identity_in_inference_and_at_rate_0() -> None:
    x = torch.randn(4, 2)
    assert DropPath(0.9).eval()(x) is x
    assert DropPath(0.0)(x) is x


def test_drop_path_keeps_half_precision() -> None:
    assert DropPath(0.5)(torch.ones(4, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_drop_path_rate_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="drop path rate"):
        DropPath(rate)


def test_drop_path_rates_grow_linearly() -> None:
    assert drop_path_rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1) == [0]


def test_layer_scale_multiplies_each_channel() -> None:
    layer = LayerScale(3, 0.5)
    layer.gamma.data = torch.tensor([1.0, 2.0, 0.0])
    assert torch.equal(layer(torch.ones(2, 4, 3)), torch.tensor([1.0, 2.0, 0.0]).expand(2, 4, 3))


@pytest.mark.parametrize("init_values", [None, 0.3])
def test_block_is_timms(init_values: float | None) -> None:
    ours = Block(12, 3, mlp_ratio=2.5, init_values=init_values)
    theirs = timm_vit.Block(
        12, 3, mlp_ratio=2.5, qkv_bias=True, init_values=init_values, norm_layer=partial(nn.LayerNorm, eps=1e-6)
    )
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 12)
    assert_near(ours(x), theirs(x))


def test_a_block_with_fewer_queries_is_exact_in_its_gradients_too() -> None:
    block = Block(12, 3, init_values=0.3).double()
    x = torch.randn(2, 5, 12, dtype=torch.double, requires_grad=True)
    inputs = [x, *block.parameters()]
    full, pruned = block(x)[:, :2], block(x, 2)
    torch.testing.assert_close(pruned, full)
    target = torch.randn_like(full)
    for ours, expected in zip(
        torch.autograd.grad((pruned * target).sum(), inputs),
        torch.autograd.grad((full * target).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)


def test_linear_layers_are_initialised_truncated_normal() -> None:
    layer = nn.Linear(200, 300)
    init_linear(layer)
    assert layer.weight.abs().max() <= 0.04
    assert layer.weight.std().item() == pytest.approx(0.02 * 0.8796, rel=0.02)  # truncation at 2 std reduces it by 12 %
    assert (layer.bias == 0).all()
