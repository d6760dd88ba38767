"""Calibration against scikit-learn and by hand."""

import math

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from vitrail.evaluation.calibration import calibration_bins, expected_calibration_error


def test_bins_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1, 500)
    correct = rng.random(500) < confidence**2
    accuracy, mean = calibration_curve(correct, confidence, n_bins=15)
    found = calibration_bins(confidence, correct)
    assert [each["accuracy"] for each in found] == pytest.approx(accuracy)
    assert [each["confidence"] for each in found] == pytest.approx(mean)
    assert all(each["low"] < each["confidence"] <= each["high"] for each in found)
    weights = np.array([each["images"] for each in found]) / 500
    assert expected_calibration_error(confidence, correct) == pytest.approx((weights * abs(accuracy - mean)).sum())


def test_expected_calibration_error_by_hand() -> None:
    # One bin with 0.62 and 0.65 (one right of two), one with 0.99 (right).
    confidence, correct = np.array([0.62, 0.65, 0.99]), np.array([True, False, True])
    expected = (abs(0.62 + 0.65 - 1) + abs(0.99 - 1)) / 3
    assert expected_calibration_error(confidence, correct) == pytest.approx(expected)
    # Bins are open below and closed above: 1/15 falls into the first.
    assert expected_calibration_error(np.array([1 / 15, 0.07]), np.array([True, False])) == pytest.approx(
        (abs(1 / 15 - 1) + 0.07) / 2
    )
    assert math.isnan(expected_calibration_error(np.array([]), np.array([], dtype=bool)))
