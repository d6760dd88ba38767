"""From the measurements of all arms to the result: means, paired tests, where the lines cross, and a paragraph.

Shapes: S seeds, N test images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

import numpy as np
import numpy.typing as npt

from vitrail.comparison.plan import Plan
from vitrail.evaluation.significance import Comparison, compare_all
from vitrail.models.catalog import VARIANTS

Record = Mapping[str, Any]  # what `measure` returns


def summarize(plan: Plan, records: Sequence[Record], timings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The result as plain JSON; accuracies and differences are in percent and percentage points.

    a, b: the models of the verdict: the two, or of more the two that are most accurate on average, in the order of the
    plan. difference: of a minus b. best: the model that is more accurate than every other one by these tests, or None.
    p values are adjusted for the number of pairs by Holm's method; those of `curve_pairs`, at shares of the training
    images, are not. crossings: numbers of training images at which the mean accuracy of a and b is equal.
    """
    labels = [contender.label for contender in plan.contenders]
    models = [_model(plan, label, records, timings[label]) for label in labels]
    mean = {model["name"]: model["top1"]["mean"] for model in models}
    correct = correct_by_model(labels, [record for record in records if record["share"] == 100])
    pairs = compare_all(correct)
    first, second = sorted(sorted(labels, key=lambda label: -mean[label])[:2], key=labels.index)
    curve = [_point(label, share, records) for label in labels for share in plan.shares]
    crossings = find_crossings(_line(curve, first), _line(curve, second))
    won = {label: _beats_all(label, labels, pairs) for label in labels}
    return {
        "models": models,
        "test_images": next(iter(correct.values())).shape[1],
        "best": next((label for label in labels if won[label]), None),
        "a": first,
        "b": second,
        **_pair(pairs[first, second]),
        "pairs": [{"a": a, "b": b, **_pair(found)} for (a, b), found in pairs.items()],
        "curve": curve,
        "curve_pairs": [
            {"share": share, "a": first, "b": second, **_difference(_at(share, [first, second], records))}
            for share in plan.shares
        ],
        "crossings": crossings,
    }


