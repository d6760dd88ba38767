"""The gate's arithmetic, on planted logits with a known answer."""

import numpy as np
import numpy.typing as npt
import pytest

from deploy.digit_models import PREPROCESS
from vitrail.data.dataset import ArraySplit
from vitrail.deploy.gate import Agreement, CheckImages, Limits, reject_speed
from vitrail.inference.engine import SplitReader

N, K = 1000, 4
LABELS = np.arange(N) % K


def logits_of(classes: npt.NDArray[np.int64], scale: float = 8.0) -> npt.NDArray[np.float32]:
    return (scale * np.eye(K)[classes]).astype(np.float32)


def check(labelled: bool = True) -> CheckImages:
    """The model is right on all but the first 100 images."""
    split = ArraySplit(np.zeros((N, 8, 8), np.uint8), LABELS)
    predicted = LABELS.copy()
    predicted[:100] = (predicted[:100] + 1) % K
    reader = SplitReader(split, PREPROCESS)
    labels = LABELS if labelled else None
    return CheckImages(reader, list(range(N)), logits_of(predicted), labels, "planted", "test", [])


def changed(lost: int, gained: int) -> npt.NDArray[np.float32]:
    """The logits of an export that is wrong on `lost` images on which the model is right, and right on `gained`."""
    logits = check().logits.copy()
    logits[100 : 100 + lost] = np.roll(logits[100 : 100 + lost], 1, axis=1)
    logits[:gained] = logits_of(LABELS[:gained])
    return logits


def test_counted_by_hand() -> None:
    found = Agreement.of(check(), changed(lost=7, gained=3))
    assert found.images == N
    assert found.top1_reference == pytest.approx(90.0)
    assert found.top1 == pytest.approx(89.6)
    assert found.difference == pytest.approx(-0.4)
    assert found.agreement == pytest.approx(99.0)
    assert found.error == 8.0
    # The difference of paired counts has the variance (n10 + n01 - (n10 - n01)^2 / N) / N^2.
    deviation = 100 * ((10 - 16 / N) ** 0.5) / N
    assert found.ci95 is not None
    np.testing.assert_allclose(found.ci95, [-0.4 - 1.96 * deviation, -0.4 + 1.96 * deviation], atol=0.11)


@pytest.mark.parametrize(("lost", "gained", "refused"), [(3, 0, False), (4, 0, True), (50, 47, False), (0, 9, False)])
def test_at_most_the_allowed_points_may_be_lost(lost: int, gained: int, refused: bool) -> None:
    reason = Agreement.of(check(), changed(lost, gained)).reject(Limits(max_loss=0.3), exact=False)
    assert (reason is not None) == refused
    assert reason is None or "0.40 points" in reason


def test_without_labels_the_classes_have_to_agree() -> None:
    assert Agreement.of(check(labelled=False), changed(20, 0)).reject(Limits(), exact=False) is None
    reason = Agreement.of(check(labelled=False), changed(21, 0)).reject(Limits(), exact=False)
    assert reason
    assert "97.9 %" in reason


def test_float32_has_to_compute_the_same_logits() -> None:
    logits = check().logits.copy()
    logits[5, 2] += 0.009  # more than a thousandth of 8
    found = Agreement.of(check(), logits)
    assert found.top1 == found.top1_reference
    assert "0.009" in str(found.reject(Limits(), exact=True))
    assert found.reject(Limits(), exact=False) is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    logits = check().logits.copy()
    logits[0, 0] = value
    assert "not finite" in str(Agreement.of(check(), logits).reject(Limits(max_loss=100), exact=False))


def test_speed() -> None:
    assert reject_speed(1.15, Limits()) is None
    assert "1.14x" in str(reject_speed(1.14, Limits()))
    assert reject_speed(0.5, Limits(min_speedup=0)) is None
