"""Learning curves: of planted power laws, and of real images, where the accuracy at twice the images is measured."""

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from vitrail.evaluation.learning_curve import LearningCurve, forecast, measure_curve

FASHION = Path("/usr/share/datasets/fashion-mnist")

Floats = npt.NDArray[np.float64]
Features = Callable[[Floats], Floats]


def planted(rate: float, limit: float, spread: float, seed: int = 0) -> LearningCurve:
    rng = np.random.default_rng(seed)
    sizes = np.array([100, 200, 400, 800, 1600])
    error = limit + 0.3 * (sizes / 100) ** -rate
    return LearningCurve(sizes, 1 - error[:, None] - spread / sizes[:, None] ** 0.5 * rng.standard_normal((5, 5)))


@pytest.mark.parametrize(("rate", "limit"), [(0.5, 0.05), (0.3, 0.0), (1.0, 0.1)])
def test_a_power_law_is_continued(rate: float, limit: float) -> None:
    found = forecast(planted(rate, limit, 1e-3), 3200)
    true = 1 - limit - 0.3 * 32**-rate
    assert found.accuracy == pytest.approx(true, abs=0.005)
    assert found.low <= found.accuracy <= found.high
    assert found.high - found.low < 0.02


def test_an_accuracy_that_does_not_grow_is_not_continued_upwards() -> None:
    flat = LearningCurve(np.array([100, 200, 400, 800]), np.tile([0.79, 0.8, 0.81], (4, 1)))
    assert forecast(flat, 1600).accuracy == pytest.approx(0.8, abs=0.004)
    falling = LearningCurve(np.array([100, 200, 400]), np.array([[0.85, 0.86], [0.8, 0.81], [0.75, 0.76]]))
    assert forecast(falling, 800).accuracy <= 0.82
    perfect = LearningCurve(np.array([100, 200, 400]), np.ones((3, 5)))
    assert forecast(perfect, 800).accuracy == pytest.approx(1, abs=1e-3)


def test_more_spread_and_further_ahead_is_less_certain() -> None:
    def width(spread: float, size: int) -> float:
        found = forecast(planted(0.5, 0.05, spread), size)
        return found.high - found.low

    assert width(0.02, 3200) < width(0.2, 3200)
    assert width(0.2, 3200) < width(0.2, 50_000)
    assert forecast(planted(0.5, 0.05, 0.1), 3200) == forecast(planted(0.5, 0.05, 0.1), 3200)


def test_too_few_points_are_refused() -> None:
    for shape in ((2, 5), (5, 1)):
        with pytest.raises(ValueError, match="three sizes"):
            forecast(LearningCurve(np.arange(1, shape[0] + 1), np.ones(shape)), 100)


def test_a_curve_is_measured_on_parts_of_the_images() -> None:
    images, labels = (torch.from_numpy(each) for each in load_digits(return_X_y=True))
    images = images.float()
    found = measure_curve(images[:300], labels[:300], images[1200:], labels[1200:], 10, draws=3, seed=1)
    assert found.sizes.tolist() == [19, 38, 75, 150, 300]
    assert found.accuracy.shape == (5, 3)
    assert (np.diff(found.accuracy.mean(axis=1)) > 0).all()
    assert np.ptp(found.accuracy[-1]) == 0
    assert np.ptp(found.accuracy[0]) > 0
    again = measure_curve(images[:300], labels[:300], images[1200:], labels[1200:], 10, draws=3, seed=1)
    np.testing.assert_array_equal(found.accuracy, again.accuracy)


def rectified(inputs: int, seed: int) -> Features:
    """200 random features."""
    rng = np.random.default_rng(seed)
    weight, bias = rng.standard_normal((inputs, 200)) * 3 / inputs**0.5, 0.3 * rng.standard_normal(200)
    return lambda images: np.maximum(images @ weight + bias, 0)


def small(images: Floats) -> Floats:
    return images.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)).reshape(-1, 196)


def fashion(name: str) -> tuple[Floats, npt.NDArray[np.int64]]:
    images, labels = (
        np.frombuffer(gzip.decompress((FASHION / f"{name}-{each}.gz").read_bytes()), np.uint8, offset=offset)
        for each, offset in (("images-idx3-ubyte", 16), ("labels-idx1-ubyte", 8))
    )
    return images.reshape(-1, 784) / 255, labels.astype(np.int64)


def tasks() -> Iterator[tuple[str, Features, list[npt.NDArray[np.generic]]]]:
    """Twenty: a name, frozen features, and train images, their labels, test images, their labels."""
    images, labels = load_digits(return_X_y=True)
    pca = PCA(10, random_state=0).fit(images / 16).transform
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(len(labels))
        x, y = images[order] / 16, labels[order]
        for name, features in {"pixels": np.array, "PCA": pca, "random": rectified(64, seed)}.items():
            yield f"digits, {name}", features, [x[:1200], y[:1200], x[1200:], y[1200:]]
    (x, y), (test_x, test_y) = fashion("train"), fashion("t10k")
    pca = PCA(40, random_state=0).fit(x[:5000]).transform
    for size, seeds in ((1200, 2), (2400, 2), (4800, 1)):
        for seed in range(seeds):
            order = 5000 + np.random.default_rng(seed).permutation(55_000)[:size]
            for name, features in {"14 x 14 pixels": small, "PCA": pca, "random": rectified(784, seed)}.items():
                if size != 4800 or name != "random":
                    yield f"Fashion-MNIST {size}, {name}", features, [x[order], y[order], test_x[:5000], test_y[:5000]]


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_twice_the_images_are_forecast_within_1_5_points() -> None:
    errors, held = [], 0
    for name, features, (x, y, test_x, test_y) in tasks():
        train, test = (torch.from_numpy(features(each)).float() for each in (x, test_x))
        labels, test_labels = torch.from_numpy(y), torch.from_numpy(test_y)
        half = len(labels) // 2
        curve = measure_curve(train[:half], labels[:half], test, test_labels, 10)
        true = measure_curve(train, labels, test, test_labels, 10, shares=(1.0,), draws=1).accuracy.item()
        found = forecast(curve, len(labels))
        errors.append(100 * (found.accuracy - true))
        held += found.low <= true <= found.high
        interval = f"{100 * found.low:.1f} to {100 * found.high:.1f}"
        print(
            f"{name}: at half {100 * curve.accuracy[-1, 0]:.1f} %, forecast {100 * found.accuracy:.1f} ({interval}), "
            f"measured {100 * true:.1f}"
        )
    near = np.abs(errors) <= 1.5
    print(f"{len(errors)} curves, {near.sum()} within 1.5 points, mean error {np.mean(errors):+.2f}, holds {held}")
    assert near.mean() >= 0.8
    assert 0.7 <= held / len(errors) <= 0.9
