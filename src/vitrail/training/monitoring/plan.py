"""What a run is about to do, in words, and what an epoch gave."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from vitrail.data.dataset import Dataset
from vitrail.data.sampling import Imbalance, class_weights
from vitrail.evaluation.metrics import UNEVEN
from vitrail.training.config.schema import TrainConfig
from vitrail.training.engine.optimizer import describe_groups
from vitrail.training.engine.trainer import Trainer
from vitrail.training.setup import Setup
from vitrail.utils.device import describe_precision

_VERY_UNEVEN = 5.0  # times the smallest class, from which on balancing is advised


def plan_lines(setup: Setup, trainer: Trainer, steps_per_epoch: int, out: str) -> list[str]:
    """Data, model, length, rates and place, a few lines before the first step."""
    config, dataset = setup.config, setup.dataset
    counts = ", ".join(f"{count:,} {name}" for name, count in dataset.counts().items())
    height, width = setup.preprocess.size
    parameters = sum(p.numel() for p in trainer.model.parameters())
    start = config.model.weights or ("published weights" if config.model.pretrained else "scratch")
    threads = f" with {torch.get_num_threads()} threads" if trainer.device.type == "cpu" else ""
    epochs, budget = config.schedule.epochs, config.schedule.budget
    length = [] if epochs is None else [f"{epochs:g} epochs of {steps_per_epoch} steps"]
    length += [] if budget is None else [f"{budget:g} seconds"]
    return [
        *setup.reasons,
        f"data    {dataset.name}: {counts} images, {class_words(dataset)} ({dataset.how_split})",
        *balance_lines(dataset, config.regularize.balance),
        *([f"skipped {len(dataset.skipped)} unusable files, named in the summary"] if dataset.skipped else []),
        f"model   {config.model.model} from {start}, {parameters:,} parameters, sees {height}x{width} pixels",
        f"train   {' or '.join(length)}, batches of {config.schedule.batch_size}, seed {config.seed}, "
        f"recipe {config.recipe}",
        f"augment {', '.join(config.augment.active) or 'nothing'}",
        *getattr(trainer.task, "lines", ()),
        f"device  {trainer.device}{threads}, {describe_precision(trainer.device, trainer.bf16)}{_processes(trainer)}",
        *[f"group   {line}" for line in describe_groups(trainer.groups)],
        f"run     {out}",
    ]


def balance_lines(dataset: Dataset, balance: str) -> list[str]:
    """How uneven the classes of the training images are, and what is done about it; nothing where they are even."""
    labels = dataset.split("train").labels
    found = Imbalance.of(labels)
    if found.ratio <= UNEVEN and balance == "none":
        return []
    (largest, many), (smallest, few) = found.largest, found.smallest
    names = dataset.class_names
    uneven = f"largest to smallest class {found.ratio:.3g}:1 ({names[largest]} {many:,}, {names[smallest]} {few:,})"
    weights = class_weights(labels, dataset.num_classes)
    done = {
        "none": "; --balance sample or --balance loss gives rare classes their due" * (found.ratio > _VERY_UNEVEN),
        "sample": f"; each comes equally often, a rare image up to {found.most_repeats} times in an epoch",
        "loss": f"; an image counts {weights[largest]:.3g} to {weights[smallest]:.3g} in the loss",
    }
    return [f"classes {uneven}{done[balance]}"]


def _processes(trainer: Trainer) -> str:
    if trainer.distributed.world_size == 1:
        return ""
    return f", {trainer.distributed.world_size} processes{', the model split over them' if trainer.sharded else ''}"


def class_words(dataset: Dataset) -> str:
    """How many classes there are, and the first of them: a wrong folder shows itself by their names."""
    names = ", ".join(dataset.class_names[:8]) + (", ..." if dataset.num_classes > 8 else "")
    return f"{dataset.num_classes} classes: {names}"


def epoch_line(record: Mapping[str, Any], config: TrainConfig, best_epoch: int) -> str:
    """One epoch in a line."""
    of = f"/{math.ceil(config.schedule.epochs)}" if config.schedule.epochs is not None else ""
    validated = ""
    loss = "not finite" if record["train_loss"] is None else f"{record['train_loss']:.4f}"
    if "val_top1" in record:
        star = "  best" if best_epoch == record["epoch"] else ""
        validated = f"  val loss {record['val_loss']:.4f}  top-1 {record['val_top1']:.2f} %{star}"
    return f"epoch {record['epoch']}{of}  {record['images_per_second']:,.0f} images/s  loss {loss}{validated}"
