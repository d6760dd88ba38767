"""Stochastic depth, LayerScale and initialisation."""

import pytest
import torch
from torch import nn

from vitrail.layers.block import DropPath, LayerScale, drop_path_rates, init_linear


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


def test_linear_layers_are_initialised_truncated_normal() -> None:
    layer = nn.Linear(200, 300)
    init_linear(layer)
    assert layer.weight.abs().max() <= 0.04
    assert layer.weight.std().item() == pytest.approx(0.02 * 0.8796, rel=0.02)  # truncation at 2 std reduces it by 12 %
    assert (layer.bias == 0).all()
