"""Paired tests that say whether one classifier is better than another on the same test images.

Importing this imports neither torch nor scipy.
Shapes: S seeds (models trained alike but for the seed), N test images, the same for all that are compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt

from vitrail.evaluation.statistics import Z95

Correct = npt.NDArray[np.bool_]  # S N, or N for one model: whether each image is classified correctly
Verdict = Literal["a", "b", "cannot tell"]

ALPHA = 0.05
POWER = 0.8  # the chance to decide with as many images as `images_needed` says
RESAMPLES = 10_000

_CHUNK = 2**22  # image numbers that are drawn at once


@dataclass(frozen=True)
class Comparison:
    """A against B on the same test images.

    difference: the mean accuracy of A minus that of B, -1 to 1, with its 95 % interval `ci95`. p_value: two-sided, of
    no difference. images_needed: about how many more test images would decide with a chance of 80 %; None if the
    verdict is there already, or if more test images would not give one.
    """

    difference: float
    ci95: tuple[float, float]
    p_value: float
    verdict: Verdict
    images_needed: int | None


def compare_pair(a: Correct, b: Correct, *, seed: int = 0) -> Comparison:
    """Compare A with B: `a` S N and `b` S' N, or N each, say which images are classified correctly.

    Of one model each, the question is whether these two differ, and the p value is McNemar's. Of several seeds, it is
    whether the algorithms differ, and the p value is that of `bootstrap_difference`; what changing the training
    images would add is in neither. Raises ValueError if there are no images, or not the same.
    """
    difference, ci95, p_value = bootstrap_difference(a, b, seed=seed)
    if np.ndim(a) == np.ndim(b) == 1 or len(a) == len(b) == 1:
        p_value = mcnemar(np.ravel(a), np.ravel(b))
    return _decide(Comparison(difference, ci95, p_value, "cannot tell", None), a, b)


def compare_all(correct: Mapping[str, Correct], *, seed: int = 0) -> dict[tuple[str, str], Comparison]:
    """Every pair of two or more models or algorithms, with p values and verdicts adjusted by Holm's method.

    The intervals hold for one pair each, and are not adjusted.
    """
    pairs = list(combinations(correct, 2))
    found = [compare_pair(correct[a], correct[b], seed=seed) for a, b in pairs]
    adjusted = holm([each.p_value for each in found])
    return {
        (a, b): _decide(replace(each, p_value=float(p)), correct[a], correct[b])
        for (a, b), each, p in zip(pairs, found, adjusted, strict=True)
    }


def _decide(found: Comparison, a: Correct, b: Correct) -> Comparison:
    if found.p_value < ALPHA:
        return replace(found, verdict="a" if found.difference > 0 else "b", images_needed=None)
    return replace(found, verdict="cannot tell", images_needed=images_needed(a, b))


def mcnemar(a: Correct, b: Correct) -> float:
    """The two-sided mid-p value of McNemar's exact test of two models on the same images: `a` and `b` N.

    Fagerland, Lydersen and Laake, "The McNemar test for binary matched-pairs data: mid-p and asymptotic are better than
    exact conditional", 2013.
    """
    from scipy.stats import binom  # type: ignore[import-untyped,unused-ignore]

    a, b = _two_dimensional(a, b)
    if len(a) != 1 or len(b) != 1:
        raise ValueError(f"McNemar's test compares one model with one, not {len(a)} with {len(b)}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    fewer, discordant = min(only_a, only_b), only_a + only_b
    return min(1.0, float(2 * binom.cdf(fewer, discordant, 0.5) - binom.pmf(fewer, discordant, 0.5)))


def holm(p_values: Sequence[float]) -> npt.NDArray[np.float64]:
    """p values adjusted for their number, in the order given: compare each with the level for one test.

    Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


