"""Learning rate range test: the training loss of a few steps at growing learning rates, a plot and a suggestion.

Smith, "Cyclical Learning Rates for Training Neural Networks", 2015 (https://arxiv.org/abs/1506.01186), section 3.3,
with rates that grow exponentially.
"""

import math
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.data.loader import Batch
from vitrail.errors import ConfigError, RunError
from vitrail.reports.charts import Series, line_chart, standalone
from vitrail.training.engine.schedule import Schedule
from vitrail.training.resources.trial import preserve_state
from vitrail.training.session import Session
from vitrail.utils.device import compiling
from vitrail.utils.files import atomic_write_text, user_path

_STEPS = 100
_LOWEST, _HIGHEST = 1e-7, 10.0
_DIVERGED = 4.0  # times the lowest loss: the test ends
_REACH = 3  # steps on each side over which the loss is averaged
_BELOW = 10.0  # the suggestion is the rate with the lowest loss divided by this, as in fastai's `minimum`


@dataclass(frozen=True)
class RangeTest:
    """Rates, the loss of each step before its update, averaged over its neighbours, and the suggested rate."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggestion: float


@dataclass(frozen=True)
class _Growing(Schedule):
    """Factors of the peak learning rate `peak` that grow from step to step."""

    peak: float = 1.0

    def factor(self, step: int, seconds: float = 0.0) -> float:
        grown: float = _LOWEST * (_HIGHEST / _LOWEST) ** (step / (_STEPS - 1))
        return grown / self.peak


def check_plot(path: str | Path | None) -> Path:
    """The file of the plot. Raises ConfigError if it is not an SVG."""
    found = user_path(path or "")
    if found.suffix.lower() != ".svg":
        raise ConfigError(f"--lr-find {path}: the file name must end in .svg")
    return found


def draw_range_test(session: Session, path: str | Path | None) -> tuple[str, dict[str, Any]]:
    """Make a range test and its plot. Returns a line with the suggestion, and the test as plain JSON."""
    with compiling():
        test = find_lr(session)
    title = f"{session.config.model.model} on {session.setup.dataset.name}, {session.config.optimizer.optimizer}"
    return write_plot(test, check_plot(path), title), asdict(test)


def find_lr(session: Session) -> RangeTest:
    """Test a new session, which is left as it was. The rate is that of the group with the largest.

    Raises:
        RunError: the loss is not finite at the lowest rates.
    """
    trainer, rates, losses = session.trainer, list[float](), list[float]()
    schedule, peak = trainer.schedule, max(float(group["peak_lr"]) for group in trainer.groups)
    with preserve_state(trainer), closing(_batches(session)) as batches:
        trainer.schedule = _Growing(steps=_STEPS, peak=peak)
        try:
            for batch, _ in zip(batches, range(_STEPS), strict=False):
                before = float(trainer.loss_sum)
                trainer.step(batch)
                trainer.guard.flush()
                if trainer.state.consecutive_bad_steps:
                    break
                rates.append(trainer.lr)
                losses.append((float(trainer.loss_sum) - before) / len(batch))
                if np.mean(losses[-_REACH:]) > _DIVERGED * min(losses):
                    break
        finally:
            trainer.schedule = schedule
    if len(losses) <= 2 * _REACH:
        raise RunError("the loss is not finite at the lowest learning rates: check weights and images")
    smooth = smoothed(losses)
    return RangeTest(tuple(rates), tuple(smooth), suggest(rates, smooth))


def _batches(session: Session) -> Generator[Batch]:
    """Training batches without end."""
    for epoch in count():
        with closing(session.loader.epoch(epoch)) as batches:  # type: ignore[type-var]  # a generator
            yield from batches


def smoothed(losses: Sequence[float]) -> list[float]:
    """Each with the mean over its neighbours."""
    return [float(np.mean(losses[max(0, i - _REACH) : i + _REACH + 1])) for i in range(len(losses))]


def suggest(rates: Sequence[float], losses: Sequence[float]) -> float:
    """A tenth of the rate with the lowest loss, to two significant digits."""
    return float(f"{rates[int(np.argmin(losses))] / _BELOW:.1e}")


def write_plot(test: RangeTest, path: Path, title: str) -> str:
    """Write the plot, and return a line with the suggestion."""
    points = [(math.log10(rate), loss) for rate, loss in zip(test.rates, test.losses, strict=True)]
    chart = line_chart(
        [Series("training loss", points)],
        title=title,
        x_label="log10 of the learning rate",
        y_label="training loss",
        mark=(math.log10(test.suggestion), f"lr={test.suggestion:g}"),
    )
    atomic_write_text(path, standalone(chart))
    return (
        f"suggested: lr={test.suggestion:g}, a tenth of the rate with the lowest loss of {len(test.rates)} steps from "
        f"{test.rates[0]:.0e} to {test.rates[-1]:.0e}; wrote the plot to {path}; no training was done"
    )
