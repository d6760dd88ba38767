"""Training batches: decoded and cropped on threads, resumable, the same for any number of workers and processes.

Threads, not processes: Pillow releases the global interpreter lock while it decodes and resizes, so threads use all
cores without forking or pickling. Arrays that need no cropping are copied from memory.
Shapes: B images in a batch, C channels, H height, W width, N images in a split.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch

from vitrail.data.augment.crop import CROP_DRAWS, crop_box, random_crop
from vitrail.data.cache.readers import ReadImage
from vitrail.data.dataset import ArraySplit, SkippedImage, Split
from vitrail.data.sampling import Keys, balanced_rows, count_repetitions, epoch_order, rows_of
from vitrail.errors import ConfigError, DataError, DistributedError
from vitrail.images.convert import Pixels
from vitrail.images.decode import BadImage, one_image
from vitrail.images.preprocess import Preprocess
from vitrail.images.resize import resize_part
from vitrail.utils.counter_rng import uniform

_IN_MEMORY = 256 << 20  # bytes up to which an array's cropped images are kept, rather than cropped again in every epoch
_PREFETCH = 3  # batches that are read while one is used


@dataclass
class Batch:
    """images: uint8 B C H W. labels: int64 B. keys: int64 B, the samples' keys (see sampling.py), always on the CPU."""

    images: torch.Tensor
    labels: torch.Tensor
    keys: torch.Tensor

    @property
    def indices(self) -> torch.Tensor:
        """int64 B: rows of the split."""
        return rows_of(self.keys)

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Batch:
        """The first images."""
        return Batch(self.images[:count], self.labels[:count], self.keys[:count])

    def to(self, device: torch.device | str) -> Batch:
        """Images and labels on a device; from pinned memory the copy is asynchronous."""
        return Batch(self.images.to(device, non_blocking=True), self.labels.to(device, non_blocking=True), self.keys)


@dataclass
class _Job:
    """A batch that is being read.

    positions: the samples' positions in `order`, the keys of the epoch. draws: (B, CROP_DRAWS) for random crops.
    """

    order: Keys
    positions: range
    epoch: int
    keys: Keys
    draws: npt.NDArray[np.float64]
    images: torch.Tensor
    tasks: list[Future[None]]


