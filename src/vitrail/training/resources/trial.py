"""Trial steps before a training, to measure time and memory. They leave the trainer unchanged.

Shapes: B batch, C channels, H W height and width.
"""

import copy
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from vitrail.data.loader import Batch
from vitrail.images.preprocess import Preprocess
from vitrail.training.engine.non_finite import NonFiniteGuard
from vitrail.training.engine.trainer import Trainer
from vitrail.utils.device import precision
from vitrail.utils.memory import is_out_of_memory, resident_memory, return_free_memory

T = TypeVar("T")

_TRIAL_BYTES = 768 << 20  # of the process, above which a trial step on the CPU takes half of the batch


@contextmanager
def preserve_state(trainer: Trainer) -> Iterator[None]:
    """On exit, restore a new trainer and torch's random generators bit for bit, whatever happened inside."""
    assert not trainer.optimizer.state, "the trainer has made steps"
    tensors = _changed_tensors(trainer)
    saved = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    state, rates = copy.copy(trainer.state), [group["lr"] for group in trainer.optimizer.param_groups]
    guard, trainer.guard = trainer.guard, NonFiniteGuard(trainer.guard.synchronous)
    devices = [trainer.device] if trainer.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            free_step_memory(trainer)
            trainer.optimizer.state.clear()
            with torch.no_grad():
                for tensor, before in zip(tensors, saved, strict=True):
                    tensor.copy_(before)
            for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            trainer.state, trainer.guard = state, guard


def _changed_tensors(trainer: Trainer) -> list[Tensor]:
    """The tensors that a step changes, without the optimizer's state."""
    models = [trainer.model, *([trainer.ema.model] if trainer.ema else [])]
    return [trainer.loss_sum, *(tensor for model in models for tensor in (*model.parameters(), *model.buffers()))]


def free_step_memory(trainer: Trainer) -> None:
    """Free the gradients and cached memory of a step, also of one that failed."""
    trainer.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        return_free_memory()


def blank_batch(size: int, preprocess: Preprocess) -> Batch:
    """Black images (uint8 B C H W) of the first class."""
    images = torch.zeros(size, preprocess.channels, *preprocess.size, dtype=torch.uint8)
    return Batch(images, torch.zeros(size, dtype=torch.int64), torch.arange(size))


def trial_images(trainer: Trainer, expected: int, images: int) -> int:
    """Images of a trial step: on the CPU half of a batch whose step would take much memory, which takes less.

    expected: bytes of the process in a step on all of them. The time of such a step is nearly proportional to the
    images; a smaller part than a half would be slower for each (measured: by 30 % with a quarter). An accelerator would
    be slower on a part, and a compiled model would be compiled again for it.
    """
    whole = trainer.device.type != "cpu" or trainer.config.machine.compile or expected <= _TRIAL_BYTES or images < 16
    return images if whole else images // 2


def timed_step(trainer: Trainer, batch: Batch) -> float:
    """Make a step, and return the seconds until the device has finished it."""
    start = time.perf_counter()
    trainer.step(batch)
    if trainer.device.type != "cpu":
        torch.accelerator.synchronize(trainer.device)
    return time.perf_counter() - start


def within_memory(trainer: Trainer, work: Callable[[], T]) -> T | None:
    """The result of work with the trainer, such as a step; None if there was not enough memory."""
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    free_step_memory(trainer)  # outside of `except`, where the error no longer references the step's tensors
    return None


def fits_in_memory(trainer: Trainer, batch: Batch) -> bool:
    """Make a step on this batch, and return whether there was enough memory."""
    return within_memory(trainer, lambda: timed_step(trainer, batch)) is not None


def estimate_peak_memory(trainer: Trainer, preprocess: Preprocess, batch_size: int) -> int:
    """Bytes that the process will use in a step on the CPU.

    The sum of its present memory, the gradients, AdamW's two averages, and the tensors that autograd saves,
    extrapolated from small batches. Temporary buffers of operations are not included.
    """
    two, four = (_saved_bytes(trainer, preprocess, size) for size in (2, 4))
    part = -(-batch_size // trainer.config.machine.accumulate)
    saved = two + (four - two) / 2 * max(part - 2, 0)
    return_free_memory()
    trainable = sum(p.numel() * p.element_size() for group in trainer.groups for p in group["params"])
    return int(resident_memory() + 3 * trainable + saved)


def _saved_bytes(trainer: Trainer, preprocess: Preprocess, size: int) -> int:
    """Bytes that autograd saves for the backward pass of `size` images."""
    model = trainer.model
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a tensor with its graph would be kept by this graph, and never be freed

    view = trainer.view(blank_batch(size, preprocess), 0)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, precision(trainer.device, trainer.bf16):
        loss = trainer.task(model, view)
    del loss
    return sum(sizes.values())
