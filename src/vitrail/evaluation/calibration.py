"""Calibration: the difference between confidence and accuracy. Guo et al., "On Calibration of Modern Neural Networks",
2017 (https://arxiv.org/abs/1706.04599).

Shapes: N images.
"""

import numpy as np
import numpy.typing as npt

_BINS = 15


def calibration_bins(confidence: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_]) -> list[dict[str, float]]:
    """The reliability diagram: bounds ("low", "high"), "images", mean "confidence" and "accuracy" of each bin.

    confidence: the probabilities N of the predicted classes. correct: N. The bins have equal widths, are open below and
    closed above; those without images are left out.
    """
    index = np.clip(np.ceil(confidence * _BINS).astype(np.int64) - 1, 0, _BINS - 1)
    images = np.bincount(index, minlength=_BINS)
    sums = np.bincount(index, weights=confidence, minlength=_BINS)
    hits = np.bincount(index, weights=correct, minlength=_BINS)
    return [
        {
            "low": i / _BINS,
            "high": (i + 1) / _BINS,
            "images": int(images[i]),
            "confidence": float(sums[i] / images[i]),
            "accuracy": float(hits[i] / images[i]),
        }
        for i in range(_BINS)
        if images[i]
    ]


def expected_calibration_error(confidence: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_]) -> float:
    """The mean of |confidence - accuracy| over the bins, weighted by images: 0 to 1, NaN without images."""
    if not len(confidence):
        return float("nan")
    found = calibration_bins(confidence, correct)
    return sum(each["images"] * abs(each["confidence"] - each["accuracy"]) for each in found) / len(confidence)
