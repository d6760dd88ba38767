"""Intervals and tests against statsmodels' and scipy's, and in simulation, where the answer is known."""

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import binom, binomtest, bootstrap, norm
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from vitrail.evaluation.significance import (
    bootstrap_difference,
    compare_all,
    compare_pair,
    holm,
    images_needed,
    mcnemar,
)
from vitrail.evaluation.statistics import wilson

Bools = npt.NDArray[np.bool_]


@pytest.mark.parametrize(("correct", "count"), [(90, 100), (0, 7), (7, 7), (1, 3), (9_123, 10_000)])
def test_wilson_is_scipys_and_statsmodels(correct: int, count: int) -> None:
    expected = binomtest(correct, count).proportion_ci(confidence_level=0.95, method="wilson")
    found = wilson(correct / count, count)
    assert found == pytest.approx((100 * expected.low, 100 * expected.high), rel=0, abs=1e-11)
    low, high = proportion_confint(correct, count, method="wilson")
    assert np.array(found) / 100 == pytest.approx((low, high), rel=0, abs=1e-12)


def test_no_images() -> None:
    assert wilson(float("nan"), 0) == (0, 100)


def pair(only_a: int, only_b: int, both: int = 5, neither: int = 3) -> tuple[Bools, Bools]:
    table = [(True, False)] * only_a + [(False, True)] * only_b + [(True, True)] * both + [(False, False)] * neither
    a, b = np.array(table).T
    return a, b


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (0, 5), (7, 7), (8, 7), (3, 12), (40, 61), (700, 610)])
def test_mcnemar_is_statsmodels_exact_test_less_half_of_the_observed_probability(counts: tuple[int, int]) -> None:
    only_a, only_b = counts
    exact = statsmodels_mcnemar([[5, only_a], [only_b, 3]], exact=True).pvalue
    # The p value has both tails: half of the observed outcome in each. Of a tie, the two tails share the outcome.
    expected = 1.0 if only_a == only_b else exact - binom.pmf(min(counts), sum(counts), 0.5)
    assert mcnemar(*pair(only_a, only_b)) == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_holm_is_statsmodels(count: int) -> None:
    p = np.random.default_rng(count).random(count) ** 3
    p[-1] = p[0]  # a tie
    np.testing.assert_allclose(holm(p.tolist()), multipletests(p, method="holm")[1], rtol=0, atol=1e-12)


def test_of_one_seed_each_the_bootstrap_is_scipys() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random(300) < 0.8, rng.random(300) < 0.75
    gain = a.astype(float) - b
    expected = bootstrap((gain,), np.mean, n_resamples=9_999, method="percentile", rng=np.random.default_rng(5))
    difference, (low, high), p_value = bootstrap_difference(a, b, seed=5, resamples=9_999)
    draws = expected.bootstrap_distribution
    assert difference == pytest.approx(gain.mean(), rel=0, abs=1e-12)
    assert low == pytest.approx(np.quantile(draws, 0.025, method="lower"), rel=0, abs=1e-12)
    assert high == pytest.approx(np.quantile(draws, 0.975, method="higher"), rel=0, abs=1e-12)
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval), rel=0, abs=1 / 300)
    tail = min((draws < 1e-12).sum(), (draws > -1e-12).sum())
    assert p_value == pytest.approx(2 * (tail + 1) / 10_000, rel=0, abs=1e-12)


def test_drawn_in_parts_the_images_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = simulate(np.random.default_rng(0), 3, 200, 0.1)
    whole = bootstrap_difference(a, b, resamples=999)
    monkeypatch.setattr("vitrail.evaluation.significance._CHUNK", 7_000)
    assert bootstrap_difference(a, b, resamples=999) == whole


def simulate(
    rng: np.random.Generator, seeds: int, images: int, seed_spread: float, gain: float = 0.0
) -> tuple[Bools, Bools]:
    """Which images are classified correctly by `seeds` models of two algorithms: a probit model with effects of image,
    of algorithm on an image, of seed, and of seed on an image. Their variances but for the seed's add up to 3."""
    image = rng.standard_normal(images)
    found = []
    for shift in (gain / 2, -gain / 2):
        own = 0.5**0.5 * rng.standard_normal(images)
        seed = seed_spread * rng.standard_normal((seeds, 1))
        noise = 1.5**0.5 * rng.standard_normal((seeds, images))
        found.append(1.5 + shift + image + own + seed + noise > 0)
    return found[0], found[1]


def true_difference(seed_spread: float, gain: float) -> float:
    total = (3 + seed_spread**2) ** 0.5
    return float(norm.cdf((1.5 + gain / 2) / total) - norm.cdf((1.5 - gain / 2) / total))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "images", "seed_spread"),
    [
        (1, 200, 0.0),
        (1, 1000, 0.0),
        (3, 200, 0.0),
        (3, 200, 0.1),
        (3, 1000, 0.0),
        (3, 1000, 0.1),
        (3, 1000, 0.03),
        (3, 1000, 0.3),
        (2, 500, 0.1),
        (5, 500, 0.1),
    ],
)
def test_the_interval_holds_the_true_difference_in_95_percent(seeds: int, images: int, seed_spread: float) -> None:
    rng = np.random.default_rng(1)
    runs, gain, held = 1500, 0.2, 0
    true = true_difference(seed_spread, gain)
    for run in range(runs):
        a, b = simulate(rng, seeds, images, seed_spread, gain)
        _, (low, high), _ = bootstrap_difference(a, b, seed=run, resamples=999)
        held += low <= true <= high
    print(f"seeds {seeds}, images {images}, spread of seeds {seed_spread}: coverage {100 * held / runs:.1f} %")
    assert 0.93 <= held / runs <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wilson", "mcnemar"])
