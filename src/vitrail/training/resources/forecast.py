"""Estimated time and memory of a training, from a few real steps, which are undone."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from statistics import median_low

import numpy as np

from vitrail.data.loader import Batch, TrainLoader
from vitrail.images.preprocess import Preprocess
from vitrail.inference.torch_runtime import TorchRuntime
from vitrail.training.engine.trainer import Trainer
from vitrail.training.resources.trial import (
    estimate_peak_memory,
    preserve_state,
    timed_step,
    trial_images,
    within_memory,
)
from vitrail.utils.memory import available_memory, peak_memory, reset_peak_memory
from vitrail.utils.text import counted, format_bytes, format_duration, format_speed

_MAX_STEPS = 4  # the first of several is a warm-up
_MAX_SHARE = 0.02  # of the training that trial steps may take
_FORWARD_SHARE = 1 / 3  # of a step's time is the forward pass
_WARN_SHARE = 0.9  # of the available memory, above which a warning is given


@dataclass(frozen=True)
class Cost:
    """An estimate. seconds: of the training with its evaluations; epoch_seconds: of the steps of an epoch;
    validation_seconds: of one validation. peak_memory and available_memory: bytes, None if unknown."""

    seconds: float
    epoch_seconds: float
    validation_seconds: float
    epochs: float
    images_per_second: float
    peak_memory: int | None
    available_memory: int | None

    def line(self) -> str:
        memory = ""
        if self.peak_memory is not None:
            of = "" if self.available_memory is None else f" of {format_bytes(self.available_memory)}"
            memory = f", {format_bytes(self.peak_memory)}{of} memory"
        about = f"about {format_duration(self.seconds)} for {counted(float(f'{self.epochs:.3g}'), 'epoch')}"
        return f"cost    {about} ({format_speed(self.images_per_second)} images/s){memory}"


def estimate_cost(
    trainer: Trainer, loader: TrainLoader, images: Mapping[str, int], eval_split: str, least_steps: int = 0
) -> tuple[Cost | None, list[str]]:
    """The cost of a training, and lines that state it and warn of too little memory.

    There is no cost, and there are no lines, where trial steps would take more than 2 % of the training; and no cost
    where a step might exhaust the memory. The trainer must be new, of a single process, and is left unchanged.

    images: their number by split. eval_split: the split of the final evaluation. least_steps: so many
    trial steps are taken also where they are more than 2 %: for a user who asks for the estimate.
    """
    # With a time budget alone the number of steps is unknown; `_step_seconds` keeps to the share.
    steps = trainer.schedule.steps
    steps = _MAX_STEPS if steps is None else max(least_steps, min(_MAX_STEPS, int(_MAX_SHARE * steps)))
    if steps < 2:
        return None, []
    limit, size = available_memory(trainer.device), loader.batch_size
    with preserve_state(trainer):
        if trainer.device.type != "cuda" and limit is not None:
            expected = estimate_peak_memory(trainer, loader.preprocess, size)
            if expected > _WARN_SHARE * limit:
                return None, [_warning(expected, limit)]
            size = trial_images(trainer, expected, size)
        cost = _measure(trainer, loader, steps, images, eval_split, limit, size)
    peak = cost.peak_memory
    too_much = peak is not None and limit is not None and peak > _WARN_SHARE * limit
    return cost, [cost.line(), *([_warning(peak or 0, limit or 0)] if too_much else [])]


def _warning(expected: int, limit: int) -> str:
    return (
        f"warning: training needs about {format_bytes(expected)} of memory, and {format_bytes(limit)} are available; "
        "accumulate=2 or more, a smaller batch_size, or grad_checkpointing=true needs less"
    )


def _measure(
    trainer: Trainer,
    loader: TrainLoader,
    steps: int,
    images: Mapping[str, int],
    eval_split: str,
    limit: int | None,
    size: int,
) -> Cost:
    """Time some steps on `size` real images each and extrapolate."""
    schedule, eval_every = trainer.schedule, trainer.config.schedule.eval_every
    reset_peak_memory(trainer.device)
    batches, load = _load(loader, steps)
    loading = peak_memory(trainer.device)
    compute, peak = _steps(trainer, batches, size)
    evaluated = max(images.get("val", 0), images[eval_split])
    within_memory(trainer, lambda: _evaluate_batch(trainer, loader.preprocess, evaluated))
    if peak is not None:
        peak = max(peak, loading or 0, peak_memory(trainer.device) or 0)
    # On the CPU, data loading and training share the cores; with an accelerator they overlap.
    step = load + compute if trainer.device.type == "cpu" else max(load, compute)
    eval_image = (load + compute * _FORWARD_SHARE) / loader.batch_size
    validation = eval_image * images.get("val", 0)
    epoch = step * loader.steps_per_epoch
    epochs = math.inf if schedule.steps is None else schedule.steps / loader.steps_per_epoch
    if schedule.budget is not None:
        epochs = min(epochs, schedule.budget / (epoch + validation / eval_every))
    seconds = epochs * epoch + math.ceil(epochs / eval_every) * validation + eval_image * images[eval_split]
    return Cost(seconds, epoch, validation, epochs, loader.batch_size / step, peak, limit)


def _load(loader: TrainLoader, count: int) -> tuple[list[Batch], float]:
    """The last batches of an epoch, after which none is read ahead, and the seconds to load one."""
    waited = loader.wait_seconds
    stream = loader.epoch(0, max(0, loader.steps_per_epoch - count))
    times, batches = [time.perf_counter()], []
    for batch in islice(stream, count):
        batches.append(batch)
        times.append(time.perf_counter())
    stream.close()  # type: ignore[attr-defined]  # a generator
    loader.wait_seconds = waited
    # Workers load several batches at once, so only the mean over all is valid; without workers the first is slower.
    skip = 0 if loader.workers or len(batches) < 2 else 1
    return batches, (times[-1] - times[skip]) / (len(batches) - skip)


def _evaluate_batch(trainer: Trainer, preprocess: Preprocess, images: int) -> None:
    """Compute a batch as an evaluation of so many images does: its activations may take more memory than a step."""
    runtime = TorchRuntime(trainer.eval_model, preprocess, trainer.config.machine.amp)
    size = min(runtime.default_batch_size, images)
    if size:
        runtime.logits(np.zeros((size, *preprocess.size, preprocess.channels), np.uint8))


def _steps(trainer: Trainer, batches: list[Batch], size: int) -> tuple[float, int | None]:
    """Seconds and peak memory of a step, from steps on the first `size` images of the batches."""
    whole = len(batches[0])
    if size >= whole:
        return _step_seconds(trainer, batches), peak_memory(trainer.device)
    parts = [batch.first(size) for batch in batches]
    timed_step(trainer, parts[0])  # the optimizer allocates its averages
    reset_peak_memory(trainer.device)
    timed_step(trainer, batches[0].first(size // 2))
    less = peak_memory(trainer.device)
    reset_peak_memory(trainer.device)
    seconds = whole / size * _step_seconds(trainer, parts)
    more = peak_memory(trainer.device)
    if less is None or more is None or more <= less:  # the system does not start the peak anew
        return seconds, None
    return seconds, int(more + (whole - size) * (more - less) / (size - size // 2))


def _step_seconds(trainer: Trainer, batches: list[Batch]) -> float:
    """The median duration of the steps after the first. With a budget, stops after `_MAX_SHARE` of it.

    On an accelerator there are two in any case: the first loads the kernels, and takes many times as long as others.
    """
    times: list[float] = []
    budget, least = trainer.schedule.budget or math.inf, 1 if trainer.device.type == "cpu" else 2
    for batch in batches:
        times.append(timed_step(trainer, batch))
        if len(times) >= least and sum(times) + times[-1] > _MAX_SHARE * budget:
            break
    return median_low(times[1:] or times)