@dataclass(eq=False, repr=False)
class TrainLoader:
    """Shuffled batches, epoch by epoch.

    batch_size: images in a step, over all processes; process `rank` of `world_size` gets its slice of each batch, so
    that a step has the same images for any number of processes. Every batch has exactly this size: an incomplete last
    batch is dropped. Only a split smaller than a batch gives one smaller batch, in several processes without the images
    that cannot be divided equally. The order depends on (seed, epoch) and the crop of an image on (seed, epoch, key)
    alone. repeats: views of each image in a batch, of fewer images per epoch (repeated augmentation). balance: every
    class equally often (see sampling.py).

    An image that cannot be read is replaced by the next readable one of the epoch's order, with the label, crop and
    augmentation of that one. This depends on the order alone. Unreadable images are listed in `skipped`.

    crop_scale, crop_ratio: range of area, as a share of the image, and of width / height for a random resized crop
    (Szegedy et al., 2015); None for the evaluation crop. workers: number of threads; 0 reads in the calling thread.
    pin: page-locked memory, for CUDA. read: where decoded images come from (see data/cache): full images for random
    crops, else evaluation crops; None decodes them in each epoch.
    """

    split: Split
    preprocess: Preprocess
    _: KW_ONLY
    batch_size: int
    seed: int = 0
    workers: int = 0
    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    repeats: int = 1
    balance: bool = False
    rank: int = 0
    world_size: int = 1
    pin: bool = False
    read: ReadImage | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0:
            raise ValueError(f"batch_size {self.batch_size} and workers {self.workers} must be at least 1 and 0")
        if len(self.split) == 0:
            raise DataError("there are no images to load")
        if self.batch_size % self.world_size or not 0 <= self.rank < self.world_size:
            raise DistributedError(
                f"batch_size={self.batch_size} cannot be divided among {self.world_size} processes: use a multiple"
            )
        if len(self.split) < self.world_size:
            raise DistributedError(f"{len(self.split)} training images are too few for {self.world_size} processes")
        if self.balance and self.repeats > 1:
            raise ConfigError(
                "balance=sample already repeats the images of rare classes: set repeats=1, or use balance=loss"
            )
        self.steps_per_epoch = max(1, len(self.split) // self.batch_size)
        self.wait_seconds = 0.0
        self._unreadable: dict[int, SkippedImage] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._memory: Pixels | None = None

    @property
    def skipped(self) -> list[SkippedImage]:
        """Images that could not be read so far, each once, in the split's order."""
        return [self._unreadable[row] for row in sorted(self._unreadable)]

    def close(self) -> None:
        """Stop the threads. The loader may be used again: it then starts new ones."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from `start_step` on. Raises DataError if no image can be read."""
        order = self._order(epoch)
        steps = (self._positions(step, len(order)) for step in range(start_step, self.steps_per_epoch))
        if (memory := self._in_memory()) is not None:
            return self._copied(memory, order, steps)
        return self._prefetched(order, steps, epoch)

    def _order(self, epoch: int) -> Keys:
        """The keys of all samples of an epoch, in order."""
        if self.balance:
            return count_repetitions(balanced_rows(self.split.labels, self.seed, epoch))
        return epoch_order(self.seed, epoch, len(self.split), self.repeats, self.batch_size)

    def _positions(self, step: int, count: int) -> range:
        """Positions in the epoch's order, of `count` keys, of this process's part of a batch."""
        start = step * self.batch_size
        size = min(self.batch_size, count - start) // self.world_size
        return range(start + self.rank * size, start + (self.rank + 1) * size)

    def _copied(self, memory: Pixels, order: Keys, steps: Iterator[range]) -> Iterator[Batch]:
        """Batches of images that are in memory already."""
        for positions in steps:
            start = time.perf_counter()
            keys = order[positions.start : positions.stop]
            # numpy's take: torch's own indexing wakes its thread pool, which costs more than the copy.
            images = torch.from_numpy(memory.take(rows_of(keys), axis=0))
            batch = self._batch(keys, images.pin_memory() if self.pin else images)
            self.wait_seconds += time.perf_counter() - start
            yield batch

    def _prefetched(self, order: Keys, steps: Iterator[range], epoch: int) -> Iterator[Batch]:
        """Batches that are read, some of them ahead of use."""
        ahead = _PREFETCH if self.workers else 0
        jobs: deque[_Job] = deque()
        try:
            while True:
                start = time.perf_counter()
                jobs.extend(self._start(order, positions, epoch) for positions in islice(steps, ahead + 1 - len(jobs)))
                if not jobs:
                    return
                batch = self._finish(jobs.popleft())
                self.wait_seconds += time.perf_counter() - start
                yield batch
        finally:
            for job in jobs:
                for task in job.tasks:
                    task.cancel()

    def _start(self, order: Keys, positions: range, epoch: int) -> _Job:
        keys = order[positions.start : positions.stop].copy()
        shape = (len(keys), self.preprocess.channels, *self.preprocess.size)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self.pin)
        job = _Job(order, positions, epoch, keys, self._draws(keys, epoch), images, [])

        def fill(part: range) -> None:
            for i in part:
                if not self._try_sample(job, i):
                    self._replace(job, i)

        if self.workers == 0:
            fill(range(len(keys)))
            return job
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="vitrail-data")
        size = math.ceil(len(keys) / (4 * self.workers))
        job.tasks = [self._pool.submit(fill, range(i, min(i + size, len(keys)))) for i in range(0, len(keys), size)]
        return job

    def _finish(self, job: _Job) -> Batch:
        for task in job.tasks:
            task.result()
        return self._batch(job.keys, job.images)

    def _batch(self, keys: Keys, images: torch.Tensor) -> Batch:
        labels = torch.from_numpy(self.split.labels[rows_of(keys)])
        return Batch(images, labels.pin_memory() if self.pin else labels, torch.from_numpy(keys))

    def _try_sample(self, job: _Job, i: int) -> bool:
        """Read image i of a batch; False, and an entry in `skipped`, if it cannot be read."""
        row = int(rows_of(job.keys[i]))
        try:
            with one_image():
                self._sample(row, job.draws[i], job.images[i])
        except BadImage as bad:
            self._unreadable[row] = {"path": self.split.name(row), "reason": bad.reason}
            return False
        return True

    def _replace(self, job: _Job, i: int) -> None:
        """Replace the unreadable image i of a batch."""
        for key in np.roll(job.order, -job.positions[i])[1:]:
            if int(rows_of(key)) not in self._unreadable:
                job.keys[i] = key
                job.draws[i] = self._draws(job.keys[i : i + 1], job.epoch)[0]
                if self._try_sample(job, i):
                    return
        raise DataError(f"none of the {len(self.split)} training images can be read: {self.skipped[0]['reason']}")

    def _draws(self, keys: Keys, epoch: int) -> npt.NDArray[np.float64]:
        return uniform(self.seed, epoch, keys, "crop", 0 if self.crop_scale is None else CROP_DRAWS)

    def _sample(self, row: int, draw: npt.NDArray[np.float64], out: torch.Tensor) -> None:
        """Write an image into `out`, uint8 C H W. Raises BadImage."""
        if self.crop_scale is None:
            crop = self.read(row) if self.read else self.preprocess.crop(self.split.image(row))
        elif self.read is None:
            crop = random_crop(self.split, row, self.preprocess, self.crop_scale, self.crop_ratio, draw)
        else:
            pixels = self.read(row)
            box = crop_box(pixels.shape[0], pixels.shape[1], self.crop_scale, self.crop_ratio, draw)
            resize_part(pixels, box, self.preprocess.interpolation, out)
            return
        out.numpy()[:] = crop.transpose(2, 0, 1)

    def _in_memory(self) -> Pixels | None:
        """All images as uint8 N C H W, if they are an array that needs no cropping or is small enough to be cropped
        once. Else None.
        """
        split, preprocess = self.split, self.preprocess
        if self._memory is not None or not isinstance(split, ArraySplit) or self.crop_scale is not None:
            return self._memory
        height, width = split.images.shape[1:3]
        if preprocess.keeps(height, width) and split.channels in (1, preprocess.channels):
            planes = split.images.reshape(len(split), height, width, -1).transpose(0, 3, 1, 2)
            if split.channels != preprocess.channels:
                planes = planes.repeat(preprocess.channels, axis=1)
            self._memory = np.ascontiguousarray(planes)
        elif len(split) * preprocess.channels * math.prod(preprocess.size) <= _IN_MEMORY:
            self._memory = self._finish(self._start(np.arange(len(split)), range(len(split)), 0)).images.numpy()
        return self._memory