def test_wilson_and_mcnemar_hold_their_level_in_simulation(kind: str) -> None:
    rng, runs, kept = np.random.default_rng(2), 4000, 0
    for _ in range(runs):
        a, b = simulate(rng, 1, 500, 0.0)
        if kind == "wilson":
            low, high = wilson(a.mean(), a.size)
            kept += low <= 100 * norm.cdf(1.5 / 3**0.5) <= high
        else:
            kept += mcnemar(a[0], b[0]) >= 0.05
    print(f"{kind}: {100 * kept / runs:.1f} %")
    assert 0.93 <= kept / runs <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "seed_spread"), [(3, 0.0), (3, 0.1), (3, 0.2), (5, 0.1)])
def test_a_against_a_has_a_winner_in_at_most_5_percent_of_200(seeds: int, seed_spread: float) -> None:
    rng = np.random.default_rng(7)
    winners = 0
    for run in range(200):
        a, b = simulate(rng, seeds, 300, seed_spread)
        found = compare_pair(a, b, seed=run)
        assert (found.verdict != "cannot tell") == (found.p_value < 0.05)
        winners += found.verdict != "cannot tell"
    print(f"seeds {seeds}, spread of seeds {seed_spread}: {winners} of 200")
    assert winners <= 10


def test_interval_and_p_value_agree() -> None:
    rng = np.random.default_rng(4)
    decided = 0
    for run in range(100):
        a, b = simulate(rng, 3, 300, 0.05, 0.25)
        _, (low, high), p_value = bootstrap_difference(a, b, seed=run, resamples=2_000)
        assert (low > 0 or high < 0) == (p_value < 0.05)
        decided += p_value < 0.05
    assert 10 < decided < 90


def test_verdicts() -> None:
    a, b = pair(60, 20, 400, 100)
    assert compare_pair(a, b).verdict == "a"
    assert compare_pair(b, a).verdict == "b"
    assert compare_pair(a, b).images_needed is None
    assert compare_pair(a, b).p_value == mcnemar(a, b)
    assert compare_pair(a, b).difference == pytest.approx(40 / 580, rel=0, abs=1e-12)
    same = compare_pair(a, a)
    assert (same.verdict, same.p_value, same.ci95, same.images_needed) == ("cannot tell", 1.0, (0.0, 0.0), None)
    assert compare_pair(np.tile(a, (3, 1)), np.tile(b, (3, 1))).verdict == "a"
    assert compare_pair(np.tile(a, (3, 1)), a[None]).verdict == "cannot tell"


def test_more_than_two_are_adjusted() -> None:
    a, b = pair(21, 9, 400, 100)
    c = np.roll(b, 1)
    alone = compare_pair(a, b)
    assert alone.verdict == "a"
    assert compare_all({"a": a, "b": b}) == {("a", "b"): alone}
    found = compare_all({"a": a, "b": b, "c": c})
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c")]
    p = [compare_pair(x, y).p_value for x, y in ((a, b), (a, c), (b, c))]
    assert [each.p_value for each in found.values()] == pytest.approx(multipletests(p, method="holm")[1], abs=1e-12)
    assert found["a", "b"].verdict == "cannot tell"
    assert found["a", "b"].images_needed is not None


def test_with_as_many_images_as_needed_the_test_decides_in_four_of_five() -> None:
    rng = np.random.default_rng(9)
    a, b = pair(30, 20, 300, 50)
    more = images_needed(a, b)
    assert more is not None
    count = len(a) + more
    decided = 0
    for _ in range(1000):
        chosen = rng.integers(0, len(a), count)  # new images like those seen
        decided += mcnemar(a[chosen], b[chosen]) < 0.05
    assert 0.75 < decided / 1000 < 0.85


def test_more_images_do_not_help_against_the_spread_of_seeds() -> None:
    rng = np.random.default_rng(0)
    accuracy = {"a": (0.9, 0.8, 0.7), "b": (0.85, 0.78, 0.68)}
    a, b = (np.array([rng.random(2000) < each for each in accuracy[name]]) for name in "ab")
    found = compare_pair(a, b)
    assert found.verdict == "cannot tell"
    assert found.images_needed is None


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="same images"):
        compare_pair(np.ones(3, bool), np.ones(4, bool))
    with pytest.raises(ValueError, match="same images"):
        compare_pair(np.ones((2, 0), bool), np.ones((2, 0), bool))
    with pytest.raises(ValueError, match="one model"):
        mcnemar(np.ones((2, 3), bool), np.ones((2, 3), bool))
