"""What explanations are worth: whether they find the pixels that decide, and what they cost.

Three small models are trained on images in which one object of 32 px decides (see planted_evidence.py), then explained
on test images that they classify correctly. Of every method: how often the peak of the heatmap lies in the object, how
much of the positive part lies in it, whether the peak moves to the other object of an image with two when the other
class is explained, how often the faithfulness score is above the 99th percentile of random rankings, also of the map
for a class that is not in the image, and how like the map is to that of the same network with its head, or all weights,
drawn anew (Adebayo et al., "Sanity Checks for Saliency Maps", 2018, https://arxiv.org/abs/1810.03292).

    python -m benchmarks.explain                      train, measure, and time; half an hour on 2 cores for each
    python -m benchmarks.explain --seed 0 --model vit one of the trainings and its figures
    python -m benchmarks.explain --report             the table of what is there

A training that was stopped goes on where it stood; one that is finished is not repeated.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks.explain_cost import cost
from benchmarks.measure import spread, write
from benchmarks.planted_evidence import CENTRE, CLASSES, INPUT, NOTHING, OBJECT, SIDE, Planted, planted_images
from benchmarks.planted_models import EPOCHS, MODELS, MORE_SETTINGS, SETTINGS, TRAIN_IMAGES, new_model, train
from vitrail.classifier import Classifier
from vitrail.explanation import faithfulness as scores
from vitrail.explanation.explain import compute_maps, compute_scores
from vitrail.explanation.methods.attention import positive_products, relevance
from vitrail.explanation.methods.method import Method
from vitrail.explanation.methods.table import METHODS, choose_method, default_method, methods_of
from vitrail.explanation.targets import Target
from vitrail.models.base import ImageModel

Numbers = npt.NDArray[np.int64]
Masks = npt.NDArray[np.bool_]
SEEDS = range(1)
TEST_SEED, TWO_SEED = 1_000, 2_000  # of the images; never those of training
FRESH_SEED, FRESH = 78, 800  # images that were looked at only after all settings had been chosen
DECOY_SEED = 80  # of as many images with decoys
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu(gradient * weights)": positive_products,
    "gradient * weights": lambda gradient, weights: gradient * weights,
    "relu(gradient)": lambda gradient, weights: gradient.relu(),
    "weights": lambda gradient, weights: weights,
}
FIGURES = ("peak_inside", "positive_share_inside", "peak_moves", "ms_per_image")
NOTE = (
    "One seed. Models and settings were chosen by images like those of `methods`, with other trainings, not by those "
    "with one object of `confirmation` (seed 78). Trained on 32,000 images, a ViT had 93.8 % of its peaks inside on "
    "images of seed 77, so it is trained on 64,000. `peak_moves` of `methods` is of images whose two classes the model "
    "ranks first (both_found, %). Other programs ran meanwhile."
)
COUNT = 200  # test images that are explained
REDRAWN = 64  # images whose maps are compared with those of other networks
REDRAWS, FEWER = 10, 3  # of these networks: for the default method, and for others
ORDERS = 200  # random orders that a score is compared with
BATCH = 32


def model_input(clf: Classifier, images: npt.NDArray[np.uint8]) -> Tensor:
    """The model's input B C 96 96: the central pixels of the images, normalised."""
    inner = np.ascontiguousarray(images[:, CENTRE, CENTRE])
    return clf.preprocess.normalize(torch.from_numpy(inner).permute(0, 3, 1, 2))


def inside_input(planted: Planted) -> Masks:
    """Whether a pixel of the model's input is in the object: N objects 96 96."""
    return planted.inside()[..., CENTRE, CENTRE]


