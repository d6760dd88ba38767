"""A batch that suits the machine: on CUDA the largest that fits into its memory, elsewhere the fastest.

The learning rate follows the batch by a rule that is known to hold over some range alone, so the batch stays within
a factor of `_FAR` of the recipe's own.
"""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vitrail.training.config.automatic import _batch_size
from vitrail.training.resources.trial import blank, expected_peak, fits, forget_step, untouched, wait_for
from vitrail.utils.memory import available_memory, peak_memory, reset_peak_memory
from vitrail.utils.text import format_bytes

if TYPE_CHECKING:
    from vitrail.training.session import Session

_FAR = 8
_MARGIN = 0.9  # of the memory, so that a later, unluckier step finds a place too
_GAIN = 1.05  # a batch must be so much faster to be worth leaving the recipe's for it
_TRIAL_SECONDS = (0.5, 5.0)  # for a rate: at least, with at least `_TRIAL_STEPS`, and at most
_TRIAL_STEPS = 3
_SEARCH_SECONDS = 30.0  # after which no further batch is tried


def fit_batch_size(session: "Session") -> tuple[int, str]:
    """A batch size for a session that has not begun and has the usual one, and the reason in a line.

    What was tried leaves no trace in the session.
    """
    usual = session.config.schedule.batch_size
    most = _batch_size(_FAR * usual, len(session.loader.split))
    device, trainer, preprocess = session.trainer.device, session.trainer, session.setup.preprocess
    limit = available_memory(device)
    with untouched(trainer):
        if device.type == "cuda":
            assert limit is not None

            def holds(size: int) -> bool:
                reset_peak_memory(device)
                return fits(trainer, blank(size, preprocess)) and (peak_memory(device) or 0) <= _MARGIN * limit

            size = largest(ladder(min(8, most), most), holds)
            return size, f"batches of {size}: the largest tried that fits into {format_bytes(limit)} with a margin"
        rates = Rates(lambda size: _images_per_second(session, size))
        size = fastest(
            usual, most, rates, lambda size: limit is None or expected_peak(trainer, preprocess, size) < _MARGIN * limit
        )
    tried = ", ".join(f"{rate:,.0f} with {tried}" for tried, rate in sorted(rates.known.items()))
    return size, f"batches of {size}: images/s {tried}"


class Rates:
    """Images a second by batch size, each measured once, and none that begins after the search's time is up."""

    def __init__(self, measure: Callable[[int], float], seconds: float = _SEARCH_SECONDS) -> None:
        self.known: dict[int, float] = {}
        self._measure = measure
        self._end = time.perf_counter() + seconds

    def __call__(self, size: int) -> float:
        if size not in self.known and (not self.known or time.perf_counter() < self._end):
            self.known[size] = self._measure(size)
        return self.known.get(size, 0.0)


def fastest(usual: int, most: int, rate: Callable[[int], float], holds: Callable[[int], bool]) -> int:
    """Climb from the usual size, by doubling or halving, for as long as that gains enough; up to `most` images."""
    best = usual
    while best > 1 and not holds(best):
        best //= 2
    for step in (2.0, 0.5):
        start = best
        while True:
            size = int(best * step)
            if not max(1, usual // _FAR) <= size <= most or not holds(size) or rate(size) < _GAIN * rate(best):
                break
            best = size
        if best != start:
            break
    return best


def ladder(low: int, high: int) -> list[int]:
    """Powers of two and the halves between them, from low to high: 8, 12, 16, 24, 32 ..."""
    powers = [2**k for k in range(high.bit_length())]
    return sorted(size for size in {*powers, *(3 * power for power in powers)} if low <= size <= high) or [high]


def largest(sizes: Sequence[int], holds: Callable[[int], bool]) -> int:
    """The largest of ascending sizes that holds, by bisection; the smallest is taken untried."""
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if holds(sizes[middle]):
            low = middle
        else:
            high = middle - 1
    return sizes[low]


def _images_per_second(session: "Session", size: int) -> float:
    """Of the fastest of some steps, the first of which does not count."""
    trainer, batch = session.trainer, blank(size, session.setup.preprocess)
    trainer.step(batch)
    wait_for(trainer.device)
    start, times = time.perf_counter(), []
    least, most = _TRIAL_SECONDS
    while True:
        begin = time.perf_counter()
        trainer.step(batch)
        wait_for(trainer.device)
        now = time.perf_counter()
        times.append(now - begin)
        if now - start >= (least if len(times) >= _TRIAL_STEPS else most):
            return size / min(times)


def memory_advice(session: "Session") -> str:
    """What to do about a batch that did not fit, for a session that is over: the parts in which it does, if any."""
    trainer, config, preprocess = session.trainer, session.config, session.setup.preprocess
    forget_step(trainer)
    limit = available_memory(trainer.device)
    size = config.schedule.batch_size
    how_much = "" if limit is None else f" ({format_bytes(limit)})"
    fault = f"a batch of {size} images does not fit into memory{how_much}"
    if session.distributed.world_size > 1:  # the other processes are elsewhere: nothing can be tried
        return f"{fault}: use accumulate=2 or more, a smaller batch_size, or grad_checkpointing=true"
    if config.machine.accumulate > 1:
        fault += f" in {config.machine.accumulate} parts"
    for parts in [2**k for k in range(1, size.bit_length() + 1)]:
        if config.machine.accumulate < parts <= size:
            trainer.config = config.updated({"accumulate": parts})
            if trainer.device.type == "cuda":
                holds = fits(trainer, blank(size, preprocess))
            else:
                holds = limit is None or expected_peak(trainer, preprocess, size) < _MARGIN * limit
            if holds:
                return (
                    f"{fault}: use accumulate={parts}, with which it fits and learns the same, a smaller batch_size, "
                    "or grad_checkpointing=true"
                )
    return f"{fault}, not even image by image: use grad_checkpointing=true, a smaller img_size or a smaller model"
