"""The average of weights, against timm's and by hand."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from vitrail.training.engine.ema import Ema


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))


def wander(net: nn.Module) -> None:
    """Change weights, statistics and counters, as training does."""
    net.train()(torch.randn(4, 1, 4, 4))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_equals_timm() -> None:
    net = model()
    ours, theirs = Ema(net, 0.9, warmup=False), ModelEmaV3(net, decay=0.9)
    for step in range(5):
        wander(net)
        ours.update(step)
        theirs.update(net)
    for name, value in theirs.module.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, msg=name)


def test_warmup_by_hand() -> None:
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 1.0)
    ema = Ema(net, 0.5)
    nn.init.constant_(net.weight, 11.0)
    ema.update(0)  # decay 1/10
    assert ema.model.weight.item() == pytest.approx(0.1 * 1 + 0.9 * 11)
    assert [ema.decay_at(step) for step in (0, 8, 100)] == [0.1, 0.5, 0.5]


def test_the_model_itself_is_not_touched() -> None:
    net = model()
    ema = Ema(net, 0.9)
    before = copy.deepcopy(net.state_dict())
    ema.update(3)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    assert not ema.model.training
