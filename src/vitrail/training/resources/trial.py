"""Steps that are tried out before a run, to see what they cost. They leave no trace.

Shapes: C channels, H W height and width.
"""

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vitrail.data.loader import Batch
from vitrail.images.preprocess import Preprocess
from vitrail.training.engine.non_finite import NonFiniteGuard
from vitrail.training.engine.trainer import Trainer
from vitrail.utils.device import precision
from vitrail.utils.memory import is_out_of_memory, resident_memory


@contextmanager
def untouched(trainer: Trainer) -> Iterator[None]:
    """Whatever happens to a fresh trainer inside, it comes out as it went in, bit for bit; torch's generators, too."""
    assert not trainer.optimizer.state, "only a run that has not begun can be taken back"
    tensors = _tensors(trainer)
    kept = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    place, rates = copy.copy(trainer.state), [group["lr"] for group in trainer.optimizer.param_groups]
    guard, trainer.guard = trainer.guard, NonFiniteGuard(trainer.guard.synchronous)
    devices = [trainer.device] if trainer.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            forget_step(trainer)
            trainer.optimizer.state.clear()
            with torch.no_grad():
                for tensor, before in zip(tensors, kept, strict=True):
                    tensor.copy_(before)
            for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            trainer.state, trainer.guard = place, guard


def _tensors(trainer: Trainer) -> list[Tensor]:
    """All that a step changes, but for the optimiser's own."""
    models = [trainer.model, *([trainer.ema.model] if trainer.ema else [])]
    return [trainer.loss_sum, *(tensor for model in models for tensor in (*model.parameters(), *model.buffers()))]


def forget_step(trainer: Trainer) -> None:
    """Let go of what a step leaves in memory, also one that failed."""
    trainer.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()


def blank(size: int, preprocess: Preprocess) -> Batch:
    """A batch of black images of the first class: uint8 size C H W."""
    images = torch.zeros(size, preprocess.channels, *preprocess.size, dtype=torch.uint8)
    return Batch(images, torch.zeros(size, dtype=torch.int64), torch.arange(size))


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def fits(trainer: Trainer, batch: Batch) -> bool:
    """Whether a step on this batch finds the memory that it needs."""
    try:
        trainer.step(batch)
        wait_for(trainer.device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        full = True
    else:
        full = False
    if full:  # out here, where the error no longer holds on to the step's tensors
        forget_step(trainer)
    return not full


def expected_peak(trainer: Trainer, preprocess: Preprocess, batch_size: int) -> int:
    """What the process will hold in a step on the CPU, from what a few images leave for the backward pass.

    Beside what is held now: gradients, AdamW's two averages, and the tensors that autograd keeps for each image of the
    batch, or of its largest part. What an operation needs for a moment is not counted.
    """
    few, more = (_saved(trainer, preprocess, size) for size in (2, 4))
    part = -(-batch_size // trainer.config.machine.accumulate)
    images = few + (more - few) / 2 * max(part - 2, 0)
    learning = sum(p.numel() * p.element_size() for group in trainer.groups for p in group["params"])
    return int(resident_memory() + 3 * learning + images)


def _saved(trainer: Trainer, preprocess: Preprocess, size: int) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of so many images."""
    model = trainer.model
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    view = trainer.view(blank(size, preprocess), 0)
    saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with saving, precision(trainer.device, trainer.bf16):
        loss = trainer.task(model, view)
    del loss
    return sum(sizes.values())
