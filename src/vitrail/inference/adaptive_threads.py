"""Torch's number of threads in a long job of inference on the CPU, chosen anew when other programs use the cores.

Shapes: B batch, H W height and width, C channels.
"""

import threading
import time
import warnings
from collections.abc import Callable

import torch

from vitrail.inference.runtime import Images, Outputs
from vitrail.inference.threads import ThreadWatch, fastest_threads, timed
from vitrail.utils.device import cpu_threads

_WINDOW = 0.5  # seconds of computation after which it is known whether the cores are busy
_BUSY = 0.75  # share of the time that the calling thread runs: on free cores it waits actively, and so 1.0
_PARTS, _MIN_IMAGES = 4, 4  # the trial takes a part of a batch

Compute = Callable[[Images], Outputs]


class AdaptiveThreads:
    """Computes batches; if the cores turn out to be busy, or computation becomes slow, with fewer threads.

    Where several threads call it at the same time, one of them does so, and the others use torch's own number.
    """

    def __init__(self) -> None:
        self.most = torch.get_num_threads()
        self.threads = self.most
        self._watch = ThreadWatch(self.most, self.most)
        self._due = False  # whether a trial comes before the next batch
        self._first = True
        self._seconds, self._running = 0.0, 0.0  # of computation, and of these running, before the first trial
        self._lock = threading.Lock()

    def run(self, compute: Compute, images: Images) -> Outputs:
        """`compute(images)`, for uint8 B H W C."""
        if self.most == 1 or not self._lock.acquire(blocking=False):
            return compute(images)
        try:
            with cpu_threads(self.threads):
                if self._due:
                    self._look(compute, images)
                start, running = time.perf_counter(), time.thread_time()
                outputs = compute(images)
                self._note(time.perf_counter() - start, time.thread_time() - running, len(images))
            return outputs
        finally:
            self._lock.release()

    def _note(self, seconds: float, running: float, images: int) -> None:
        self._due = self._watch.due(seconds, images)
        self._seconds += seconds
        self._running += running
        if self._first and self._seconds >= _WINDOW:
            self._due |= self._running < _BUSY * self._seconds
            self._seconds = self._running = 0.0

    def _look(self, compute: Compute, images: Images) -> None:
        part = images[: max(_MIN_IMAGES, len(images) // _PARTS)]
        start = time.perf_counter()
        trial = fastest_threads(self.most, timed(lambda: compute(part)), 0.0)
        self._watch.looked(trial, time.perf_counter() - start)
        self._first = self._due = False
        torch.set_num_threads(trial.threads)
        if trial.threads != self.threads:
            self.threads = trial.threads
            why = f"{trial.line(len(part))}; other programs use the cores"
            warnings.warn(f"from here on with {trial.threads} of {self.most} threads: {why}", stacklevel=2)
