"""What a run is about to do, in words, and what an epoch gave."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from vitrail.data.dataset import Dataset
from vitrail.training.config import TrainConfig
from vitrail.training.loop import Trainer
from vitrail.training.optim import describe_groups
from vitrail.training.prepare import Setup


def plan_lines(setup: Setup, trainer: Trainer, steps_per_epoch: int, out: str) -> list[str]:
    """Data, model, length, rates and place, a few lines before the first step."""
    config, dataset = setup.config, setup.dataset
    counts = ", ".join(f"{count:,} {name}" for name, count in dataset.counts().items())
    height, width = setup.preprocess.size
    parameters = sum(p.numel() for p in trainer.model.parameters())
    start = config.weights or ("published weights" if config.pretrained else "scratch")
    threads = f" with {torch.get_num_threads()} threads" if trainer.device.type == "cpu" else ""
    length = "" if config.epochs is None else f"{config.epochs:g} epochs of {steps_per_epoch} steps"
    budget = "" if config.budget is None else f"{' or ' if length else ''}{config.budget:g} seconds"
    augment = trainer.view.augment.active if hasattr(trainer.view, "augment") else []
    crop = ["crop"] if config.crop_scale else []
    return [
        *setup.reasons,
        f"data    {dataset.name}: {counts} images, {class_words(dataset)} ({dataset.how_split})",
        *([f"skipped {len(dataset.skipped)} unusable files, named in the summary"] if dataset.skipped else []),
        f"model   {config.model} from {start}, {parameters:,} parameters, sees {height}x{width} pixels",
        f"train   {length}{budget}, batches of {config.batch_size}, seed {config.seed}",
        f"augment {', '.join([*crop, *augment]) or 'nothing'}",
        f"device  {trainer.device}{threads}, {'bfloat16' if trainer.bf16 else 'float32'}",
        *[f"group   {line}" for line in describe_groups(trainer.groups)],
        f"run     {out}",
    ]


def class_words(dataset: Dataset) -> str:
    """How many classes there are, and the first of them: a wrong folder shows itself by their names."""
    names = ", ".join(dataset.class_names[:8]) + (", ..." if dataset.num_classes > 8 else "")
    return f"{dataset.num_classes} classes: {names}"


def epoch_line(record: Mapping[str, Any], config: TrainConfig, best_epoch: int) -> str:
    """One epoch in a line."""
    of = f"/{math.ceil(config.epochs)}" if config.epochs is not None else ""
    validated = ""
    if "val_top1" in record:
        star = "  best" if best_epoch == record["epoch"] else ""
        validated = f"  val loss {record['val_loss']:.4f}  top-1 {record['val_top1']:.2f} %{star}"
    return (
        f"epoch {record['epoch']}{of}  {record['images_per_second']:,.0f} images/s"
        f"  loss {record['train_loss']:.4f}{validated}"
    )
