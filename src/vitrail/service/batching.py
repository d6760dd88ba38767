"""Batches from concurrent requests: one thread runs the model, and what arrives meanwhile forms the next batch.

Shapes: B batch, H W height and width, C channels, K classes.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from time import perf_counter

import numpy as np
import numpy.typing as npt

from vitrail.images.convert import Pixels
from vitrail.inference.runtime import Images, Outputs

_RATE_WEIGHT = 0.2  # of the newest batch in the average time of an image


class Overloaded(Exception):
    """Too many images wait. retry_after: seconds after which they are expected to be computed."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("too many images wait")
        self.retry_after = retry_after


class Batcher:
    """Computes the logits of images that are submitted one by one.

    compute: logits B K of images B H W C. A batch has at most `max_batch` images. Its first image waits at most
    `max_delay` seconds, and only while other admitted images are being decoded, so a single client waits for nobody.
    max_queue: images that may be admitted and not yet answered. observe_batch is called with the images and seconds of
    each batch, observe_queue with the number of admitted images.
    """

    def __init__(
        self,
        compute: Callable[[Images], Outputs],
        *,
        max_batch: int,
        max_delay: float,
        max_queue: int,
        observe_batch: Callable[[int, float], None] = lambda images, seconds: None,
        observe_queue: Callable[[int], None] = lambda images: None,
    ) -> None:
        self.max_batch = max_batch
        self._compute = compute
        self._max_delay = max_delay
        self._max_queue = max_queue
        self._observe_batch = observe_batch
        self._observe_queue = observe_queue
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._queue: deque[tuple[Pixels, asyncio.Future[npt.NDArray[np.float32]]]] = deque()
        self._changed = asyncio.Event()
        self.admitted = 0  # images that are decoded, wait or are computed
        self.total = 0  # images that were ever admitted
        self._decoding = 0  # those that are not in the queue yet
        self._seconds = 0.0  # average time of an image
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start to form batches, in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._thread.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def admit(self, images: int = 1) -> Iterator[None]:
        """A place for images, to be taken before they are decoded.

        Raises:
            Overloaded: the queue is full.
        """
        if self.admitted + images > self._max_queue and self.admitted:
            raise Overloaded(max(1, math.ceil(self.admitted * self._seconds)))
        self._count(images)
        try:
            yield
        finally:
            self._count(-images)

    def _count(self, images: int) -> None:
        self.admitted += images
        self.total += max(0, images)
        self._observe_queue(self.admitted)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """While an admitted image is decoded: a batch may wait for it."""
        self._decoding += 1
        try:
            yield
        finally:
            self._decoding -= 1
            self._changed.set()

    async def submit(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """The logits K of an image H W C."""
        future: asyncio.Future[npt.NDArray[np.float32]] = asyncio.get_running_loop().create_future()
        self._queue.append((pixels, future))
        self._changed.set()
        return await future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._next_batch()
            if not batch:
                continue
            images = np.stack([pixels for pixels, _ in batch])
            start = perf_counter()
            try:
                outputs = await loop.run_in_executor(self._thread, self._compute, images)
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            seconds = perf_counter() - start
            self._seconds += _RATE_WEIGHT * (seconds / len(batch) - self._seconds)
            self._observe_batch(len(batch), seconds)
            for (_, future), row in zip(batch, outputs, strict=True):
                if not future.done():
                    future.set_result(row)

    async def _next_batch(self) -> list[tuple[Pixels, asyncio.Future[npt.NDArray[np.float32]]]]:
        while not self._queue:
            await self._wait(None)
        deadline = perf_counter() + self._max_delay
        while len(self._queue) < self.max_batch and self._decoding and (left := deadline - perf_counter()) > 0:
            await self._wait(left)
        batch = [self._queue.popleft() for _ in range(min(len(self._queue), self.max_batch))]
        return [(pixels, future) for pixels, future in batch if not future.done()]  # done: the request was cancelled

    async def _wait(self, seconds: float | None) -> None:
        self._changed.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)


def choose_max_batch(compute: Callable[[Images], Outputs], size: tuple[int, int, int], seconds: float = 0.4) -> int:
    """The batch size that the machine likes: the smallest whose time for an image is within 5 % of the best of 1, 2, 4,
    8, 16 and 32. size: H W C. seconds: larger sizes are not tried after this time."""
    times: dict[int, float] = {}
    compute(np.zeros((1, *size), np.uint8))
    begin = perf_counter()
    count = 1
    while count <= 32 and (not times or perf_counter() - begin + 2 * count * times[count // 2] < seconds):
        images = np.zeros((count, *size), np.uint8)
        compute(images)  # a runtime may prepare itself for a new shape
        start = perf_counter()
        compute(images)
        times[count] = (perf_counter() - start) / count
        count *= 2
    best = min(times.values())
    return min(count for count, time in times.items() if time <= 1.05 * best)
