"""Confidence intervals against scipy's."""

import pytest
from scipy.stats import binomtest

from vitrail.evaluation.statistics import wilson


@pytest.mark.parametrize(("correct", "count"), [(90, 100), (0, 7), (7, 7), (1, 3), (9_123, 10_000)])
def test_wilson_is_scipys(correct: int, count: int) -> None:
    expected = binomtest(correct, count).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson(correct / count, count) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-2)


def test_no_images() -> None:
    assert wilson(float("nan"), 0) == (0, 100)
