"""Timing of several calls that are to be compared."""

import math
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

_WARMUP = 3


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = _WARMUP,
    budget: float = math.inf,
    rest: float = 0,
) -> dict[str, list[float]]:
    """The seconds of each call in each of the rounds, in each of which every call is made once; the order is reversed
    from one round to the next, so that a slow moment does not favour one.

    budget: seconds after which no further round is started, if there are a third of them at least. rest: seconds of
    sleep before each call, which is then made once more without being timed. Without it, threads that wait for work
    without sleeping (onnxruntime's by default) take the cores from the next call, and make it up to 30 % slower.
    """
    took: dict[str, list[float]] = {label: [] for label in calls}
    begin = time.perf_counter()
    for number in range(warmup + rounds):
        done = number - warmup
        if done >= rounds / 3 and time.perf_counter() - begin > budget:
            break
        for label in list(calls)[:: 1 if number % 2 else -1]:
            if rest:
                time.sleep(rest)
                calls[label]()
            start = time.perf_counter()
            calls[label]()
            if number >= warmup:
                took[label].append(time.perf_counter() - start)
    return took


def median_ratio(one: list[float], other: list[float]) -> float:
    """How many times as fast `other` is: the median over the rounds of their ratio."""
    return median(a / b for a, b in zip(one, other, strict=True))
