"""What an export costs: milliseconds beside those of the model that it replaces, and bytes.

Shapes: B batch, H W height and width, C channels.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from vitrail.evaluation.timing import interleaved, median_ratio
from vitrail.inference.runtime import Images, Runtime

BATCHES = (1, 16)
_ROUNDS = 31
_SECONDS = 20.0  # for all rounds of one batch size, about
REFERENCE = "reference"

ByBatch = dict[str, float]  # by batch size, as in JSON


def measure_latency(runtimes: Mapping[str, Runtime]) -> tuple[dict[str, ByBatch], dict[str, ByBatch]]:
    """Milliseconds of a batch, and how many times as fast as `runtimes[REFERENCE]`, of each runtime by batch size.

    Cropped images to logits, in turn in one process; medians.
    """
    milliseconds: dict[str, ByBatch] = {label: {} for label in runtimes}
    speedup: dict[str, ByBatch] = {label: {} for label in runtimes}
    for size in BATCHES:
        calls = {label: partial(runtime.logits, _noise(runtime, size)) for label, runtime in runtimes.items()}
        seconds = interleaved(calls, _ROUNDS, budget=_SECONDS)
        for label, took in seconds.items():
            milliseconds[label][str(size)] = 1e3 * median(took)
            speedup[label][str(size)] = median_ratio(seconds[REFERENCE], took)
    return milliseconds, speedup


def _noise(runtime: Runtime, size: int) -> Images:
    preprocess = runtime.preprocess
    return np.random.default_rng(0).integers(0, 256, (size, *preprocess.size, preprocess.channels), np.uint8)


def count_bytes(folder: Path) -> int:
    """The size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
