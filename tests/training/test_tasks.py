"""Losses against hand-written mathematics and timm's."""

import pytest
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from vitrail.training.tasks import Classify
from vitrail.training.views import View


class Fixed(nn.Module):
    """Gives its images' numbers as logits; with `heads`, once more and doubled."""

    def __init__(self, heads: bool = False) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return (x, 2 * x) if self.heads else x


def view(logits: Tensor, targets: Tensor) -> View:
    return View(logits, targets, torch.arange(len(targets)), 0)


LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0], [1.0, 1.0, 1.0], [-2.0, 0.3, 0.1]])
LABELS = torch.tensor([0, 1, 2, 2])
SHARES = torch.tensor([[0.7, 0.3, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.0, 0.2, 0.8]])


def test_label_smoothing_is_timms() -> None:
    for smoothing in (0.0, 0.1):
        expected = LabelSmoothingCrossEntropy(smoothing)(LOGITS, LABELS)
        torch.testing.assert_close(Classify(smoothing)(Fixed(), view(LOGITS, LABELS)), expected)


def test_shares_are_timms_and_smoothed() -> None:
    torch.testing.assert_close(Classify()(Fixed(), view(LOGITS, SHARES)), SoftTargetCrossEntropy()(LOGITS, SHARES))
    smoothed = SHARES * 0.9 + 0.1 / 3
    expected = -(smoothed * LOGITS.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(Classify(0.1)(Fixed(), view(LOGITS, SHARES)), expected)


def test_one_hot_shares_are_class_numbers() -> None:
    hard = torch.eye(3)[LABELS]
    task = Classify(0.1)
    torch.testing.assert_close(task(Fixed(), view(LOGITS, hard)), task(Fixed(), view(LOGITS, LABELS)))


def test_two_heads_learn_the_mean_of_both_losses() -> None:
    task = Classify(0.1)
    both = task(Fixed(heads=True), view(LOGITS, SHARES))
    one, two = task(Fixed(), view(LOGITS, SHARES)), task(Fixed(), view(2 * LOGITS, SHARES))
    assert float(both) == pytest.approx((float(one) + float(two)) / 2)
