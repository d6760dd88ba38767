"""The training objective: a task, which returns the loss, and cross-entropy with labels.

Shapes: B batch, K classes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import ConfigError
from vitrail.training.engine.batch_augmenter import View


class Task(ABC):
    """The loss of a run. lines: a description for the plan. teacher_fingerprint: of a teacher's weights, if any."""

    lines: tuple[str, ...] = ()
    teacher_fingerprint: str = ""

    @abstractmethod
    def __call__(self, model: nn.Module, view: View) -> Tensor:
        """The mean loss of a batch: a scalar with gradients."""

    def start_training(self) -> None:  # noqa: B027
        """Called once, after any trial steps and before the first step."""


@dataclass(frozen=True)
class Classify(Task):
    """Cross-entropy with label smoothing, 0 <= smoothing < 1, on class indices or soft targets.

    With kind "bce", binary cross-entropy, averaged over classes (Wightman et al., "ResNet strikes back", 2021,
    https://arxiv.org/abs/2110.00476). Soft targets above the threshold become 1 and others 0; None: unchanged.

    For a model with two outputs in training (DeiT's two heads), the mean of both losses.
    """

    smoothing: float = 0.0
    kind: Literal["ce", "bce"] = "ce"
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and self.kind != "bce":
            raise ConfigError("bce_threshold needs loss=bce: set it, or leave out bce_threshold")

    def __call__(self, model: nn.Module, view: View) -> Tensor:
        output = model(view.images)
        heads: tuple[Tensor, ...] = output if isinstance(output, tuple) else (output,)
        losses = [self.loss(logits, view) for logits in heads]
        return losses[0] if len(losses) == 1 else sum(losses[1:], losses[0]) / len(losses)

    def loss(self, logits: Tensor, view: View) -> Tensor:
        """The loss of one head's logits, B K, on the view's targets.

        With class weights w and target probabilities t it is sum(w t * -log p) / sum(w t), as in torch for class
        indices. Label smoothing changes the t of the numerator only. The loss of an image is multiplied by its sample
        weight, with a mean of 1 over the training images, as in scikit-learn.
        """
        if self.kind == "bce":
            return self._binary(logits, view)
        if view.class_weights is None and view.sample_weights is None:
            return F.cross_entropy(logits, view.targets, label_smoothing=self.smoothing)
        each = F.cross_entropy(
            logits.float(), view.targets, view.class_weights, label_smoothing=self.smoothing, reduction="none"
        )
        return view.mean(each)

    def _binary(self, logits: Tensor, view: View) -> Tensor:
        """Binary cross-entropy. The weight of an image is the mean of its classes' weights."""
        hard = not view.targets.is_floating_point()
        shares = F.one_hot(view.targets, logits.shape[1]).to(logits.dtype) if hard else view.targets
        targets = shares * (1 - self.smoothing) + self.smoothing / logits.shape[1]
        if self.threshold is not None:
            targets = (targets > self.threshold).to(logits.dtype)
        if view.class_weights is None and view.sample_weights is None:
            return F.binary_cross_entropy_with_logits(logits, targets)
        each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
        return view.mean(each if view.class_weights is None else each * (shares @ view.class_weights))