def bootstrap_difference(
    a: Correct, b: Correct, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, tuple[float, float], float]:
    """The mean accuracy of A minus that of B, its 95 % percentile interval and its two-sided p value.

    `a` S N and `b` S' N, or N each. Each resample draws images and seeds together. Images are drawn with replacement.
    Drawing a few seeds with replacement would understate their variance (of three seeds by a third, and the tails would
    be too short), so their effect is drawn from Student's t with the unbiased variance, pooled over A and B. What seed
    and image explain only together is in both parts, and is taken out of that of the images; seeds that vary by no more
    than that add nothing. Of one seed each, images alone are drawn, as by `scipy.stats.bootstrap`. The interval leaves
    out 0 exactly where p < 0.05.

    Efron and Tibshirani, "An Introduction to the Bootstrap", 1993. Bouthillier et al., "Accounting for Variance in
    Machine Learning Benchmarks", 2021 (https://arxiv.org/abs/2103.03098), on drawing seeds as well as images.
    """
    a, b = _two_dimensional(a, b)
    rng = np.random.default_rng(seed)
    # Integers, whose sums are exact: a difference of 0 has to be 0.
    scale = len(a) * len(b)
    gain = (len(b) * a.sum(axis=0) - len(a) * b.sum(axis=0)).astype(np.float64)
    count, rows = len(gain), max(1, _CHUNK // len(gain))
    draws = np.concatenate(
        [
            gain[rng.integers(0, count, (min(rows, resamples - start), count))].mean(axis=1)
            for start in range(0, resamples, rows)
        ]
    )
    draws /= scale
    difference = float(gain.mean() / scale)
    seeds, shared, freedom = _seed_variance(a, b)
    if seeds > shared:
        shrink = max(0.0, 1 - shared / float(draws.var())) ** 0.5 if draws.any() else 0.0
        draws = difference + (draws - difference) * shrink + seeds**0.5 * rng.standard_t(freedom, resamples)
    low = float(np.quantile(draws, ALPHA / 2, method="lower"))
    high = float(np.quantile(draws, 1 - ALPHA / 2, method="higher"))
    extreme = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return difference, (low, high), min(1.0, 2 * (extreme + 1) / (resamples + 1))


def images_needed(a: Correct, b: Correct) -> int | None:
    """About how many more test images would make the difference significant, with a chance of 80 %, if it is as seen.

    `a` S N and `b` S' N, or N each. None where more images would not decide: no difference is seen, or it is no larger
    than what the seeds explain, so that more seeds are needed.

    The normal approximation of Connor, "Sample size for testing differences in proportions for the paired-sample
    design", 1987, with the variance between seeds, which more images leave as it is.
    """
    from scipy.special import ndtri, stdtrit  # type: ignore[import-untyped,unused-ignore]

    a, b = _two_dimensional(a, b)
    gain = a.mean(axis=0) - b.mean(axis=0)
    difference = abs(float(gain.mean()))
    seeds, shared, freedom = _seed_variance(a, b)
    critical = float(stdtrit(freedom, 1 - ALPHA / 2) if freedom else 0.0) + float(ndtri(POWER))
    left = difference**2 - critical**2 * max(seeds - shared, 0.0)
    if left <= 1e-12:
        return None
    # Significance is judged under no difference, whose variance is the mean square; power under the difference seen.
    square = float(np.square(gain).mean())
    root = Z95 * math.sqrt(square) + float(ndtri(POWER)) * math.sqrt(max(square - difference**2, 0.0))
    return max(1, math.ceil(root**2 / left) - int(a.shape[1]))


def _seed_variance(a: Correct, b: Correct) -> tuple[float, float, int]:
    """The variance of the difference of means between seeds, pooled over A and B; how much of it is the interaction of
    seeds and images; and the degrees of freedom. All 0 where there is one seed each."""
    freedom, count = len(a) + len(b) - 2, a.shape[1]
    if not freedom or count == 1:
        return 0.0, 0.0, 0
    between = interaction = 0.0  # sums of squares
    for each in (a.astype(np.float64), b.astype(np.float64)):
        effect = each.mean(axis=1, keepdims=True) - each.mean()
        between += float(np.square(effect).sum())
        interaction += float(np.square(each - each.mean(axis=0) - effect).sum())
    factor = (1 / len(a) + 1 / len(b)) / freedom
    return between * factor, interaction * factor / (count - 1) / count, freedom


def _two_dimensional(a: Correct, b: Correct) -> tuple[Correct, Correct]:
    a, b = np.atleast_2d(np.asarray(a, dtype=bool)), np.atleast_2d(np.asarray(b, dtype=bool))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not a.size or not b.size:
        raise ValueError(f"A and B need the same images, at least one: {a.shape} and {b.shape}")
    return a, b
