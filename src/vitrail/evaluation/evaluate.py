"""Every image of a split through a model, each counted exactly once."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields

import numpy as np
import torch
from torch import nn

from vitrail.data.cache.readers import ReadImage
from vitrail.data.dataset import ArraySplit, Split
from vitrail.data.loader import Batch, EvalLoader
from vitrail.evaluation.metrics import Evaluation, Recorder, Records
from vitrail.images.preprocess import Preprocess
from vitrail.utils.device import precision, uses_bf16
from vitrail.utils.distributed import SINGLE_PROCESS, DistributedContext

__all__ = ["Abandoned", "Evaluation", "evaluate", "evaluate_loader", "make_loader"]

_PIXELS = {"cuda": 2**24}  # in a batch: enough to keep the device busy, and little memory


class Abandoned(Exception):
    """An evaluation that was asked to stop, by this signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


def evaluate(
    model: nn.Module,
    preprocess: Preprocess,
    split: Split,
    class_names: Sequence[str],
    *,
    name: str = "",
    batch_size: int | None = None,
    workers: int | None = None,
    amp: str = "auto",
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Figures of `model`, whose classes are `class_names`, on the images of `split`, which is called `name`.

    An image that cannot be read is left out of the figures and named in `skipped`. `on_batch` is told the number of
    images of each finished batch. The model stays where it is, and in the mode that it was in.
    """
    loader = make_loader(split, preprocess, next(model.parameters()).device, batch_size, workers)
    return evaluate_loader(model, loader, class_names, name, amp=amp, on_batch=on_batch)


def make_loader(
    split: Split,
    preprocess: Preprocess,
    device: torch.device,
    batch_size: int | None = None,
    workers: int | None = None,
    read: ReadImage | None = None,
    distributed: DistributedContext = SINGLE_PROCESS,
) -> EvalLoader:
    """Batches for evaluation; None asks for a size that fits the images, and for as many workers as help. read: as
    EvalLoader's. Of several processes, each has its share.
    """
    pixels = _PIXELS.get(device.type, 2**20)
    size = batch_size or max(8, min(1024, pixels // (preprocess.size[0] * preprocess.size[1])))
    if workers is None:
        workers = default_workers(split)
    return EvalLoader(
        split,
        preprocess,
        batch_size=size,
        workers=workers,
        rank=distributed.rank,
        world_size=distributed.world_size,
        pin=device.type == "cuda",
        read=read,
    )


def default_workers(split: Split) -> int:
    """Threads that read images: none for arrays in memory, else as many as there are cores, up to 16."""
    if isinstance(split, ArraySplit):
        return 0
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@torch.inference_mode()
def evaluate_loader(
    model: nn.Module,
    loader: EvalLoader,
    class_names: Sequence[str],
    name: str = "",
    *,
    amp: str = "auto",
    on_batch: Callable[[int], None] | None = None,
    stop: Callable[[], int | None] | None = None,
    distributed: DistributedContext = SINGLE_PROCESS,
    together: bool = False,
) -> Evaluation:
    """As `evaluate`, with a loader that may serve again: it keeps small images in memory.

    stop: asked before each batch for a signal to stop at. world: each process has a loader for its share of the images,
    and all get the figures of all of them. together: the model is split, so all processes must call it equally often.

    Raises:
        Abandoned: `stop` gave a signal, in any process.
    """
    device = next(model.parameters()).device
    bf16 = uses_bf16(model, device, amp)
    training, recorder = model.training, Recorder()
    model.eval()
    try:
        for batch in _agreed(iter(loader), stop, distributed):
            if batch is None and not together:
                continue
            there = (batch or _nothing(loader)).to(device)
            with precision(device, bf16):
                logits = model(loader.preprocess.normalize(there.images))
            if batch is None:
                continue
            recorder.add(logits, there.labels, batch.indices)
            if on_batch:
                on_batch(len(batch))
    finally:
        model.train(training)
        loader.close()
    skipped = [item for items in distributed.all_gather_object(loader.skipped) for item in items]
    return Evaluation(_joined(distributed.all_gather_object(recorder.records())), tuple(class_names), name, skipped)


def _agreed(
    batches: Iterator[Batch], stop: Callable[[], int | None] | None, distributed: DistributedContext
) -> Iterator[Batch | None]:
    """The batches; None where this process has none left and another has."""
    while True:
        batch = next(batches, None)
        rows = distributed.all_gather_numbers(batch is not None, (stop and stop()) or 0)
        if number := max(row[1] for row in rows):
            raise Abandoned(round(number))
        if not any(row[0] for row in rows):
            return
        yield batch


def _nothing(loader: EvalLoader) -> Batch:
    """One black image, for company."""
    images = torch.zeros(1, loader.preprocess.channels, *loader.preprocess.size, dtype=torch.uint8)
    return Batch(images, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


def _joined(parts: list[Records]) -> Records:
    """The records of all processes, in the split's order."""
    if len(parts) == 1:
        return parts[0]
    values = {field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Records)}
    order = np.argsort(values["indices"], kind="stable")
    return Records(**{name: value[order] for name, value in values.items()})
