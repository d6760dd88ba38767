"""Every image of a split through a model, each counted exactly once."""

import os
from collections.abc import Callable, Sequence

import torch
from torch import nn

from vitrail.data.dataset import ArraySplit, Split
from vitrail.data.loader import EvalLoader
from vitrail.preprocess import Preprocess
from vitrail.training.device import precision, uses_bf16
from vitrail.training.metrics import Evaluation, Recorder

__all__ = ["Evaluation", "evaluate", "evaluate_loader", "make_loader"]

_PIXELS = {"cuda": 2**24}  # in a batch: enough to keep the device busy, and little memory


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
) -> EvalLoader:
    """Batches for evaluation; None asks for a size that fits the images, and for as many workers as help."""
    pixels = _PIXELS.get(device.type, 2**20)
    size = batch_size or max(8, min(1024, pixels // (preprocess.size[0] * preprocess.size[1])))
    if workers is None:
        workers = default_workers(split)
    return EvalLoader(split, preprocess, batch_size=size, workers=workers, pin=device.type == "cuda")


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
) -> Evaluation:
    """As `evaluate`, with a loader that may serve again: it keeps small images in memory."""
    device = next(model.parameters()).device
    bf16 = uses_bf16(device, amp)
    training, recorder = model.training, Recorder()
    model.eval()
    try:
        for batch in loader:
            there = batch.to(device)
            with precision(device, bf16):
                logits = model(loader.preprocess.normalize(there.images))
            recorder.add(logits, there.labels, batch.indices)
            if on_batch:
                on_batch(len(batch))
    finally:
        model.train(training)
        loader.close()
    return Evaluation(recorder.records(), tuple(class_names), name, loader.skipped)