def upsampled(maps: Tensor) -> npt.NDArray[np.float32]:
    """Maps B h w at the resolution of the input, B 96 96, bilinear."""
    cell = -(-INPUT // maps.shape[-1])
    large = F.interpolate(maps[:, None], scale_factor=cell, mode="bilinear", align_corners=False)
    pixels: npt.NDArray[np.float32] = large[:, 0, :INPUT, :INPUT].numpy()
    return pixels


def maps_of(model: nn.Module, images: Tensor, labels: Numbers, method: str | Method) -> Tensor:
    """Maps N h w, of each image for its label."""
    chosen, parts = choose_method(method, model) if isinstance(method, str) else method, []
    for at in range(0, len(images), BATCH):
        target = Target(CLASSES, tuple(labels[at : at + BATCH].tolist()))
        parts.append(compute_maps(model, images[at : at + BATCH], chosen, target)[0])
    return torch.cat(parts)


def peaks_inside(maps: Tensor, inside: Masks) -> Masks:
    """Whether the largest value of the upsampled map lies in the object: bool N. inside: bool N 96 96."""
    flat = upsampled(maps).reshape(len(maps), -1)
    hits: Masks = inside.reshape(len(maps), -1)[np.arange(len(maps)), flat.argmax(axis=1)]
    return hits


def share_inside(maps: Tensor, inside: Masks) -> npt.NDArray[np.float64]:
    """The part of the sum of positive values that lies in the object: N, 0 to 1."""
    positive = upsampled(maps).clip(min=0).astype(np.float64)
    total = positive.sum(axis=(1, 2))
    part: npt.NDArray[np.float64] = (positive * inside).sum(axis=(1, 2)) / np.where(total > 0, total, 1)
    return part


def correct(clf: Classifier, planted: Planted) -> Masks:
    """Whether the model's best classes are those of the objects: bool N."""
    with torch.inference_mode():
        logits = torch.cat([clf.model(part) for part in model_input(clf, planted.images).split(BATCH)])
    objects = planted.labels.shape[1]
    best = logits.topk(objects).indices.sort(dim=1).values.numpy()
    matches: Masks = (best == np.sort(planted.labels, axis=1)).all(axis=1)
    return matches


def redrawn(model: ImageModel, seed: int, *, all_weights: bool) -> nn.Module:
    """A network with a newly drawn head on the model's other weights, or with all weights drawn anew."""
    other = new_model(model.config, 10_000 + seed).eval()
    if not all_weights:
        own = {name: value for name, value in model.state_dict().items() if not name.startswith(("head", "fc"))}
        assert len(own) < len(model.state_dict())
        other.load_state_dict({**other.state_dict(), **own})
    return other


def mean_likeness(one: Tensor, other: Tensor) -> float:
    """Spearman's correlation of the cells of two maps, of N images its mean; 0 where a map is constant."""
    pairs = zip(one.flatten(1).numpy(), other.flatten(1).numpy(), strict=True)
    return float(np.mean([0.0 if min(np.ptp(a), np.ptp(b)) == 0 else spearmanr(a, b).statistic for a, b in pairs]))


def faithfulness(clf: Classifier, images: Tensor, labels: Numbers, maps: Tensor) -> dict[str, Any]:
    """How the scores compare with ORDERS random orders for each image, of which `--score` takes 20: their 99th
    percentile needs more."""
    found, usual = [], scores.RANDOM
    scores.RANDOM = ORDERS
    try:
        for image, label, values in zip(images, labels.tolist(), maps, strict=True):
            found += compute_scores(clf.model, image[None], values[None], Target(CLASSES, label))
    finally:
        scores.RANDOM = usual
    return {
        "above_99th_percentile": percent(np.array([each.percentile > 99 for each in found])),
        "percentile": round(float(np.mean([each.percentile for each in found])), 1),
        "score": round(float(np.mean([each.score for each in found])), 4),
        "random_std": round(float(np.mean([each.random_std for each in found])), 3),
        "z_median": round(float(np.median([each.z for each in found])), 2),
    }


def method_figures(
    clf: Classifier, method: str, one: Planted, two: Planted, redrawn_images: int = REDRAWN
) -> dict[str, Any]:
    """What a method finds in images with one object and with two. redrawn_images: as REDRAWN."""
    images, labels, begin = model_input(clf, one.images), one.labels[:, 0], time.perf_counter()
    maps = maps_of(clf.model, images, labels, method)
    seconds = (time.perf_counter() - begin) / len(images)
    figures: dict[str, Any] = {
        **shares_inside(maps, one),
        "ms_per_image": round(1e3 * seconds, 1),
        "images_with_two": len(two.images),
        "peak_moves": percent(moved_peaks(clf, method, two)),
    }
    if METHODS[method].class_specific:
        some = slice(redrawn_images)
        figures["sanity"] = sanity(clf, method, images[some], labels[some], maps[some])
    if method in (default_method(clf.model), "rollout"):
        figures["faithfulness"] = faithfulness(clf, images, labels, maps)
    if method == default_method(clf.model):
        figures["another_class"] = another_class(clf, method, images[:REDRAWN], labels[:REDRAWN])
    return figures


def sanity(clf: Classifier, method: str, images: Tensor, labels: Numbers, maps: Tensor) -> dict[str, Any]:
    """Spearman's correlation with the maps of networks with a new head, and with all weights new: the mean over images
    for each network. Of a method with signs also that of magnitudes: a new head may turn every sign, and read the same
    pixels."""
    found: dict[str, Any] = {}
    for name, all_weights in (("head_redrawn", False), ("all_redrawn", True)):
        others = [
            maps_of(redrawn(clf.model, number, all_weights=all_weights), images, labels, method)
            for number in range(REDRAWS if method == default_method(clf.model) else FEWER)
        ]
        found[name] = spread([mean_likeness(maps, other) for other in others])
        if METHODS[method].signed or METHODS[method].negated_if_ruled_out:
            found[f"{name}_magnitude"] = spread([mean_likeness(maps.abs(), other.abs()) for other in others])
    return found


def another_class(clf: Classifier, method: str, images: Tensor, labels: Numbers) -> dict[str, Any]:
    """Faithfulness of the maps for a class that is not in the image, and of their magnitudes: each image's is drawn
    from the others of the patterns. below_mean: of how many its logit is less than the mean of all logits."""
    others = (labels + np.random.default_rng(0).integers(1, NOTHING, len(labels))) % NOTHING
    with torch.inference_mode():
        below = Target(CLASSES, tuple(others.tolist())).ruled_out(clf.model(images))
    maps = maps_of(clf.model, images, others, method)
    found: dict[str, Any] = {"below_mean": percent(below.numpy()), **faithfulness(clf, images, others, maps)}
    if METHODS[method].negated_if_ruled_out:
        found["magnitude"] = faithfulness(clf, images, others, maps.abs())
    return found


def other_formulas(clf: Classifier, one: Planted) -> dict[str, Any]:
    """Why the magnitudes of the map of a network with a new head are like its own: those of `relevance` with other
    products than relu(gradient * weights), and what the others lose."""
    images, labels, some = model_input(clf, one.images), one.labels[:, 0], slice(REDRAWN)
    found = {}
    for name, products in PRODUCTS.items():
        compute = partial(relevance, products=products)
        method = replace(METHODS["relevance"], compute=compute, negated_if_ruled_out=False)
        maps = maps_of(clf.model, images, labels, method)
        new = maps_of(redrawn(clf.model, 0, all_weights=False), images[some], labels[some], method)
        found[name] = {
            "peak_inside": percent(peaks_inside(maps, inside_input(one)[:, 0])),
            "head_redrawn": round(mean_likeness(maps[some], new), 3),
            **faithfulness(clf, images[some], labels[some], maps[some]),
        }
    return found


def confirmation(clf: Classifier) -> dict[str, Any]:
    """Peaks on more images, which no setting was chosen by; on images with decoys (see planted_evidence.py); and on
    every image with two objects, whether or not the model ranks their classes first. likeness_of_classes: Spearman's
    correlation of the maps for the two classes."""
    one = planted_images(FRESH, seed=FRESH_SEED)
    one = one.take(correct(clf, one))
    decoys = planted_images(FRESH, seed=DECOY_SEED, decoys=True)
    decoys = decoys.take(correct(clf, decoys))
    two = planted_images(2 * COUNT, seed=TWO_SEED, objects=2)
    found: dict[str, Any] = {
        "images": len(one.images),
        "images_with_decoys": len(decoys.images),
        "images_with_two": len(two.images),
    }
    for method in {default_method(clf.model), "rollout"} & set(methods_of(clf.model)):
        of_one, of_decoys = (
            maps_of(clf.model, model_input(clf, planted.images), planted.labels[:, 0], method)
            for planted in (one, decoys)
        )
        of_each = [maps_of(clf.model, model_input(clf, two.images), labels, method) for labels in two.labels.T]
        found[method] = {
            **shares_inside(of_one, one),
            "decoys": shares_inside(of_decoys, decoys),
            "peak_moves": percent(moved_peaks(clf, method, two)),
            "peak_of_magnitude_moves": percent(moved_peaks(clf, method, two, magnitude=True)),
            "likeness_of_classes": round(mean_likeness(*of_each), 3),
        }
    return found


def shares_inside(maps: Tensor, planted: Planted) -> dict[str, float]:
    """How often the peak lies in the only object of an image, and how much of the positive part, in %."""
    inside = inside_input(planted)[:, 0]
    return {
        "peak_inside": percent(peaks_inside(maps, inside)),
        "positive_share_inside": percent(share_inside(maps, inside)),
    }


def moved_peaks(clf: Classifier, method: str, two: Planted, *, magnitude: bool = False) -> Masks:
    """Whether the peak, of the map or of its magnitude, lies in the object whose class is explained: bool objects N."""
    images, found = model_input(clf, two.images), []
    for labels, inside in zip(two.labels.T, np.moveaxis(inside_input(two), 1, 0), strict=True):
        maps = maps_of(clf.model, images, labels, method)
        found.append(peaks_inside(maps.abs() if magnitude else maps, inside))
    return np.stack(found)


def percent(values: Masks | npt.NDArray[np.float64]) -> float:
    return round(100 * float(values.mean()), 2)


def figures_of(kind: str, seed: int, folder: Path, few: Sequence[str] = ()) -> dict[str, Any]:
    """All figures of one training. few: slow methods, which are given a quarter of the images with two objects, and of
    those whose maps are compared with those of other networks."""
    clf = train(kind, seed, folder)
    one = planted_images(2 * COUNT, seed=TEST_SEED)
    two = planted_images(2 * COUNT, seed=TWO_SEED, objects=2)
    chosen, both = (np.flatnonzero(correct(clf, planted)) for planted in (one, two))
    record: dict[str, Any] = {
        "test_top1": json.loads((folder / f"{kind}-{seed}" / "summary.json").read_text())["top1"],
        "images": len(chosen[:COUNT]),
        "images_with_two": len(both[:COUNT]),
        "both_found": percent(correct(clf, two)),
        "confirmation": confirmation(clf),
        "methods": {},
    }
    for method in methods_of(clf.model):
        part = 4 if method in few else 1
        record["methods"][method] = method_figures(
            clf, method, one.take(chosen[:COUNT]), two.take(both[: COUNT // part]), REDRAWN // part
        )
        print(kind, seed, method, record["methods"][method], flush=True)
    if default_method(clf.model) == "relevance":
        record["other_formulas"] = other_formulas(clf, one.take(chosen[:COUNT]))
    return record


def report(folder: Path, timing: dict[str, Any]) -> None:
    """Write what is there: every training's figures, and over seeds the mean and standard deviation."""
    found: dict[str, dict[str, Any]] = {kind: {} for kind in MODELS}
    for kind in MODELS:
        for path in sorted(folder.glob(f"{kind}-*/figures.json")):
            found[kind][path.parent.name.rpartition("-")[2]] = json.loads(path.read_text())
    summary = {}
    for kind, seeds in found.items():
        for method in next(iter(seeds.values()), {"methods": {}})["methods"]:
            rows = [record["methods"][method] for record in seeds.values()]
            summary[f"{kind} {method}"] = {key: spread([row[key] for row in rows]) for key in FIGURES}
            print(
                f"{kind:5} {method:21}", *(f"{key} {row['mean']}" for key, row in summary[f"{kind} {method}"].items())
            )
    data = {"side": SIDE, "input": INPUT, "object": OBJECT, "classes": CLASSES, "train_images": TRAIN_IMAGES}
    models = {kind: asdict(config) for kind, config in MODELS.items()}
    write(
        "explain",
        note=NOTE,
        data=data,
        models=models,
        settings=SETTINGS,
        more_settings=MORE_SETTINGS,
        epochs=EPOCHS,
        summary=summary,
        seeds=found,
        cost=timing,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="by default all")
    parser.add_argument("--seed", type=int, action="append", help="by default 0")
    parser.add_argument("--few", nargs="*", default=[], help="slow methods, measured on a quarter of some images")
    parser.add_argument("--cost", action="store_true", help="only the times")
    parser.add_argument("--report", action="store_true", help="measure nothing; write the table of what is there")
    parser.add_argument("--folder", type=Path, default=Path("runs/explain"))
    given = parser.parse_args()
    timing = given.folder / "cost.json"
    if not given.report and not given.cost:
        for seed in given.seed or SEEDS:
            for kind in given.model or MODELS:
                record = figures_of(kind, seed, given.folder, given.few)
                (given.folder / f"{kind}-{seed}" / "figures.json").write_text(json.dumps(record, indent=2))
    if given.cost or not (given.report or given.seed or given.model):
        given.folder.mkdir(parents=True, exist_ok=True)
        timing.write_text(json.dumps(cost(), indent=2))
    report(given.folder, json.loads(timing.read_text()) if timing.is_file() else {})


if __name__ == "__main__":
    main()
