"""Evaluation of a runtime on a split; each image is counted exactly once."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import numpy as np

from vitrail.data.dataset import SkippedImage, Split
from vitrail.errors import ModelError
from vitrail.evaluation.metrics import Evaluation, Recorder, Records
from vitrail.inference.engine import NOT_FINITE, BatchResult, Engine, SplitReader, default_workers
from vitrail.inference.runtime import Runtime
from vitrail.utils.distributed import SINGLE_PROCESS, DistributedContext
from vitrail.utils.text import printable

_SYNC_EVERY = 8  # batches between two collectives in which several processes agree on signals


class NotFinite(ModelError):
    """The model's logits are NaN or infinite for some images."""


class Interrupted(Exception):
    """A signal stopped the evaluation."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


def evaluate(
    runtime: Runtime,
    images: Split | SplitReader,
    class_names: Sequence[str],
    *,
    name: str = "",
    batch_size: int | None = None,
    workers: int | None = None,
    on_batch: Callable[[int], None] | None = None,
    stop: Callable[[], int | None] | None = None,
    distributed: DistributedContext = SINGLE_PROCESS,
    sharded: bool = False,
) -> Evaluation:
    """Metrics of a runtime with the classes `class_names` on the images of the split `name`.

    An image that could not be read is not counted and is listed in `skipped`. on_batch is called with the number of
    readable images of each batch. stop: returns the number of a signal that was received, or None; called between
    batches. distributed: each process evaluates a part of the images, and all return the metrics of all images.
    sharded: the model's parameters are sharded over the processes, so all of them call it equally often.

    Raises:
        Interrupted: `stop` returned a signal, in any process.
        NotFinite: the logits of an image are not finite; metrics of the others would be too good.
    """
    reader = images if isinstance(images, SplitReader) else SplitReader(images, runtime.preprocess)
    split, size = reader.split, batch_size or runtime.default_batch_size
    count, rank, processes = len(split), distributed.rank, distributed.world_size
    rows = range(count * rank // processes, count * (rank + 1) // processes)
    batches = Engine(runtime).run(rows, reader, size, default_workers(split) if workers is None else workers)
    planned = math.ceil(math.ceil(count / processes) / size)  # enough for the largest share
    recorder, skipped = Recorder(), list[SkippedImage]()
    blank = np.zeros((1, *runtime.preprocess.size, runtime.preprocess.channels), np.uint8)
    with closing(batches):
        for batch in _until_stopped(batches, planned, stop, distributed):
            counted = batch.readable if batch else []
            if batch:
                skipped += reader.skipped(batch)
            if batch and counted:
                recorder.add(batch.outputs, split.labels[counted], np.array(counted))
                if on_batch:
                    on_batch(len(counted))
            elif sharded:
                runtime.logits(blank)
    skipped = [item for items in distributed.all_gather_object(skipped) for item in items]
    if wrong := [item for item in skipped if item["reason"] == NOT_FINITE]:
        raise NotFinite(
            f"the logits of {len(wrong):,} of {count:,} images are not finite, such as of "
            f"{printable(wrong[0]['path'])}: the weights or the precision are at fault (float32 is --precision off)"
        )
    records = Records.concatenate(distributed.all_gather_object(recorder.records()))
    return Evaluation(records, tuple(class_names), name, skipped, split.image)


def _until_stopped(
    batches: Iterator[BatchResult[int]],
    planned: int,
    stop: Callable[[], int | None] | None,
    distributed: DistributedContext,
) -> Iterator[BatchResult[int] | None]:
    """As many batches as planned, the same number in each process; None where this process has no more."""
    interval = _SYNC_EVERY if distributed.world_size > 1 else 1
    for step in range(planned):
        if step % interval == 0:
            signals = distributed.all_gather_numbers((stop and stop()) or 0)
            if signal := round(max(row[0] for row in signals)):
                raise Interrupted(signal)
        yield next(batches, None)
