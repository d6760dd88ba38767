"""The inference engine: decodes images ahead on threads, batches them and runs a runtime; results keep the order.

predict, embed, evaluate, linear probes and training's validation all use it. A batch is the next `batch_size` readable
images, so the same images give the same batches and the same outputs in all of them.
Shapes: N images, B batch, H W height and width, C channels, K classes, F features.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from vitrail.data.dataset import ArraySplit, Split
from vitrail.errors import ConfigError, DataError
from vitrail.images.convert import Pixels
from vitrail.images.decode import BadImage, one_image
from vitrail.images.limits import computing
from vitrail.images.preprocess import Preprocess
from vitrail.images.reader import Input, Inputs, NoImages, crop, expand
from vitrail.inference.runtime import Outputs, Runtime

if TYPE_CHECKING:
    from vitrail.data.cache.readers import ReadImage

T = TypeVar("T")
R = TypeVar("R")

_MAX_MEMORY = 256 << 20  # bytes of an array's crops that are kept in memory, at most
_CHUNKS = 4  # tasks per thread and batch
NOT_FINITE = "gives an output that is not finite (NaN or infinity)"


@dataclass(frozen=True)
class BatchResult(Generic[T]):
    """Consecutive items and the model's outputs for them.

    outputs: float32 B K logits or B F features, a row for each item without an error. errors: why an item could not be
    read, or NOT_FINITE, or None, for each item. wait_seconds: how long the model waited for data.
    """

    items: list[T]
    errors: list[str | None]
    outputs: Outputs
    wait_seconds: float

    @property
    def readable(self) -> list[T]:
        """The items of the rows of `outputs`."""
        return [item for item, error in zip(self.items, self.errors, strict=True) if error is None]


class Engine:
    """Runs images through a runtime. It keeps no state between calls; several threads may use one engine."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def stream(
        self, inputs: Inputs, batch_size: int | None = None, *, features: bool = False
    ) -> Iterator[BatchResult[Input | NoImages]]:
        """Paths, folders, patterns, Pillow images, uint8 arrays or tensors, as in `images/reader.py`."""
        read = partial(crop, preprocess=self.runtime.preprocess)
        return self.run(expand(inputs, self.runtime.preprocess.channels), read, batch_size, features=features)

    def run(
        self,
        items: Iterable[T],
        read: Callable[[T], Pixels],
        batch_size: int | None = None,
        workers: int | None = None,
        *,
        features: bool = False,
    ) -> Generator[BatchResult[T]]:
        """Batches of results, in the order of `items`.

        read: an item to uint8 H W C, or BadImage. batch_size: None for the runtime's default. workers: threads that
        read ahead; 0 reads in the caller's, None uses one per core.
        """
        size = self.runtime.default_batch_size if batch_size is None else batch_size
        if size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {size}")
        compute = computing()(self.runtime.features if features else self.runtime.logits)
        width = self.runtime.num_features if features else self.runtime.num_classes
        with closing(_read_ahead(items, read, size, default_workers() if workers is None else workers)) as stream:
            while True:
                start = time.perf_counter()
                batch, errors, pixels = _next_batch(stream, size)
                if not batch:
                    return
                stacked = np.stack(pixels) if pixels else None
                waited = time.perf_counter() - start
                outputs = np.empty((0, width), np.float32) if stacked is None else compute(stacked)
                yield BatchResult(batch, *_only_finite(errors, outputs), waited)


def _only_finite(errors: list[str | None], outputs: Outputs) -> tuple[list[str | None], Outputs]:
    """Without the rows that are not finite, which become errors."""
    finite = np.asarray(np.isfinite(outputs).all(axis=1))
    if finite.all():
        return errors, outputs
    rows = iter(finite)
    return [NOT_FINITE if error is None and not next(rows) else error for error in errors], outputs[finite]


class SplitReader:
    """Reads crops of a split's images by row: uint8 H W C, or BadImage.

    If it is used for several evaluations, the crops of a small array are computed once. read: a function that is used
    instead, such as a cache on the disk (see data/cache/readers.py).
    """

    def __init__(self, split: Split, preprocess: Preprocess, read: ReadImage | None = None) -> None:
        if len(split) == 0:
            raise DataError("the split has no images")
        self.split = split
        self.preprocess = preprocess
        self._read = read or self._crop
        if read is None and isinstance(split, ArraySplit):
            if preprocess.keeps(*split.images.shape[1:3]) and split.channels in (1, preprocess.channels):
                self._read = partial(_array_pixels, split, preprocess)
            elif len(split) * preprocess.channels * math.prod(preprocess.size) <= _MAX_MEMORY:
                self._read = cache(self._crop)

    def __call__(self, row: int) -> Pixels:
        return self._read(row)

    def _crop(self, row: int) -> Pixels:
        return self.preprocess.crop(self.split.image(row))

    def skipped(self, result: BatchResult[int]) -> list[dict[str, str]]:
        """The unreadable images of a batch, {"path", "reason"} each."""
        pairs = zip(result.items, result.errors, strict=True)
        return [{"path": self.split.name(row), "reason": error} for row, error in pairs if error is not None]


def _array_pixels(split: ArraySplit, preprocess: Preprocess, row: int) -> Pixels:
    """What `crop` gives for an array that already has the right size: grey becomes RGB, if needed."""
    pixels: Pixels = split.images[row].reshape(*preprocess.size, -1)
    return pixels if pixels.shape[2] == preprocess.channels else pixels.repeat(preprocess.channels, axis=2)


def default_workers(split: Split | None = None) -> int:
    """Threads that decode images: as many as there are cores, up to 16; none for a split in memory."""
    if isinstance(split, ArraySplit):
        return 0
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


Decoded = tuple[T, Pixels | None, str | None]


def _next_batch(stream: Iterator[Decoded[T]], size: int) -> tuple[list[T], list[str | None], list[Pixels]]:
    """Items up to the next `size` readable ones, the error or None of each, and the pixels of the readable ones."""
    items: list[T] = []
    errors: list[str | None] = []
    found: list[Pixels] = []
    for item, pixels, error in stream:
        items.append(item)
        errors.append(error)
        if pixels is not None:
            found.append(pixels)
        if len(found) == size:
            break
    return items, errors, found


def _submit(pool: ThreadPoolExecutor, function: Callable[[T], R], argument: T) -> Future[R]:
    """The function on a thread of the pool, or in this thread if the memory does not suffice for another one."""
    try:
        return pool.submit(function, argument)
    except RuntimeError as error:
        if "can't start new thread" not in str(error):
            raise
        done: Future[R] = Future()
        done.set_result(function(argument))
        return done


def _read_ahead(
    items: Iterable[T], read: Callable[[T], Pixels], batch_size: int, workers: int
) -> Generator[Decoded[T]]:
    """Every item in order with its pixels or its error. Up to two batches are read ahead."""

    def decode(part: Sequence[T]) -> list[Decoded[T]]:
        found: list[Decoded[T]] = []
        for item in part:
            try:
                with one_image():
                    found.append((item, read(item), None))
            except BadImage as bad:
                found.append((item, None, bad.reason))
        return found

    rest = iter(items)
    if workers == 0:
        for item in rest:
            yield from decode([item])
        return
    chunk = math.ceil(batch_size / (_CHUNKS * workers))
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        pending: deque[Future[list[Decoded[T]]]] = deque()
        while True:
            while len(pending) * chunk < 2 * batch_size and (part := list(islice(rest, chunk))):
                pending.append(_submit(pool, decode, part))
            if not pending:
                return
            yield from pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
