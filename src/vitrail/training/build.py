"""What a session trains with, made from a setup: loaders, trainer, schedule."""

import torch

from vitrail.data.cache.readers import ReadImage
from vitrail.data.loader import TrainLoader
from vitrail.data.sampling import class_weights
from vitrail.errors import ConfigError
from vitrail.training.config.schema import TrainConfig
from vitrail.training.engine.batch_augmenter import BatchAugmenter
from vitrail.training.engine.schedule import Schedule
from vitrail.training.engine.trainer import Trainer
from vitrail.training.objectives.distillation import make_task
from vitrail.training.resources.trial import blank_batch
from vitrail.training.setup import Setup
from vitrail.utils.distributed import DistributedContext


def make_train_loader(
    setup: Setup, device: torch.device, distributed: DistributedContext, read: ReadImage | None
) -> TrainLoader:
    """Training batches, of which each process gets its part."""
    config = setup.config
    return TrainLoader(
        setup.dataset.split("train"),
        setup.preprocess,
        batch_size=config.schedule.batch_size,
        seed=config.seed,
        workers=config.machine.workers or 0,
        crop_scale=config.augment.crop_scale,
        crop_ratio=config.augment.crop_ratio,
        repeats=config.augment.repeats,
        balance=config.regularize.balance == "sample",
        rank=distributed.rank,
        world_size=distributed.world_size,
        pin=device.type == "cuda",
        read=read,
    )


def make_trainer(setup: Setup, steps_per_epoch: int, device: torch.device, distributed: DistributedContext) -> Trainer:
    """A trainer of the setup's model."""
    config, dataset = setup.config, setup.dataset
    if config.machine.grad_checkpointing:
        _enable_grad_checkpointing(setup.model)
    weights = None
    if config.regularize.balance == "loss":
        weights = class_weights(dataset.split("train").labels, dataset.num_classes)
    return Trainer(
        setup.model,
        make_task(setup, device),
        BatchAugmenter(
            config,
            setup.preprocess,
            dataset.num_classes,
            device,
            weights,
            distributed,
            dataset.split("train").weights,
        ),
        make_schedule(config, steps_per_epoch),
        config,
        device,
        distributed,
        blank_batch(2, setup.preprocess) if distributed.world_size > 1 else None,
    )


def make_schedule(config: TrainConfig, steps_per_epoch: int) -> Schedule:
    """The config's schedule, in steps. Part of an epoch is at least one step."""
    schedule, lr = config.schedule, config.optimizer.lr
    steps = None if schedule.epochs is None else round(schedule.epochs * steps_per_epoch)
    if schedule.epochs:
        steps = max(steps or 0, 1)
    warmup = schedule.warmup_epochs * steps_per_epoch
    if steps and schedule.budget is None and warmup > steps:
        raise ConfigError(
            f"warmup_epochs={schedule.warmup_epochs:g} is longer than the run of {schedule.epochs:g} epochs"
        )
    if schedule.min_lr > lr:
        raise ConfigError(f"min_lr={schedule.min_lr:g} is above lr={lr:g}")
    return Schedule(steps, warmup, schedule.min_lr / lr, schedule.budget)


def _enable_grad_checkpointing(model: torch.nn.Module) -> None:
    if not hasattr(model, "set_grad_checkpointing"):
        raise ConfigError(f"{type(model).__name__} has no gradient checkpointing: set grad_checkpointing=false")
    model.set_grad_checkpointing(True)  # type: ignore[operator]
