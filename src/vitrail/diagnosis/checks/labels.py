"""Labels and classes: suspect labels, imbalance, and classes that are too small to be measured."""

import numpy as np

from vitrail.data.splits import MIN_FOR_TEST
from vitrail.diagnosis.findings import Evidence, Finding, of_groups
from vitrail.evaluation.metrics import IMBALANCE_RATIO
from vitrail.evaluation.statistics import wilson
from vitrail.utils.text import join_names

_STRONG = 10.0  # images of the largest class to those of the smallest, from which on imbalance is a warning
_ACCURACY = 0.9  # for which intervals are given


def suspect_label(evidence: Evidence) -> list[Finding]:
    """Labels that a linear probe on other images confidently disagrees with, most suspicious first."""
    scan, errors = evidence.scan, evidence.label_errors
    basis = "a linear probe on the model's features" if evidence.model else "a linear probe on simple features"
    if not errors.judged:
        advice = (
            f"Labels were not judged: {basis} predicts {errors.agreement:.0%} of them, and at least half is needed, "
            f"with at most a fifth suspect. Try {'another' if evidence.model else 'a'} --model, such as one trained on "
            "these images, or vit_small_patch14_reg4_dinov2."
        )
        if np.isnan(errors.quality).all():
            advice = "Labels were not judged: fewer than two classes have five images."
        return [Finding("suspect_label", "note", 0, [], advice)]
    advice = f"Labels with which {basis}, fitted to the other images, confidently disagrees. Look at the first ones."
    if not evidence.model:
        advice += " With --model, its features decide, which finds more of them."
    names = scan.dataset.class_names
    pairs = zip(errors.rows.tolist(), errors.guesses.tolist(), strict=True)
    notes = {scan.path(i): f"{scan.label(i)}, perhaps {names[guess]}" for i, guess in pairs}
    return of_groups(scan, "suspect_label", "warning", [[int(i)] for i in errors.rows], advice, notes=notes)


def imbalance(evidence: Evidence) -> list[Finding]:
    """Classes with many more training images than others. count: the classes with less than the most divided by 1.5."""
    dataset = evidence.scan.dataset
    counts = _counts(evidence, "train" if "train" in dataset.splits else dataset.eval_split())
    present = counts[counts > 0]
    if not len(present) or present.max() <= IMBALANCE_RATIO * present.min():
        return []
    ratio = present.max() / present.min()
    few = dataset.class_names[int(np.argmin(np.where(counts > 0, counts, counts.max() + 1)))]
    many = dataset.class_names[int(counts.argmax())]
    advice = (
        f"{many!r} has {ratio:.1f} times as many training images as {few!r} ({counts.max():,} and {present.min():,}). "
        "Read balanced top-1, the mean over classes; balance=sample or balance=loss weighs classes equally in training."
    )
    small = int((present * IMBALANCE_RATIO < present.max()).sum())
    return [Finding("imbalance", "warning" if ratio >= _STRONG else "note", small, [], advice)]


def tiny_class(evidence: Evidence) -> list[Finding]:
    """Classes with so few test images that their accuracy is unknown, and the interval that the whole test gives."""
    dataset = evidence.scan.dataset
    split = dataset.eval_split()
    counts = _counts(evidence, split)
    tiny = np.flatnonzero(counts < MIN_FOR_TEST)
    if not len(tiny):
        return []
    order = tiny[np.argsort(counts[tiny], kind="stable")]
    names = join_names([f"{dataset.class_names[k]} ({counts[k]})" for k in order], 10)
    largest = int(counts[order[-1]])
    low, high = wilson(1.0, largest)
    advice = (
        f"Fewer than {MIN_FOR_TEST} {split} images in {names}: even {largest} of {largest} correct would mean "
        f"{low:.0f} to {high:.0f} % (95 % CI). {test_interval(evidence)} Add images, or do not read their accuracies."
    )
    return [Finding("tiny_class", "warning", len(tiny), [], advice)]


def test_interval(evidence: Evidence) -> str:
    """A sentence: how precisely a test of this size measures an accuracy of 90 %."""
    split = evidence.scan.dataset.eval_split()
    count = int(_counts(evidence, split).sum())
    low, high = wilson(_ACCURACY, count)
    return f"On all {count:,} {split} images, a measured accuracy of 90 % has a 95 % CI of {low:.1f} to {high:.1f} %."


def _counts(evidence: Evidence, split: str) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Readable images of each class in a split."""
    scan = evidence.scan
    inside = scan.splits == scan.split_names.index(split)
    return np.bincount(scan.labels[inside], minlength=scan.dataset.num_classes)
