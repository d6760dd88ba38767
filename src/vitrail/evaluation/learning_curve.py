"""What more training images would bring: the accuracy of a linear probe at growing sizes, continued by a power law.

Hestness et al., "Deep Learning Scaling is Predictable, Empirically", 2017 (https://arxiv.org/abs/1712.00409); Viering
and Loog, "The Shape of Learning Curves: a Review", 2021 (https://arxiv.org/abs/2103.10948).
Shapes: N images, C features, P sizes, D draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from vitrail.evaluation.linear_probe import LogisticRegression
from vitrail.utils.counter_rng import fold, permutation

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the training images, at which the accuracy is measured
DRAWS = 5
L2 = 1e-2

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LearningCurve:
    """Accuracies P D, 0 to 1, of a probe at P numbers of training images, each of D draws."""

    sizes: npt.NDArray[np.int64]
    accuracy: Floats


def measure_curve(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    num_classes: int,
    *,
    shares: Sequence[float] = SHARES,
    draws: int = DRAWS,
    l2: float = L2,
    seed: int = 0,
) -> LearningCurve:
    """Fit a linear head to random parts of `features` N C with classes `labels` N, and test each on the test images.

    Of a draw, the smaller parts are contained in the larger. Of all the images there is one part, and one fit.
    """
    sizes = np.unique(np.clip(np.rint(np.array(shares) * len(labels)), 2, len(labels)).astype(np.int64))
    accuracy = np.empty((len(sizes), draws))
    orders = [permutation(fold(seed, "learning curve", draw), 0, len(labels)) for draw in range(draws)]
    for row, size in enumerate(sizes):
        for draw, order in enumerate(orders):
            if size == len(labels) and draw:
                accuracy[row, draw] = accuracy[row, 0]
                continue
            head = LogisticRegression(features[order[:size]], labels[order[:size]], num_classes).fit(l2)
            predicted = (test_features.float() @ head.weight.T + head.bias).argmax(dim=1)
            accuracy[row, draw] = (predicted == test_labels).double().mean().item()
    return LearningCurve(sizes, accuracy)


@dataclass(frozen=True)
class Forecast:
    """The accuracy, 0 to 1, that is expected of one fit to `size` training images, and its 80 % interval."""

    size: int
    accuracy: float
    low: float
    high: float


_RATES = np.linspace(0.1, 1.5, 29)  # c of the power laws: from almost logarithmic to almost flat
_RESAMPLES = 2000


def forecast(curve: LearningCurve, size: int, *, seed: int = 0) -> Forecast:
    """Continue a curve of at least three sizes to `size` training images.

    The error is e + b n^-c with e, b >= 0, fitted by least squares, each size weighted by the inverse of its variance.
    Every resample of the draws is fitted with every c, and continued with one of them, chosen with a probability
    proportional to its likelihood: few points leave c open, and the interval has to say so. The spread of one fit is
    added. The interval is about the same test images; the median is the forecast. Raises ValueError for a curve with
    fewer sizes or without two draws.
    """
    if len(curve.sizes) < 3 or curve.accuracy.shape[1] < 2:
        raise ValueError("a learning curve needs at least three sizes and two draws of each")
    rng = np.random.default_rng(seed)
    sizes, errors = curve.sizes.astype(np.float64), 1 - curve.accuracy
    drawn = np.ptp(errors, axis=1) > 0  # of all the images there is one part, which has no spread
    # The spread falls with the square root of the size: one number from all sizes is steadier than one of each.
    spread = float(np.sqrt((errors.var(axis=1, ddof=1) * sizes)[drawn].mean())) if drawn.any() else 0.0
    std = np.maximum(spread / np.sqrt(sizes), 1e-4)
    std_mean = std / np.sqrt(np.where(drawn, errors.shape[1], 1))
    resampled = errors.mean(axis=1) + std_mean * rng.standard_normal((_RESAMPLES, len(sizes)))
    continued, misfit = np.array([_fit(sizes, resampled, std_mean, size, rate) for rate in _RATES]).swapaxes(0, 1)
    likelihood = np.exp((misfit.min(axis=0) - misfit) / 2).cumsum(axis=0)  # rates, resamples
    chosen = (likelihood < rng.random(_RESAMPLES) * likelihood[-1]).sum(axis=0)
    error = continued[chosen, np.arange(_RESAMPLES)] + spread / size**0.5 * rng.standard_normal(_RESAMPLES)
    low, accuracy, high = (float(each) for each in np.quantile(1 - error, (0.1, 0.5, 0.9)).clip(0, 1))
    return Forecast(size, accuracy, low, high)


def _fit(sizes: Floats, errors: Floats, std: Floats, target: int, rate: float) -> tuple[Floats, Floats]:
    """Fit errors R P by e + b x, x = (n / largest n)^-rate, e and b >= 0. Returns the error at `target` and the misfit,
    R each."""
    x, weight = (sizes / sizes[-1]) ** -rate, std**-2 / (std**-2).sum()
    x_mean, mean = float(x @ weight), errors @ weight
    # With b = 0 the best e is the mean, and with e = 0 the line passes through 0; between them the fit is free.
    slope = np.maximum((errors - mean[:, None]) @ (weight * (x - x_mean)) / float(weight @ (x - x_mean) ** 2), 0)
    offset = mean - slope * x_mean
    slope = np.where(offset < 0, errors @ (weight * x) / float(weight @ x**2), slope)
    offset = np.maximum(offset, 0)
    misfit = ((errors - offset[:, None] - slope[:, None] * x) ** 2) @ std**-2
    return offset + slope * (target / sizes[-1]) ** -rate, misfit
