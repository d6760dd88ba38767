"""From a batch of images to what the model sees of it.

Letters: B batch, C channels, H W height and width, K classes.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vitrail.data.augment import Augment, augment
from vitrail.data.loader import Batch
from vitrail.preprocess import Preprocess
from vitrail.training.config import TrainConfig


@dataclass(frozen=True)
class View:
    """A batch as the model sees it, and what it is a view of.

    images: float B C H W, normalised. targets: int64 B (class numbers) or float B K (shares that sum to 1, where
    images are mixed).
    indices: int64 B, the samples' places in the training split; with `epoch` they determine the view.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    epoch: int

    def __len__(self) -> int:
        return len(self.targets)

    def part(self, rows: slice) -> "View":
        """The view of some of the images."""
        return View(self.images[rows], self.targets[rows], self.indices[rows], self.epoch)


def augmentation(config: TrainConfig) -> Augment:
    """The config's augmentation: its keys have the names of Augment's fields."""
    return Augment(**{field.name: getattr(config, field.name) for field in fields(Augment)})


class Viewer:
    """Moves batches to a device, augments and normalises them there; a pure function of batch and epoch."""

    def __init__(self, config: TrainConfig, preprocess: Preprocess, num_classes: int, device: torch.device) -> None:
        self.augment = augmentation(config)
        self.preprocess = preprocess
        self.num_classes = num_classes
        self.seed = config.seed
        self.device = device

    @torch.no_grad()
    def __call__(self, batch: Batch, epoch: int) -> View:
        there = batch.to(self.device)
        images, targets = augment(
            there.images,
            there.labels,
            self.num_classes,
            batch.indices,
            config=self.augment,
            preprocess=self.preprocess,
            seed=self.seed,
            epoch=epoch,
        )
        return View(images, targets, batch.indices, epoch)
