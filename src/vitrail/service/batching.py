"""Batches from concurrent requests: what arrives while the model computes forms the next batch.

Shapes: B batch, H W height and width, C channels, K classes.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from time import perf_counter

import numpy as np
import numpy.typing as npt

from vitrail.images.convert import Pixels
from vitrail.inference.runtime import Images, Outputs

Waiting = tuple[Pixels, asyncio.Future[npt.NDArray[np.float32]]]  # an image, and what its request waits for

_RATE_WEIGHT = 0.2  # of the newest batch in the average time of an image
_TRIAL = 0.4  # seconds of trials of batch sizes, about


class Overloaded(Exception):
    """Too many images wait. retry_after: seconds after which they are expected to be computed."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("too many images wait")
        self.retry_after = retry_after


class Batcher:
    """Computes the logits of images that are submitted one by one.

    compute: logits B K of images B H W C. A batch has at most `max_batch` images. Its first image waits at most
    `max_delay` seconds, and only while other admitted images are being decoded, so a single client waits for nobody.
    parallel: batches that may be computed at the same time; while one is, another is begun only if it is full.
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
        parallel: int = 1,
        observe_batch: Callable[[int, float], None] = lambda images, seconds: None,
        observe_queue: Callable[[int], None] = lambda images: None,
    ) -> None:
        self.max_batch = max_batch
        self._compute = compute
        self._max_delay = max_delay
        self._max_queue = max_queue
        self._observe_batch = observe_batch
        self._observe_queue = observe_queue
        self._parallel = parallel
        self._threads = ThreadPoolExecutor(parallel, thread_name_prefix="model")
        self._queue: deque[Waiting] = deque()
        self._changed = asyncio.Event()
        self.admitted = 0  # images that are decoded, wait or are computed
        self.total = 0  # images that were ever admitted
        self._decoding = 0  # those that are not in the queue yet
        self._seconds = 0.0  # average time of an image
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._batches: set[asyncio.Task[None]] = set()  # that are being computed

    def start(self) -> None:
        """Start to form batches, in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        self._stopping = True
        tasks = [*self._batches, *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

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
        while not self._stopping:
            if batch := await self._next_batch():
                task = asyncio.create_task(self._answer(batch))
                self._batches.add(task)
                task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._batches.discard(task)
        self._changed.set()

    async def _answer(self, batch: list[Waiting]) -> None:
        try:
            images = np.stack([pixels for pixels, _ in batch])
            start = perf_counter()
            outputs = await asyncio.get_running_loop().run_in_executor(self._threads, self._compute, images)
            seconds = perf_counter() - start
            self._seconds += _RATE_WEIGHT * (seconds / len(batch) / len(self._batches) - self._seconds)
            self._observe_batch(len(batch), seconds)
            if len(outputs) != len(batch):
                raise RuntimeError(f"{len(outputs)} outputs of {len(batch)} images")
        except BaseException as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error) if isinstance(error, Exception) else future.cancel()
            if not isinstance(error, Exception):
                raise
            return
        for (_, future), row in zip(batch, outputs, strict=True):
            if not future.done():
                future.set_result(row)

    async def _next_batch(self) -> list[Waiting]:
        while not self._may_start():
            await self._wait(None)
        deadline = perf_counter() + self._max_delay
        while len(self._queue) < self.max_batch and self._decoding and (left := deadline - perf_counter()) > 0:
            await self._wait(left)
        batch = [self._queue.popleft() for _ in range(min(len(self._queue), self.max_batch))]
        return [(pixels, future) for pixels, future in batch if not future.done()]  # done: the request was cancelled

    def _may_start(self) -> bool:
        full = len(self._queue) >= self.max_batch
        return bool(self._queue) and (not self._batches or (full and len(self._batches) < self._parallel))

    async def _wait(self, seconds: float | None) -> None:
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):  # not wait_for, which may lose a cancellation (Python 3.11)
                await self._changed.wait()


def choose_batch(compute: Callable[[Images], Outputs], size: tuple[int, int, int], at_once: int = 1) -> int:
    """The batch size that the machine likes.

    It is the smallest of 1, 2, 4, 8, 16 and 32 whose time for an image is within 5 % of the best. What would take more
    than about _TRIAL seconds is not tried. size: H W C. at_once: batches that are computed at the same time.
    """
    times: dict[int, float] = {}
    with ThreadPoolExecutor(at_once) as pool:

        def trial(count: int) -> None:
            list(pool.map(compute, [np.zeros((count, *size), np.uint8)] * at_once))

        trial(1)
        begin, count = perf_counter(), 1
        while count <= 32 and (not times or perf_counter() - begin + 3 * count * times[count // 2] < _TRIAL):
            trial(count)  # a runtime may prepare itself for a new shape
            times[count] = min(_seconds(partial(trial, count)) for _ in range(2)) / count
            count *= 2
    return min(count for count, time in times.items() if time <= 1.05 * min(times.values()))


def _seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start