def correct_by_model(labels: Iterable[str], records: Sequence[Record]) -> dict[str, npt.NDArray[np.bool_]]:
    """By label, whether each test image is classified correctly, S N; of the images that every arm could read."""
    common: npt.NDArray[np.int64] = reduce(np.intersect1d, [np.array(record["indices"]) for record in records])
    found: dict[str, list[npt.NDArray[np.bool_]]] = {label: [] for label in labels}
    for record in sorted(records, key=lambda record: record["seed"]):
        hits = np.frombuffer(record["correct"].encode(), np.uint8) == ord("1")
        found[record["model"]].append(hits[np.isin(record["indices"], common)])
    return {label: np.stack(rows) for label, rows in found.items()}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None of one value) and number."""
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else None, "n": len(values)}


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """The least-squares slope of top-1 in log2(images): percentage points per doubling; None for a single size."""
    if len({images for images, _ in points}) < 2:
        return None
    return float(np.polyfit(np.log2([images for images, _ in points]), [top1 for _, top1 in points], 1)[0])


def find_crossings(one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> list[int]:
    """The x at which two lines of points (x, y) with the same x are equal, linear in log x between two points."""
    gaps = [(math.log(x), y - z) for (x, y), (_, z) in zip(one, other, strict=True)]
    found = []
    for (left, before), (right, after) in pairwise(gaps):
        if before * after < 0:
            found.append(round(math.exp(left + (right - left) * before / (before - after))))
    return found


def _model(plan: Plan, label: str, records: Sequence[Record], timing: Mapping[str, Any]) -> dict[str, Any]:
    contender = next(each for each in plan.contenders if each.label == label)
    own = [record for record in records if record["model"] == label]
    full = [record for record in own if record["share"] == 100]
    probes = [record["probes"] for record in full]
    corruptions = {
        kind: spread([fmean(each["corruptions"][kind].values()) for each in probes])
        for kind in probes[0]["corruptions"]
    }
    return {
        "name": label,
        "family": VARIANTS[contender.model].family,
        "top1": spread([record["top1"] for record in full]),
        "seconds": fmean(record["seconds"] for record in full),
        "images_per_second": fmean(record["images_per_second"] for record in full),
        "epochs": fmean(record["epochs"] for record in full),
        "latency_ms": timing["latency_ms"],
        "params": full[0]["params"],
        "bytes": full[0]["bytes"],
        "ece": spread([record["ece"] for record in full]),
        "loss": spread([record["loss"] for record in full]),
        "clean": spread([each["clean"] for each in probes]),
        "corrupted": spread([fmean(fmean(kind.values()) for kind in each["corruptions"].values()) for each in probes]),
        "corruptions": corruptions,
        "translation": {
            "pixels": probes[0]["translation"]["pixels"],
            "top1": spread([each["translation"]["top1"] for each in probes]),
            "changed": spread([each["translation"]["changed"] for each in probes]),
        },
        "shuffling": {grid: spread([each["shuffling"][grid] for each in probes]) for grid in probes[0]["shuffling"]},
        "points_per_doubling": slope([(record["train_images"], record["top1"]) for record in own]),
        "resolution": timing["resolution"],
    }


def _point(label: str, share: int, records: Sequence[Record]) -> dict[str, Any]:
    found = [record for record in records if record["model"] == label and record["share"] == share]
    images = found[0]["train_images"]
    return {"model": label, "share": share, "images": images, "top1": spread([record["top1"] for record in found])}


def _line(curve: Sequence[Mapping[str, Any]], label: str) -> list[tuple[float, float]]:
    return [(point["images"], point["top1"]["mean"]) for point in curve if point["model"] == label]


def _at(share: int, labels: Sequence[str], records: Sequence[Record]) -> Comparison:
    chosen = [record for record in records if record["share"] == share and record["model"] in labels]
    (found,) = compare_all(correct_by_model(labels, chosen)).values()
    return found


def _difference(found: Comparison) -> dict[str, Any]:
    return {
        "difference": 100 * found.difference,
        "ci95": [100 * bound for bound in found.ci95],
        "p_value": found.p_value,
    }


def _pair(found: Comparison) -> dict[str, Any]:
    return {**_difference(found), "verdict": found.verdict, "images_needed": found.images_needed}


def _beats_all(label: str, labels: Sequence[str], pairs: Mapping[tuple[str, str], Comparison]) -> bool:
    """Whether the model is significantly more accurate than each of the others."""
    others = [other for other in labels if other != label]
    return all(
        pairs[label, other].verdict == "a" if (label, other) in pairs else pairs[other, label].verdict == "b"
        for other in others
    )


# --- the paragraph


def paragraph(result: Mapping[str, Any]) -> str:
    """What was compared, how, and what came out, for a report; `result` is the content of compare.json."""
    models, plan, images = result["models"], result["plan"], result["images"]
    scores = "; ".join(f"{model['name']} {format_spread(model['top1'])} %" for model in models)
    n = plan["seeds"]
    started = "fine-tuned from published weights" if plan["settings"].get("pretrained") else "trained from scratch"
    trained = f"{started} for {result['length']} each on the same {images['train']:,} images"
    of_seeds = f"mean ± standard deviation of {n} seeds" if n > 1 else "one seed"
    parts = [
        f"On {result['data']}, {_listed([model['name'] for model in models])} were {trained}.",
        f"Top-1 accuracy on {result['test_images']:,} {result['split']} images ({of_seeds}): {scores}.",
        _chance_text(result),
        _verdict_text(result, n),
        _curve_text(result),
        f"Under corruptions top-1 is {_each(models, lambda m: _fixed(m['corrupted']['mean'], 1, ' %'))}, "
        f"and latency for one image on this machine {_each(models, lambda m: _fixed(m['latency_ms'], 2, ' ms'))}.",
    ]
    if result["split"] != "test":
        parts.append(f"There are no test images: the {result['split']} images also selected the epoch.")
    return " ".join(part for part in parts if part)


def _chance_text(result: Mapping[str, Any]) -> str:
    if max(model["top1"]["mean"] for model in result["models"]) > result["most_frequent"]:
        return ""
    return f"None is better than always naming the most frequent class ({result['most_frequent']:.2f} %): train longer."


def _verdict_text(result: Mapping[str, Any], seeds: int) -> str:
    a, b, (low, high) = result["a"], result["b"], result["ci95"]
    test = "bootstrap over seeds and test images" if seeds > 1 else "mid-p McNemar test"
    pairs = len(result["pairs"])
    adjusted = f", adjusted for {pairs} pairs by Holm's method" if pairs > 1 else ""
    measured = (
        f"{a} minus {b} is {result['difference']:+.2f} points (95 % CI {low:+.2f} to {high:+.2f}, "
        f"p {_p_value(result['p_value'])}, {test}{adjusted})"
    )
    if result["verdict"] != "cannot tell":
        winner = result[result["verdict"]]
        also = (
            "" if pairs == 1 or result["best"] == winner else "; the difference from another model is not significant"
        )
        return f"{measured}: {winner} is more accurate{also}."
    needed = result["images_needed"]
    if needed:
        return f"{measured}: cannot tell which is more accurate; about {_rounded(needed)} more test images would."
    if not result["difference"]:
        return f"{measured}: no difference was seen."
    return f"{measured}: cannot tell which is more accurate, and more test images alone would not; more seeds may."


def _curve_text(result: Mapping[str, Any]) -> str:
    shares = [each for each in result["curve_pairs"] if each["share"] < 100]
    if not shares:
        return ""
    least = shares[0]
    images = next(point["images"] for point in result["curve"] if point["share"] == least["share"])
    low, high = least["ci95"]
    text = (
        f"With {least['share']} % of the training images ({images:,}) the difference is "
        f"{least['difference']:+.2f} points (95 % CI {low:+.2f} to {high:+.2f})"
    )
    if result["crossings"]:
        crossings = _listed([_rounded(images) for images in result["crossings"]])
        return f"{text}; the mean accuracies are equal at about {crossings} images."
    return f"{text}; the lines do not cross in between."


def format_spread(value: Mapping[str, Any], digits: int = 2) -> str:
    """ "97.31 ± 0.12", or "97.31" of one value."""
    std = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{std}"


def _each(models: Sequence[Mapping[str, Any]], text: Any) -> str:
    return ", ".join(f"{text(model)} ({model['name']})" for model in models)


def _fixed(value: float, digits: int, unit: str) -> str:
    return f"{value:.{digits}f}{unit}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def _rounded(count: int) -> str:
    """Two significant digits."""
    digits = max(0, len(str(count)) - 2)
    return f"{round(count, -digits):,}"
