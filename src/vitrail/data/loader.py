"""Batches from splits: decoded and cropped on threads, resumable, the same for any number of workers and processes.

Threads, not processes: Pillow lets go of Python's lock while it decodes and resizes, so threads use all cores, and
there is nothing to fork, pickle or lose. Arrays that need no cropping are gathered straight from memory.
Shapes: B images in a batch, C channels, H height, W width, N images in a split.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch

from vitrail.data.augment.crop import CROP_DRAWS, crop_stored, random_crop
from vitrail.data.cache.readers import Read
from vitrail.data.dataset import ArraySplit, Skipped, Split
from vitrail.data.sampling import Keys, balanced_rows, count_repetitions, epoch_order, rows_of
from vitrail.errors import VitrailError
from vitrail.images.convert import Pixels
from vitrail.images.decode import BadImage
from vitrail.images.preprocess import Preprocess
from vitrail.utils.counter_rng import uniform

_IN_MEMORY = 256 << 20  # bytes up to which an array's cropped images are kept, rather than cropped anew every epoch
_AHEAD = 3  # batches that are being made while one is used


@dataclass
class Batch:
    """images: uint8 B C H W. labels: int64 B. keys: int64 B, which views these are (see sampling.py); they stay on the
    CPU. stands_in: none of the batch could be read, and this is an image from elsewhere.
    """

    images: torch.Tensor
    labels: torch.Tensor
    keys: torch.Tensor
    stands_in: bool = False

    @property
    def indices(self) -> torch.Tensor:
        """int64 B: rows of the split."""
        return rows_of(self.keys)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Batch:
        """Images and labels on a device; the copy overlaps with work where the memory is pinned."""
        return Batch(self.images.to(device, non_blocking=True), self.labels.to(device, non_blocking=True), self.keys)


@dataclass
class _Job:
    """A batch in the making: the keys of its views, where the pixels go, and the tasks that put them there."""

    keys: Keys
    images: torch.Tensor
    good: npt.NDArray[np.bool_]
    tasks: list[Future[None]]


class _Loader:
    """What TrainLoader and EvalLoader share: filling batches, counting the wait, naming what is left out."""

    def __init__(
        self, split: Split, preprocess: Preprocess, batch_size: int, workers: int, pin: bool, read: Read | None
    ) -> None:
        if batch_size < 1 or workers < 0:
            raise ValueError(f"batch_size {batch_size} and workers {workers} must be at least 1 and 0")
        if len(split) == 0:
            raise VitrailError("there are no images to load")
        self.split = split
        self.preprocess = preprocess
        self.batch_size = batch_size
        self.workers = workers
        self.wait_seconds = 0.0
        self._pin = pin
        self._read = read
        self._bad: dict[int, Skipped] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._memory: Pixels | None = None

    @property
    def skipped(self) -> list[Skipped]:
        """Images that could not be decoded so far, each once, in the split's order."""
        return [self._bad[row] for row in sorted(self._bad)]

    def close(self) -> None:
        """Let the threads go. The loader may still be used; they come back."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _sample(self, row: int, draw: npt.NDArray[np.float64] | None, out: torch.Tensor) -> None:
        """Put an image into `out`, uint8 C H W."""
        crop = self._read(row) if self._read else self.preprocess.crop(self.split.image(row))
        out.numpy()[:] = crop.transpose(2, 0, 1)

    def _draws(self, keys: Keys, epoch: int) -> npt.NDArray[np.float64] | None:
        return None

    def _start(self, keys: Keys, epoch: int) -> _Job:
        shape = (len(keys), self.preprocess.channels, *self.preprocess.size)
        job = _Job(
            keys, torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin), np.ones(len(keys), dtype=bool), []
        )
        draws, rows = self._draws(keys, epoch), rows_of(keys)

        def fill(part: range) -> None:
            for place in part:
                row = int(rows[place])
                try:
                    self._sample(row, None if draws is None else draws[place], job.images[place])
                except BadImage as bad:
                    job.good[place] = False
                    self._bad[row] = {"path": self.split.name(row), "reason": bad.reason}

        if self.workers == 0:
            fill(range(len(rows)))
            return job
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="vitrail-data")
        size = math.ceil(len(rows) / (4 * self.workers))
        job.tasks = [self._pool.submit(fill, range(i, min(i + size, len(rows)))) for i in range(0, len(rows), size)]
        return job

    def _finish(self, job: _Job) -> Batch:
        for task in job.tasks:
            task.result()
        keys, images = job.keys, job.images
        if not job.good.all():
            keys, images = keys[job.good], images[torch.from_numpy(job.good)]
        return self._batch(keys, images)

    def _batch(self, keys: Keys, images: torch.Tensor) -> Batch:
        labels = torch.from_numpy(self.split.labels[rows_of(keys)])
        return Batch(images, labels.pin_memory() if self._pin else labels, torch.from_numpy(keys))

    def _batches(self, plan: Iterator[Keys], epoch: int) -> Iterator[Batch]:
        """The batches of a plan, in order, some of them made ahead."""
        if (memory := self._in_memory()) is not None:
            for keys in plan:
                begin = time.perf_counter()
                # numpy's take: torch's own indexing wakes its thread pool, which costs more than the copy.
                images = torch.from_numpy(memory.take(rows_of(keys), axis=0))
                batch = self._batch(keys, images.pin_memory() if self._pin else images)
                self.wait_seconds += time.perf_counter() - begin
                yield batch
            return
        ahead = _AHEAD if self.workers else 0
        jobs: deque[_Job] = deque()
        try:
            while True:
                begin = time.perf_counter()
                jobs.extend(self._start(keys, epoch) for keys in islice(plan, ahead + 1 - len(jobs)))
                if not jobs:
                    return
                batch = self._finish(jobs.popleft())
                self.wait_seconds += time.perf_counter() - begin
                yield batch
        finally:
            for job in jobs:
                for task in job.tasks:
                    task.cancel()

    def _keeps_all(self) -> bool:
        return True

    def _in_memory(self) -> Pixels | None:
        """All images as uint8 N C H W, where they are an array that needs no cropping or is small enough to be
        cropped once.
        """
        split, want = self.split, self.preprocess
        if self._memory is not None or not isinstance(split, ArraySplit) or not self._keeps_all():
            return self._memory
        height, width = split.images.shape[1:3]
        if want.keeps(height, width) and split.channels in (1, want.channels):
            planes = split.images.reshape(len(split), height, width, -1).transpose(0, 3, 1, 2)
            if split.channels != want.channels:
                planes = planes.repeat(want.channels, axis=1)
            self._memory = np.ascontiguousarray(planes)
        elif len(split) * want.channels * math.prod(want.size) <= _IN_MEMORY:
            self._memory = self._finish(self._start(np.arange(len(split)), 0)).images.numpy()
        return self._memory


class TrainLoader(_Loader):
    """Shuffled batches, epoch by epoch.

    batch_size: images in a step, over all processes; process `rank` of `world_size` gets its slice of each batch, so
    that the same images meet in a step however many processes there are. The order depends on (seed, epoch) and the
    crop of an image on (seed, epoch, key) alone. repeats: views of each image in a batch, of so many fewer images
    (repeated augmentation). balance: every class equally often (see sampling.py). drop_last leaves the rest of an epoch
    out where it does not fill a batch (a split smaller than a batch is one batch).

    crop_scale, crop_ratio: range of area, as a share of the image, and of width / height for a random resized crop
    (Szegedy et al., 2015); None for the evaluation crop. workers: threads; 0 works in the caller's. pin: page-locked
    memory, for CUDA. read: where decoded images come from (see decoded.py): whole ones for random crops, else crops;
    None decodes them anew each time. An image that cannot be decoded is left out of its batch and named in `skipped`.
    """

    def __init__(
        self,
        split: Split,
        preprocess: Preprocess,
        *,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        crop_scale: tuple[float, float] | None = None,
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        repeats: int = 1,
        balance: bool = False,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        pin: bool = False,
        read: Read | None = None,
    ) -> None:
        super().__init__(split, preprocess, batch_size, workers, pin, read)
        if batch_size % world_size or not 0 <= rank < world_size:
            raise VitrailError(
                f"a batch of {batch_size} images cannot be shared by {world_size} processes: use a multiple"
            )
        if balance and repeats > 1:
            raise VitrailError(
                "balance=sample repeats rare images as it is: leave out repeated augmentation, or use balance=loss"
            )
        self.seed = seed
        self.crop_scale = crop_scale
        self.crop_ratio = crop_ratio
        self.repeats = repeats
        self.balance = balance
        self.rank = rank
        self.world_size = world_size
        count = len(split) / batch_size
        self.steps_per_epoch = max(1, math.floor(count)) if drop_last else math.ceil(count)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from `start_step` on."""
        size = self.batch_size
        order = self._order(epoch)

        def plan() -> Iterator[Keys]:
            for step in range(start_step, self.steps_per_epoch):
                yield _share(order[step * size : (step + 1) * size], self.rank, self.world_size)

        for step, batch in enumerate(self._batches(plan(), epoch), start_step):
            yield batch if len(batch) else self._substitute(order, (step + 1) * size, epoch)

    def _order(self, epoch: int) -> Keys:
        """The keys of all views of an epoch, in order."""
        if self.balance:
            return count_repetitions(balanced_rows(self.split.labels, self.seed, epoch))
        return epoch_order(self.seed, epoch, len(self.split), self.repeats, self.batch_size)

    def _substitute(self, order: Keys, start: int, epoch: int) -> Batch:
        """For a batch of which nothing could be decoded: the next image of the epoch's order that can."""
        for key in np.roll(order, -start):
            batch = self._finish(self._start(np.array([key]), epoch))
            if len(batch):
                return replace(batch, stands_in=True)
        raise VitrailError(f"none of the {len(order)} training images can be decoded: {self.skipped[0]['reason']}")

    def _keeps_all(self) -> bool:
        return self.crop_scale is None

    def _draws(self, keys: Keys, epoch: int) -> npt.NDArray[np.float64] | None:
        return None if self.crop_scale is None else uniform(self.seed, epoch, keys, "crop", CROP_DRAWS)

    def _sample(self, row: int, draw: npt.NDArray[np.float64] | None, out: torch.Tensor) -> None:
        if draw is None or self.crop_scale is None:
            super()._sample(row, draw, out)
        elif self._read:
            crop_stored(self._read(row), self.preprocess, self.crop_scale, self.crop_ratio, draw, out)
        else:
            crop = random_crop(self.split, row, self.preprocess, self.crop_scale, self.crop_ratio, draw)
            out.numpy()[:] = crop.transpose(2, 0, 1)


class EvalLoader(_Loader):
    """Every image of a split once, in order, as `preprocess` crops it. With several processes, each gets its share.
    read: where those crops come from (see decoded.py); None makes them anew.

    Images that cannot be decoded are left out and named in `skipped`; a batch may then be smaller, and is not yielded
    empty.
    """

    def __init__(
        self,
        split: Split,
        preprocess: Preprocess,
        *,
        batch_size: int,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin: bool = False,
        read: Read | None = None,
    ) -> None:
        super().__init__(split, preprocess, batch_size, workers, pin, read)
        self._rows: Keys = _share(np.arange(len(split)), rank, world_size)

    def __len__(self) -> int:
        """How many batches there are."""
        return math.ceil(len(self._rows) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        plan = (self._rows[i : i + self.batch_size] for i in range(0, len(self._rows), self.batch_size))
        return (batch for batch in self._batches(plan, 0) if len(batch))


def _share(rows: Keys, rank: int, world_size: int) -> Keys:
    """The part of some rows that falls to one process; the parts are whole, disjoint, and differ by one row at most."""
    return rows[len(rows) * rank // world_size : len(rows) * (rank + 1) // world_size]
