"""The plan printed before training, and the line printed after each epoch."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from vitrail.data.dataset import Dataset
from vitrail.data.sampling import Imbalance, class_weights
from vitrail.evaluation.metrics import IMBALANCE_RATIO
from vitrail.training.checkpoints.best import selects_by_loss
from vitrail.training.config.schema import TrainConfig
from vitrail.training.engine.optimizer import describe_groups, summarize_groups
from vitrail.training.engine.trainer import Trainer
from vitrail.training.monitoring.progress import epoch_title
from vitrail.training.setup import Setup
from vitrail.utils.device import describe_precision
from vitrail.utils.text import counted, format_duration, format_speed, printable

_ADVISE_BALANCE = 5.0  # ratio of largest to smallest class from which balancing is advised
# Held out for test and val alike, which is said once.
_HELD_OUT = re.compile(r"test: (\S+) of (\S+) images held out, ([^;]+); val: (\S+) of \2 images held out, \3")
_NAMES_WIDTH = 66  # characters of the class names that are printed


def plan_lines(
    setup: Setup, trainer: Trainer, steps_per_epoch: int, out: str, *, all_groups: bool = False
) -> list[str]:
    """Data, model, schedule, augmentation, device, parameter groups and run folder: the label of a line is its first
    word. all_groups: a line for each parameter group, instead of one for all."""
    config, dataset = setup.config, setup.dataset
    height, width = setup.preprocess.size
    parameters = sum(p.numel() for p in trainer.model.parameters())
    weights = config.model.weights or ("published weights" if config.model.pretrained else "trained from scratch")
    chosen = any(reason.startswith("model ") for reason in setup.reasons)  # which names the model
    model = "size    " if chosen else f"model   {config.model.model}, "
    threads = f", {counted(torch.get_num_threads(), 'thread')}" if trainer.device.type == "cpu" else ""
    epochs, budget = config.schedule.epochs, config.schedule.budget
    length = [] if epochs is None else [f"{counted(epochs, 'epoch')} of {counted(steps_per_epoch, 'step')}"]
    length += [] if budget is None else [format_duration(budget)]
    groups = [f"group   {line}" for line in describe_groups(trainer.groups)]
    summary = summarize_groups(trainer.groups, config.optimizer.layer_decay)
    return [
        *reason_lines(setup.reasons),
        *data_lines(dataset),
        *balance_lines(dataset, config.regularize.balance),
        f"{model}{parameters:,} parameters, input {height}x{width}, {weights}",
        f"train   {' or '.join(length)}, batch size {config.schedule.batch_size}, seed {config.seed}, "
        f"recipe {config.recipe}",
        *_selection(dataset, config),
        f"augment {', '.join(config.augment.active) or 'none'}",
        *trainer.task.lines,
        f"device  {trainer.device}{threads}, {describe_precision(trainer.device, trainer.bf16)}{_processes(trainer)}",
        *(groups if all_groups else [f"groups  {summary}, {config.optimizer.optimizer}"]),
        f"output  {out}",
    ]


def reason_lines(reasons: Iterable[str]) -> list[str]:
    """The automatic choices, with their first words aligned as those of the plan's other lines."""
    return [f"{word:7} {rest.lstrip()}" for word, _, rest in (reason.partition(" ") for reason in reasons)]


def _selection(dataset: Dataset, config: TrainConfig) -> list[str]:
    """How the best epoch is selected, where it is not by accuracy."""
    images = len(dataset.split("val")) if "val" in dataset.splits else 0
    if not images or not selects_by_loss(images, config.regularize.balance):
        return []
    return [f"select  the epoch of the lowest validation loss: {images} images are too few to compare accuracies"]


def balance_lines(dataset: Dataset, balance: str, repeats: bool = True) -> list[str]:
    """The class imbalance of the training images and how it is balanced; nothing if the classes are balanced.

    repeats: whether balance=sample repeats images; else it weights classes, as balance=loss does.
    """
    labels = dataset.split("train").labels
    found = Imbalance.of(labels)
    if found.ratio <= IMBALANCE_RATIO and balance == "none":
        return []
    (largest, many), (smallest, few) = found.largest, found.smallest
    names = dataset.class_names
    imbalance = f"{found.ratio:.3g}:1 ({names[largest]} {many:,}, {names[smallest]} {few:,})"
    weights = class_weights(labels, dataset.num_classes)
    balancing = {
        "none": "; consider --balance sample or --balance loss" * (found.ratio > _ADVISE_BALANCE),
        "sample": f"; classes sampled equally, images repeated up to {counted(found.most_repeats, 'time')} per epoch",
        "loss": f"; class weights {weights[largest]:.3g} to {weights[smallest]:.3g} in the loss",
    }
    return [f"balance {imbalance}{balancing[balance if repeats or balance == 'none' else 'loss']}"]


def _processes(trainer: Trainer) -> str:
    if trainer.distributed.world_size == 1:
        return ""
    return f", {trainer.distributed.world_size} processes{', sharded (FSDP2)' if trainer.sharded else ''}"


def data_lines(dataset: Dataset) -> list[str]:
    """Images by split, where the splits come from, the first class names, and the files left out."""
    split = _HELD_OUT.sub(r"test: \1, val: \4 of \2 images held out, \3", dataset.how_split)
    sizes = dataset.counts()
    counts = ", ".join(f"{count:,} {name}" for name, count in sizes.items())
    weights = dataset.splits["train"].weights if "train" in dataset.splits else None
    return [
        f"data    {dataset.name}: {counts} {'image' if list(sizes.values()) == [1] else 'images'}",
        f"split   {split}",
        f"classes {dataset.num_classes}: {printable(', '.join(dataset.class_names), _NAMES_WIDTH)}",
        *(
            []
            if weights is None
            else [f"weights {weights.min():g} to {weights.max():g} of the images, in the training loss"]
        ),
        *_skipped_line(dataset),
    ]


def _skipped_line(dataset: Dataset) -> list[str]:
    """How many files are left out, with the first and why; summary.json of the run lists all of them."""
    if not dataset.skipped:
        return []
    first = dataset.skipped[0]
    others = "; all are listed in the run's summary.json" if len(dataset.skipped) > 1 else ""
    text = f"{printable(first['path'], 120)} {first['reason']}"
    return [f"skipped {counted(len(dataset.skipped), 'file')}: {text}{others}"]


def epoch_line(record: Mapping[str, Any], config: TrainConfig, best_epoch: int) -> str:
    """The metrics of one epoch in one line."""
    title = epoch_title(record["epoch"], config.schedule.epochs)
    validated = ""
    loss = "not finite" if record["train_loss"] is None else f"{record['train_loss']:.4f}"
    if "val_top1" in record:
        star = "  best" if best_epoch == record["epoch"] else ""
        validated = f"  val loss {record['val_loss']:.4f}  top-1 {record['val_top1']:.2f} %{star}"
    return f"{title}  {format_speed(record['images_per_second'])} images/s  loss {loss}{validated}"
