"""A training step of the digits model: ours, and the same model in timm in a plain loop.

The same: width, depth, heads, stem, batch, loss, AdamW, augmentation. "Plain" is what a user of timm writes: timm's
VisionTransformer, timm's optimiser, a DataLoader over a dataset that transforms each image with torchvision.

Two comparisons: the step alone on one batch that is ready, and whole epochs with their loading and augmenting.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import interleave, publish
from benchmarks.peers import timm_twin
from vitrail.training.setup import prepare


class PlainDigits(Dataset[tuple[Tensor, int]]):
    """The same images, each transformed by torchvision when it is asked for."""

    def __init__(self, split: Any, mean: float, std: float, config: Any) -> None:
        from torchvision import transforms

        self.split = split
        augment, shear = config.augment, config.augment.shear
        steps = [transforms.RandomCrop(split.images.shape[1], padding=augment.pad_shift)] if augment.pad_shift else []
        if augment.rotate or augment.shift or augment.zoom != (1.0, 1.0):
            shift = (augment.shift, augment.shift) if augment.shift else None
            how = transforms.InterpolationMode.BILINEAR  # as ours
            steps.append(
                transforms.RandomAffine(augment.rotate, shift, augment.zoom, (-shear, shear, -shear, shear), how)
            )
        self.transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.split.image(index)), int(self.split.labels[index])


def plain_epoch(model: nn.Module, optimizer: Any, batches: Iterator[Any], smoothing: float, steps: int) -> None:
    for _, (images, labels) in zip(range(steps), batches, strict=False):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels, label_smoothing=smoothing).backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds

    from timm.optim import create_optimizer_v2

    from vitrail.data.loader import TrainLoader
    from vitrail.training.config.schema import make_config
    from vitrail.training.engine.batch_augmenter import BatchAugmenter
    from vitrail.training.engine.schedule import Schedule
    from vitrail.training.engine.trainer import Trainer
    from vitrail.training.objectives.classification import Classify

    setup = prepare("digits", make_config({"ema": 0.0, "clip_grad": None, "amp": "off"}))
    config, device = setup.config, torch.device("cpu")
    train = setup.dataset.split("train")
    loader = TrainLoader(train, setup.preprocess, batch_size=config.schedule.batch_size, seed=0)
    viewer = BatchAugmenter(config, setup.preprocess, 10, device)
    trainer = Trainer(
        setup.model, Classify(config.regularize.label_smoothing), viewer, Schedule(None, 0, 0, 1e9), config, device
    )

    twin = timm_twin(config.model.model, setup.model.config).train()
    twin.load_state_dict(setup.model.state_dict())
    settings = config.optimizer
    optimizer = create_optimizer_v2(twin, opt="adamw", lr=settings.lr, weight_decay=settings.weight_decay)
    plain = PlainDigits(train, setup.preprocess.mean[0], setup.preprocess.std[0], config)
    dataloader = DataLoader(plain, batch_size=config.schedule.batch_size, shuffle=True, drop_last=True)

    batch = next(loader.epoch(0))
    view = viewer(batch, 0)
    ready = [(view.images, view.targets)]
    fixed = Trainer(setup.model, trainer.task, lambda *_: view, trainer.schedule, config, device)

    def our_epoch() -> None:
        for item in loader.epoch(trainer.state.epoch):
            trainer.step(item)
        trainer.next_epoch()

    steps = loader.steps_per_epoch
    work = f"{config.model.model}, batch {config.schedule.batch_size}, float32"
    comparisons = [
        interleave(
            f"step alone, {work}",
            ("vitrail", lambda: fixed.step(batch)),
            ("timm", lambda: plain_epoch(twin, optimizer, iter(ready), config.regularize.label_smoothing, 1)),
            rounds=rounds,
            calls=20,
        ),
        interleave(
            f"epoch of {steps} steps with loading and augmenting, {work}",
            ("vitrail", our_epoch),
            ("timm", lambda: plain_epoch(twin, optimizer, iter(dataloader), config.regularize.label_smoothing, steps)),
            rounds=rounds,
            note="images/s is the batch times the steps over the seconds of one call",
        ),
    ]
    publish("digits_step", comparisons)


if __name__ == "__main__":
    main()
