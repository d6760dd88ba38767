"""From a batch of uint8 images to the augmented, normalised input of the model.

Shapes: B batch, C channels, H W height and width, K classes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitrail.data.augment.augment import augment
from vitrail.data.loader import Batch
from vitrail.data.sampling import rows_of
from vitrail.images.preprocess import Preprocess
from vitrail.training.config.schema import TrainConfig
from vitrail.utils.distributed import SINGLE_PROCESS, DistributedContext


@dataclass(frozen=True)
class View:
    """A batch as the model sees it.

    images: float B C H W, normalised. targets: int64 B (class numbers) or float B K (probabilities, for mixed images).
    keys: int64 B; with `epoch` they determine the view, and `indices` are the samples' rows in the training split.
    class_weights: float K, for balance=loss: scaled so that the mean weight of the full batch's targets is 1, and the
    losses of its parts add up to the loss of the batch.
    sample_weights: float B, of each image in the loss, if the data has weights: over all training images, their mean is
    1.
    """

    images: Tensor
    targets: Tensor
    keys: Tensor
    epoch: int
    class_weights: Tensor | None = None
    sample_weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def indices(self) -> Tensor:
        """int64 B: rows of the training split."""
        return rows_of(self.keys)

    def part(self, rows: slice) -> "View":
        """The view of some of the images, sharing memory."""
        weights = None if self.sample_weights is None else self.sample_weights[rows]
        return View(self.images[rows], self.targets[rows], self.keys[rows], self.epoch, self.class_weights, weights)

    def mean(self, losses: Tensor) -> Tensor:
        """The mean of the images' losses B, each times the weight of its image."""
        return (losses if self.sample_weights is None else losses * self.sample_weights).mean()


class BatchAugmenter:
    """Moves batches to a device, augments and normalises them there; a pure function of batch and epoch.

    class_weights: K, of each class in the loss; None: all equal. sample_weights: N, of each training image, likewise.
    """

    def __init__(
        self,
        config: TrainConfig,
        preprocess: Preprocess,
        num_classes: int,
        device: torch.device,
        class_weights: npt.ArrayLike | None = None,
        distributed: DistributedContext = SINGLE_PROCESS,
        sample_weights: npt.NDArray[np.float64] | None = None,
    ) -> None:
        self.augment = config.augment
        self.preprocess = preprocess
        self.num_classes = num_classes
        self.seed = config.seed
        self.device = device
        self.distributed = distributed
        self.class_weights = None
        if class_weights is not None:
            self.class_weights = torch.as_tensor(class_weights, dtype=torch.float32, device=device)
        self.sample_weights = None
        if sample_weights is not None:
            self.sample_weights = torch.as_tensor(sample_weights / sample_weights.mean(), dtype=torch.float32)

    @torch.no_grad()
    def __call__(self, batch: Batch, epoch: int) -> View:
        there = batch.to(self.device)
        weights = None if self.sample_weights is None else self.sample_weights[batch.indices].to(self.device)
        images, targets = augment(
            there.images,
            there.labels,
            self.num_classes,
            batch.keys,
            config=self.augment,
            preprocess=self.preprocess,
            seed=self.seed,
            epoch=epoch,
            sample_weights=weights,
        )
        if weights is not None and targets.is_floating_point():
            weights = targets.sum(dim=1)
            targets = targets / weights[:, None].clamp_min(torch.finfo(torch.float32).tiny)  # 0 / 0: a target of zeros
        return View(images, targets, batch.keys, epoch, self._weights(targets), weights)

    def _weights(self, targets: Tensor) -> Tensor | None:
        """The class weights, scaled so that the mean weight of this batch's targets, over all processes, is 1."""
        weights = self.class_weights
        if weights is None:
            return None
        each = targets @ weights if targets.is_floating_point() else weights[targets]
        total = torch.stack([each.sum(), torch.full_like(weights[0], len(each))])
        self.distributed.all_reduce(total)
        return weights * total[1] / total[0]
