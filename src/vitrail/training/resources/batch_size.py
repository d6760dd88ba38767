"""batch_size=auto: on CUDA the largest batch that fits into memory, elsewhere the one with the highest throughput.

The learning rate is scaled with the batch size, which is accurate in a limited range only, so the batch stays within a
factor of `_MAX_FACTOR` of the recipe's.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence

from vitrail.errors import DeviceError
from vitrail.images.preprocess import Preprocess
from vitrail.training.config.automatic import limit_batch_size
from vitrail.training.engine.trainer import Trainer
from vitrail.training.resources.trial import (
    blank_batch,
    estimate_peak_memory,
    fits_in_memory,
    free_step_memory,
    preserve_state,
    timed_step,
    within_memory,
)
from vitrail.utils.memory import available_memory, peak_memory, reset_peak_memory
from vitrail.utils.text import format_bytes

_MAX_FACTOR = 8
_MEMORY_FRACTION = 0.9  # of the available memory, which leaves a margin
_MIN_GAIN = 1.05  # a batch must be faster by this factor to replace a smaller or larger one
_MIN_SECONDS, _MAX_SECONDS = 0.5, 5.0  # of a measurement, which ends after the first and _MIN_STEPS, or the second
_MIN_STEPS = 3
_NOT_ONE = ", nor does a single image: use grad_checkpointing=true, a smaller img_size or a smaller model"
_SEARCH_SECONDS = 30.0  # after which no further batch size is measured


def fit_batch_size(trainer: Trainer, preprocess: Preprocess, train_images: int) -> tuple[int, str]:
    """A batch size for this device, and the reason in one line. The trainer must be new, and is left unchanged.

    Raises:
        DeviceError: on the CPU, where no batch size fits into memory.
    """
    usual, device = trainer.config.schedule.batch_size, trainer.device
    most = limit_batch_size(_MAX_FACTOR * usual, train_images)
    limit = available_memory(device)

    def fits(size: int) -> bool:
        return _fits(trainer, preprocess, size, limit)

    with preserve_state(trainer):
        if device.type == "cuda":
            size = largest(candidate_sizes(min(8, most), most), fits)
            return size, f"batch size {size}: the largest tried that fits into {format_bytes(limit or 0)} with a margin"
        rates = Rates(lambda size: _images_per_second(trainer, preprocess, size))
        size = fastest(usual, most, rates, fits)
    if not rates(size):
        raise DeviceError(f"a batch of {size} does not fit into memory{_amount(limit)}{_NOT_ONE}")
    tried = ", ".join(f"{rate:,.0f} with {tried}" for tried, rate in sorted(rates.known.items()) if rate)
    return size, f"batch size {size}: images/s {tried}"


def _fits(trainer: Trainer, preprocess: Preprocess, size: int, limit: int | None) -> bool:
    """Whether a step fits into `limit` bytes: tried on CUDA, first estimated where running out may end the process."""
    if trainer.device.type != "cuda":
        peak = within_memory(trainer, lambda: estimate_peak_memory(trainer, preprocess, size))
        return peak is not None and (limit is None or peak < _MEMORY_FRACTION * limit)
    reset_peak_memory(trainer.device)
    fits = fits_in_memory(trainer, blank_batch(size, preprocess))
    return fits and (peak_memory(trainer.device) or 0) <= _MEMORY_FRACTION * (limit or 0)


class Rates:
    """Images per second by batch size, 0 for one that does not fit into memory. Each is measured once; after `seconds`,
    and one that fits, an unmeasured size counts as 0."""

    def __init__(self, measure: Callable[[int], float], seconds: float = _SEARCH_SECONDS) -> None:
        self.known: dict[int, float] = {}
        self._measure = measure
        self._end = time.perf_counter() + seconds

    def __call__(self, size: int) -> float:
        if size not in self.known and (not any(self.known.values()) or time.perf_counter() < self._end):
            self.known[size] = self._measure(size)
        return self.known.get(size, 0.0)


def fastest(usual: int, most: int, rate: Callable[[int], float], fits: Callable[[int], bool]) -> int:
    """Double or halve the usual size as long as that is faster by `_MIN_GAIN`; at most `most`."""
    best = usual
    while best > 1 and not (fits(best) and rate(best)):
        best //= 2
    for step in (2.0, 0.5):
        start = best
        while True:
            size = int(best * step)
            in_range = max(1, usual // _MAX_FACTOR) <= size <= most
            if not in_range or not fits(size) or rate(size) < _MIN_GAIN * rate(best):
                break
            best = size
        if best != start:
            break
    return best


def candidate_sizes(low: int, high: int) -> list[int]:
    """Powers of two and 1.5 times these, from low to high: 8, 12, 16, 24, 32 ..."""
    powers = [2**k for k in range(high.bit_length())]
    return sorted(size for size in {*powers, *(3 * power for power in powers)} if low <= size <= high) or [high]


def largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The largest of ascending sizes that fits, by bisection; the smallest is assumed to fit."""
    return sizes[bisect_left(sizes, True, lo=1, key=lambda size: not fits(size)) - 1]


def _images_per_second(trainer: Trainer, preprocess: Preprocess, size: int) -> float:
    """The rate of the fastest of several steps after a warm-up step; 0 if they do not fit into memory."""

    def rate() -> float:
        batch = blank_batch(size, preprocess)
        timed_step(trainer, batch)
        times: list[float] = []
        while sum(times) < (_MIN_SECONDS if len(times) >= _MIN_STEPS else _MAX_SECONDS):
            times.append(timed_step(trainer, batch))
        return size / min(times)

    return within_memory(trainer, rate) or 0.0


def memory_advice(trainer: Trainer, preprocess: Preprocess) -> str:
    """What to do about a batch that did not fit into memory, with a value of `accumulate` that does. The trainer
    cannot be used afterwards."""
    config = trainer.config
    free_step_memory(trainer)
    limit = available_memory(trainer.device)
    size, accumulate = config.schedule.batch_size, config.machine.accumulate
    problem = f"a batch of {size} images does not fit into memory{_amount(limit)}"
    if trainer.distributed.world_size > 1:  # other processes have failed or wait: no step is possible
        return f"{problem}: use accumulate=2 or more, a smaller batch_size, or grad_checkpointing=true"
    if accumulate > 1:
        problem += f" with accumulate={accumulate}"
    batch = blank_batch(size, preprocess)
    for parts in [2**k for k in range(1, size.bit_length() + 1)]:
        if accumulate < parts <= size:
            trainer.config = config.updated({"accumulate": parts})
            if _fits(trainer, preprocess, size, limit) and fits_in_memory(trainer, batch):
                return (
                    f"{problem}: use accumulate={parts}, which fits and gives the same updates, a smaller batch_size, "
                    "or grad_checkpointing=true"
                )
    return f"{problem}{_NOT_ONE}"


def _amount(limit: int | None) -> str:
    return f" ({format_bytes(limit)})" if limit else ""
