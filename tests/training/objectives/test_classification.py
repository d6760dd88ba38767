"""Losses against hand-written mathematics and timm's."""

import math
from dataclasses import replace

import pytest
import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from vitrail.errors import ConfigError
from vitrail.training.engine.batch_augmenter import View
from vitrail.training.objectives.classification import Classify


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


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_is_timms(smoothing: float, threshold: float | None) -> None:
    timms = BinaryCrossEntropy(smoothing, threshold)
    task = Classify(smoothing, "bce", threshold)
    torch.testing.assert_close(task(Fixed(), view(LOGITS, LABELS)), timms(LOGITS, LABELS))
    # timm smooths shares where it mixes.
    torch.testing.assert_close(
        task(Fixed(), view(LOGITS, SHARES)), timms(LOGITS, SHARES * (1 - smoothing) + smoothing / 3)
    )


def test_binary_cross_entropy_by_hand() -> None:
    """One image, half of it of each of two classes: each is asked for by itself, -log of its probability."""
    logits, shares = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.5, 0.5]])
    p = 1 / (1 + math.exp(-2))
    expected = (math.log(2) - 0.5 * math.log(p) - 0.5 * math.log(1 - p)) / 2
    assert float(Classify(kind="bce")(Fixed(), view(logits, shares))) == pytest.approx(expected, abs=1e-6)
    wholly = (math.log(2) - math.log(p)) / 2
    task = Classify(kind="bce", threshold=0.3)
    assert float(task(Fixed(), view(logits, shares))) == pytest.approx(wholly, abs=1e-6)


def test_class_weights_count_images_in_binary_cross_entropy() -> None:
    weights = torch.tensor([2.0, 1.0, 0.5])
    task = Classify(0.1, "bce")
    single = torch.stack([task(Fixed(), view(LOGITS[b : b + 1], SHARES[b : b + 1])) for b in range(4)])
    weighed = replace(view(LOGITS, SHARES), class_weights=weights)
    torch.testing.assert_close(task(Fixed(), weighed), (single * (SHARES @ weights)).mean())
    hard = replace(view(LOGITS, LABELS), class_weights=weights)
    one_hot = replace(view(LOGITS, torch.eye(3)[LABELS]), class_weights=weights)
    torch.testing.assert_close(task(Fixed(), hard), task(Fixed(), one_hot))


def test_a_threshold_is_for_binary_cross_entropy() -> None:
    with pytest.raises(ConfigError, match="loss=bce"):
        Classify(threshold=0.2)
