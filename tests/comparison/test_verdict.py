"""Results of planted measurements."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import linregress

from vitrail.comparison.plan import Contender, Plan
from vitrail.comparison.verdict import correct_by_model, find_crossings, paragraph, slope, spread, summarize

NAMES = ("vit_nano_patch2_8", "resnet20_32", "resnet18")
TIMING = {"latency_ms": 1.0, "resolution": [{"scale": s, "size": [8, 8], "ms": s} for s in (1.0, 1.5, 2.0)]}


def record(model: str, share: int, seed: int, correct: Any, indices: Any = None) -> dict[str, Any]:
    kinds = {"noise": {"1": 50.0, "3": 30.0}, "blur": {"1": 60.0, "3": 40.0}}
    return {
        "model": model, "share": share, "seed": seed, "train_images": 10 * share, "top1": 100 * float(np.mean(correct)),
        "loss": 1.0, "ece": 0.1, "seconds": 1.0, "images_per_second": 1.0, "epochs": 2, "params": 3, "bytes": 4,
        "indices": list(range(len(correct))) if indices is None else list(indices),
        "correct": "".join("01"[int(hit)] for hit in correct),
        "probes": {
            "images": 5, "clean": 90.0, "corruptions": kinds, "shuffling": {"2": 20.0},
            "translation": {"pixels": 1, "top1": 80.0, "changed": 10.0},
        },
    }  # fmt: skip


def result(accuracies: dict[str, dict[int, float]], count: int = 400, seeds: int = 3) -> dict[str, Any]:
    """Of models whose errors are independent: accuracy by share."""
    rng = np.random.default_rng(0)
    shares = tuple(next(iter(accuracies.values())))
    plan = Plan(tuple(Contender(name, name, None, name) for name in accuracies), shares, seeds, {"budget": 60.0})
    records = [
        record(name, share, seed, rng.random(count) < by_share[share])
        for name, by_share in accuracies.items()
        for share in shares
        for seed in range(seeds)
    ]
    found = summarize(plan, records, dict.fromkeys(accuracies, TIMING))
    about = {"data": "planted", "images": {"train": 1000, "test": count}, "split": "test", "length": plan.length}
    found |= {"plan": plan.to_dict(), "most_frequent": 40.0, **about}
    return found | {"paragraph": paragraph(found)}


def test_a_clear_winner_is_named() -> None:
    a, b, _ = NAMES
    found = result({a: {100: 0.95}, b: {100: 0.7}})
    assert (found["best"], found["verdict"], found["images_needed"]) == (a, "a", None)
    assert found["difference"] == pytest.approx(25, abs=4)
    assert found["ci95"][0] > 15
    assert f"{a} is more accurate." in found["paragraph"]
    assert "95 % CI" in found["paragraph"]


def test_of_three_the_two_best_are_tested_and_all_pairs_are_adjusted() -> None:
    a, b, c = NAMES
    found = result({a: {100: 0.5}, b: {100: 0.8}, c: {100: 0.97}})
    assert (found["a"], found["b"], found["verdict"], found["best"]) == (b, c, "b", c)
    assert len(found["pairs"]) == 3
    assert "adjusted for 3 pairs by Holm's method" in found["paragraph"]


def test_models_that_have_learned_nothing_are_said_to() -> None:
    a, b, _ = NAMES
    text = "most frequent class (40.00 %)"
    assert text in result({a: {100: 0.3}, b: {100: 0.1}})["paragraph"]
    assert text not in result({a: {100: 0.3}, b: {100: 0.7}})["paragraph"]


def test_a_small_difference_needs_more_images() -> None:
    a, b, _ = NAMES
    found = result({a: {100: 0.90}, b: {100: 0.87}}, count=150, seeds=1)
    assert (found["best"], found["verdict"]) == (None, "cannot tell")
    assert found["images_needed"] > 100
    assert "more test images would." in found["paragraph"]
    assert "mid-p McNemar test" in found["paragraph"]


def test_where_the_lines_cross() -> None:
    a, b, _ = NAMES
    found = result({a: {25: 0.5, 100: 0.95}, b: {25: 0.8, 100: 0.85}}, count=1500)
    (crossing,) = found["crossings"]
    # -30 points at 250 images, +10 at 1,000: three quarters of the way, by the logarithm of the number.
    assert crossing == pytest.approx(250 * 4**0.75, rel=0.2)
    assert found["curve_pairs"][0]["difference"] < 0 < found["curve_pairs"][1]["difference"]
    assert "equal at about" in found["paragraph"]
    assert found["models"][0]["points_per_doubling"] > found["models"][1]["points_per_doubling"]


def test_crossings_and_slopes() -> None:
    assert find_crossings([(10, 1.0), (1000, 3.0)], [(10, 2.0), (1000, 2.0)]) == [100]
    assert find_crossings([(10, 3.0), (1000, 3.0)], [(10, 2.0), (1000, 2.0)]) == []
    points = [(100, 60.0), (200, 71.0), (400, 78.0), (400, 80.0)]
    x = np.log2([images for images, _ in points])
    assert slope(points) == pytest.approx(linregress(x, [y for _, y in points]).slope)
    assert slope(points[-2:]) is None


def test_spread_is_the_sample_standard_deviation() -> None:
    assert spread([1.0, 2.0, 4.0]) == {
        "mean": pytest.approx(7 / 3),
        "std": pytest.approx(np.std([1, 2, 4], ddof=1)),
        "n": 3,
    }
    assert spread([1.0])["std"] is None


def test_only_images_that_every_arm_could_read_are_compared() -> None:
    a, b, _ = NAMES
    records = [record(a, 100, 0, [1, 0, 1], [0, 2, 5]), record(b, 100, 0, [0, 1, 1, 1], [0, 1, 2, 5])]
    found = correct_by_model((a, b), records)
    assert found[a].tolist() == [[True, False, True]]
    assert found[b].tolist() == [[False, True, True]]
