"""How many threads a runtime computes with, and with how many it computes fastest. Importing this imports no torch.

Other programs may use the same cores. An operation on several threads waits for the last of them. Where another program
has one of the cores, that is after each of its turns, and fewer threads are faster, often many times.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vitrail.utils.text import format_speed

_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_MIN_GAIN = 1.1  # fewer threads must be faster by this factor
_CLEAR_GAIN, _CLEAR_LOSS = 1.5, 0.85  # of speed by fewer threads, after which no further round is needed
_ROUNDS = 3

_WINDOW_SECONDS, _WINDOW_COUNT = 1.5, 4  # of computation, at least, from which its speed is taken
_SLOWER = 2.0  # a window this many times slower than the fastest one is a reason to look again
_MAX_COST = 0.05  # share of the time that looking may take
_PATIENCE = 30.0  # seconds with fewer threads than possible, after which more are tried; doubled each time


def default_threads() -> int:
    """OMP_NUM_THREADS, as for torch; else the physical cores that this process may use.

    Runtimes count the cores of the machine, also where a container has a few of them.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted):
        return int(wanted)
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})


def _siblings(cpu: int) -> str:
    """The logical CPUs of one core, the same text for each of them."""
    try:
        return Path(_TOPOLOGY.format(cpu)).read_text()
    except OSError:
        return str(cpu)


@dataclass(frozen=True)
class Trial:
    """threads: the fastest. seconds: what the trial work took, by number of threads."""

    threads: int
    seconds: Mapping[int, float]

    def line(self, images: int) -> str:
        """The images per second with each number; images: of the trial work."""
        found = sorted(self.seconds.items())
        return ", ".join(f"{format_speed(images / seconds)} images/s with {threads}" for threads, seconds in found)


def fewer(threads: int) -> int:
    """The next smaller number to try: 16, 12, 8, 6, 4, 3, 2, 1."""
    power = 1 << (threads.bit_length() - 1)
    return max(1, max(size for size in (power, power * 3 // 2, power * 3 // 4) if size < threads or size == 1))


def fastest_threads(most: int, seconds: Callable[[int], float], limit: float = float("inf")) -> Trial:
    """Try `most` threads and fewer, as long as fewer are faster.

    seconds: makes the trial work with so many threads, and returns the time that it took. limit: seconds after which
    each number has no more than one turn.
    """
    seconds(fewer(most))  # a warm-up
    best, means, end = most, dict[int, float](), time.perf_counter() + limit
    while best > 1:
        less = fewer(best)
        times: dict[int, list[float]] = {best: [], less: []}
        for _ in range(_ROUNDS):  # in turns, as the load changes
            for threads, found in times.items():
                found.append(seconds(threads))
            gain = sum(times[best]) / sum(times[less])
            if gain >= _CLEAR_GAIN or gain <= _CLEAR_LOSS or time.perf_counter() > end:
                break
        means |= {threads: sum(found) / len(found) for threads, found in times.items()}
        if gain < _MIN_GAIN:
            break
        best = less
    return Trial(best, means)


def timed(work: Callable[[], object]) -> Callable[[int], float]:
    """For `fastest_threads`: a function that does the work with so many of torch's threads. The number stays set."""
    import torch  # not needed by exports

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return seconds


class ThreadWatch:
    """Decides when to look for a faster number of threads: when computation takes twice as long as before; and, while
    fewer than `most` threads are used, every so often.
    """

    def __init__(self, threads: int, most: int) -> None:
        self.most = most
        self._threads = threads
        self._patience = _PATIENCE
        self._cost = 0.0  # seconds of the last trial
        self._since = 0.0  # seconds of computation since then
        self._fastest = float("inf")  # seconds for an amount of 1 in the fastest window
        self._window = (0.0, 0.0, 0)  # seconds, amount and calls

    def due(self, seconds: float, amount: float = 1.0) -> bool:
        """Whether to look now, after `seconds` of computation on an `amount` of images or steps."""
        if self.most == 1:
            return False
        self._since += seconds
        self._window = (self._window[0] + seconds, self._window[1] + amount, self._window[2] + 1)
        total, done, count = self._window
        if total < _WINDOW_SECONDS or count < _WINDOW_COUNT:
            return False
        pace, self._window = total / done, (0.0, 0.0, 0)
        slower = pace >= _SLOWER * self._fastest
        self._fastest = min(pace, self._fastest)
        waited = self._threads < self.most and self._since >= self._patience
        return (slower or waited) and self._since * _MAX_COST >= self._cost

    def looked(self, trial: Trial, cost: float) -> None:
        """Note the result of a trial that took `cost` seconds."""
        same = trial.threads == self._threads
        self._patience = 2 * self._patience if same else _PATIENCE
        self._threads, self._cost, self._since = trial.threads, cost, 0.0
        self._fastest, self._window = float("inf"), (0.0, 0.0, 0)
