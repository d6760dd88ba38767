"""What a run will take, told before its first epoch: time, from a few real steps, and memory.

The steps are taken back (see trial.py). They are left out where they would be more than a fiftieth of the run.
"""

import math
import time
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from vitrail.data.loader import Batch
from vitrail.training.resources.trial import expected_peak, untouched, wait_for
from vitrail.utils.memory import available_memory, peak_memory, reset_peak_memory
from vitrail.utils.text import format_bytes, format_duration

if TYPE_CHECKING:
    from vitrail.training.session import Session

_STEPS = 4  # at most; the first does not count where there are others
_SHARE = 0.02  # of the run
_FORWARD = 1 / 3  # of the time of a step is the forward pass, which is all that validation does
_TIGHT = 0.9  # of the memory, from which on a run is warned of


@dataclass(frozen=True)
class Cost:
    """An estimate. seconds: of the whole run, and of a validation; epochs: how many there will be; peak, room: bytes,
    as in memory.py.
    """

    seconds: float
    validation: float
    epochs: float
    images_per_second: float
    peak: int | None
    room: int | None

    def line(self) -> str:
        memory = ""
        if self.peak is not None:
            of = "" if self.room is None else f" of {format_bytes(self.room)}"
            memory = f", {format_bytes(self.peak)}{of} memory"
        about = f"about {format_duration(self.seconds)} for {self.epochs:.3g} epochs"
        return f"cost    {about} ({self.images_per_second:,.0f} images/s){memory}"


def cost_lines(session: "Session") -> list[str]:
    """The line on what the run will cost, and a warning where its memory is tight; none for a short run.

    The session is of one process, has not begun, and is afterwards as it was.
    """
    steps = _steps_to_try(session)
    if steps < 2:
        return []
    trainer, config, limit = session.trainer, session.config, available_memory(session.trainer.device)
    with untouched(trainer):
        if trainer.device.type != "cuda" and limit is not None:
            expected = expected_peak(trainer, session.setup.preprocess, config.schedule.batch_size)
            if expected > _TIGHT * limit:
                return [_warning(expected, limit)]  # a step could bring the machine down
        cost = _measure(session, steps, limit)
    trainer.state.validation_seconds = trainer.schedule.reserve(cost.validation)
    tight = cost.peak is not None and limit is not None and cost.peak > _TIGHT * limit
    return [cost.line(), *([_warning(cost.peak or 0, limit or 0)] if tight else [])]


def _steps_to_try(session: "Session") -> int:
    """So many are at most a fiftieth of the run. Of a budget nobody knows the steps before the first is done."""
    steps = session.trainer.schedule.steps
    return _STEPS if steps is None else min(_STEPS, int(_SHARE * steps))


def _warning(expected: int, limit: int) -> str:
    return (
        f"warning: the run takes about {format_bytes(expected)} of memory, and {format_bytes(limit)} are available; "
        "accumulate=2 or more, a smaller batch_size, or grad_checkpointing=true takes less"
    )


def _measure(session: "Session", steps: int, limit: int | None) -> Cost:
    """Time some steps with real images, and add up what the whole run will take."""
    trainer, config, schedule = session.trainer, session.config, session.trainer.schedule
    reset_peak_memory(trainer.device)
    batches, load = _load(session, steps)
    learn = _learn(session, batches)
    # On the CPU, reading images and learning share its cores; beside an accelerator they go on at the same time.
    step = load + learn if trainer.device.type == "cpu" else max(load, learn)
    image = (load + learn * _FORWARD) / config.schedule.batch_size
    counts = session.setup.dataset.counts()
    validation = image * counts.get("val", 0)
    epoch = step * session.loader.steps_per_epoch
    epochs = math.inf
    if schedule.steps is not None:
        epochs = schedule.steps / session.loader.steps_per_epoch
    if schedule.budget is not None:
        epochs = min(epochs, schedule.budget / (epoch + validation / config.schedule.eval_every))
    validations = math.ceil(epochs / config.schedule.eval_every)
    test = image * counts[session.setup.dataset.eval_split()]
    seconds = epochs * epoch + validations * validation + test
    return Cost(seconds, validation, epochs, config.schedule.batch_size / step, peak_memory(trainer.device), limit)


def _load(session: "Session", steps: int) -> tuple[list[Batch], float]:
    """Some batches, and the seconds that one of them takes with nothing else to do."""
    loader, waited = session.loader, session.loader.wait_seconds
    stream, times, batches = loader.epoch(0), [time.perf_counter()], []
    for batch in islice(stream, steps):
        batches.append(batch)
        times.append(time.perf_counter())
    stream.close()  # type: ignore[attr-defined]  # a generator
    loader.wait_seconds = waited
    # Threads begin with several batches at once, so only all of them together tell. Without, the first is slower.
    skip = 0 if loader.workers or len(batches) < 2 else 1
    return batches, (times[-1] - times[skip]) / (len(batches) - skip)


def _learn(session: "Session", batches: list[Batch]) -> float:
    """Seconds of a step: the middle one of those after the first. A budget stops the trial early."""
    trainer, times = session.trainer, []
    budget = trainer.schedule.budget or math.inf
    start = time.perf_counter()
    for batch in batches:
        begin = time.perf_counter()
        trainer.step(batch)
        wait_for(trainer.device)
        times.append(time.perf_counter() - begin)
        if time.perf_counter() - start + times[-1] > _SHARE * budget:
            break
    later = sorted(times[1:] or times)
    return later[(len(later) - 1) // 2]
