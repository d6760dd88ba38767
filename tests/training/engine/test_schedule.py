"""The learning rate's schedule, against timm's and by hand."""

import math

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from vitrail.training.engine.schedule import Schedule, cosine


def test_equals_timm() -> None:
    """timm's warm-up starts from a rate of its own and counts from 0; ours takes one equal step more, and no zero."""
    steps, warmup, floor = 50, 9, 0.1
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    timm = CosineLRScheduler(
        optimizer, t_initial=steps - warmup, lr_min=floor, warmup_t=warmup, warmup_prefix=True, warmup_lr_init=0.1
    )
    ours = Schedule(steps, warmup, floor)
    for step in range(steps):
        timm.step(step)
        assert ours.factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12), step


def test_ends() -> None:
    schedule = Schedule(100, 4)
    assert schedule.factor(0) == 1 / 5
    assert schedule.factor(4) == 1
    assert 0 < schedule.factor(99) < 1e-3
    assert [schedule.finished(step, 1e9) for step in (99, 100)] == [False, True]
    assert Schedule(0).finished(0, 0.0)
    assert Schedule(1).factor(0) == 1


def test_a_budget_squeezes_the_schedule() -> None:
    schedule = Schedule(None, warmup=10, floor=0.2, budget=60.0)
    assert not schedule.finished(10**6, 59.9)
    assert schedule.finished(3, 60.0)
    assert schedule.progress(500, 30.0) == 0.5
    assert schedule.factor(500, 30.0) == pytest.approx(0.6)
    # Slow steps: the warm-up is over after a tenth of the time, however few steps that was.
    assert schedule.factor(1, 6.0) == pytest.approx(cosine(0.1, 0.2))
    assert schedule.factor(1, 3.0) == pytest.approx(0.5 * cosine(0.05, 0.2))
    assert schedule.factor(500, 60.0) == pytest.approx(0.2)


def test_the_first_of_steps_and_budget_ends_it() -> None:
    schedule = Schedule(100, budget=60.0)
    assert schedule.progress(50, 6.0) == 0.5
    assert schedule.progress(5, 30.0) == 0.5
    assert schedule.finished(100, 1.0)
    assert schedule.finished(1, 60.0)
    with pytest.raises(ValueError, match="needs a budget"):
        Schedule(None)


def test_cosine_by_hand() -> None:
    assert [cosine(p) for p in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert cosine(0.25) == pytest.approx((1 + math.sqrt(0.5)) / 2)
