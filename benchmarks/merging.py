"""Merged tokens and int8 at 224 px: accuracy and milliseconds of a ViT-S, beside the same network in timm.

    python -m benchmarks.merging [--data-dir FOLDER] [--runs runs/merging]
    python -m benchmarks.merging --model runs/photos --data photos/ --name merging_photos

Without --model, the classifier is trained on Fashion-MNIST, enlarged: two epochs of 6,000 images at 96 px, then one of
1,500 at 224. Exports: OpenVINO and ONNX Runtime in int8, without and with merged tokens (at most 0.5 % of the
calibration images change class). timm: eager, and its ONNX export quantised by NNCF and computed by OpenVINO, for any
batch size or for one image, with the same weights and calibration images.
Accuracy is on the test images; times are of one image and of 16, in turn, each after a rest.
"""

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.export import ONE, REST, timm_runtimes
from benchmarks.measure import write
from benchmarks.peers import timm_twin
from vitrail.classifier import Classifier, load
from vitrail.data.catalog import open_dataset
from vitrail.data.dataset import Dataset
from vitrail.deploy.candidates import Builder, Candidate
from vitrail.deploy.merging import choose_merging, merged_classifier
from vitrail.deploy.quantize.calibration import Calibration, choose_calibration
from vitrail.evaluation.timing import interleaved
from vitrail.inference.engine import SplitReader
from vitrail.inference.exported import open_runtime
from vitrail.prediction import SPLIT_OPTIONS
from vitrail.training.run import train

NAME = "vit_small_patch16_224"
MAX_LOSS = 0.5
_NNCF = "timm NNCF + OpenVINO"
_PEERS = ("timm eager", _NNCF, f"{_NNCF}{ONE}")


def images_of(data_dir: str | None, train_images: int) -> Dataset:
    """Fashion-MNIST with so many training images, 500 for validation and 1,000 test images."""
    whole = open_dataset("fashion-mnist", data_dir=data_dir)
    train, test = whole.split("train"), whole.split("test")
    parts = {
        "train": train.take(np.arange(train_images)),
        "val": train.take(np.arange(len(train) - 500, len(train))),
        "test": test.take(np.arange(1000)),
    }
    return replace(whole, splits=parts)


def classifier_of(data_dir: str | None, runs: Path) -> Classifier:
    """Trained from scratch at 96 px, then at 224; or read from `runs`."""
    small, large = runs / "small", runs / "large"
    settings: dict[str, Any] = {"batch_size": 32, "in_chans": 3}
    if not (small / "summary.json").exists():
        train(images_of(data_dir, 6000), model=NAME, out=small, img_size=96, epochs=2, **settings)
    if not (large / "summary.json").exists():
        weights = str(small / "model")
        train(images_of(data_dir, 1500), model=NAME, weights=weights, out=large, img_size=224, epochs=1, **settings)
    classifier = load(large, precision="off")
    assert isinstance(classifier, Classifier)
    return classifier


def own(model: str, data: str) -> tuple[Classifier, Dataset]:
    """A classifier, and its images with the split of its training."""
    classifier = load(model, precision="off")
    assert isinstance(classifier, Classifier)
    options = {key: value for key, value in classifier.notes["split"].items() if key in SPLIT_OPTIONS}
    return classifier, open_dataset(data, class_names=classifier.class_names, **options)


def exports(classifier: Classifier, calibration: Calibration, folder: Path) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Runtimes of the int8 exports by name, and the tokens that each block merges."""
    merging = choose_merging(classifier, list(calibration.images), MAX_LOSS)
    merged = merged_classifier(classifier, merging.schedule)
    found = {}
    for suffix, each in {"": classifier, ", merged": merged}.items():
        work = folder / f"work{suffix[2:]}"
        work.mkdir()
        builder = Builder(each, work, calibration, {"name": NAME, "fingerprint": ""})
        for target in ("openvino", "onnx"):
            found[f"vitrail {target} int8{suffix}"] = open_runtime(builder.build(Candidate(target, "int8")))
    return found, merging.schedule


def classes(call: Any, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """With batches of one image, as they are timed."""
    return np.array([np.asarray(call(image[None])).reshape(-1).argmax() for image in pixels])


def percent(same: np.ndarray[Any, Any]) -> float:
    return 100 * float(same.mean())


def test_images(dataset: Dataset, classifier: Classifier) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    split = dataset.split("test")
    read = SplitReader(split, classifier.preprocess)
    return np.stack([read(row) for row in range(len(split))]), np.asarray(split.labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--runs", type=Path, default=Path("runs/merging"))
    parser.add_argument("--model", help="a ViT-S, with --data: the images that it was trained on")
    parser.add_argument("--data")
    parser.add_argument("--name", default="merging", help="name of the JSON file in benchmarks/results")
    parser.add_argument("--rounds", type=int, default=31)
    given = parser.parse_args()
    if bool(given.model) != bool(given.data):
        parser.error("--model and --data belong together")
    if given.model:
        classifier, dataset = own(given.model, given.data)
    else:
        classifier, dataset = classifier_of(given.data_dir, given.runs), images_of(given.data_dir, 1500)
    calibration = choose_calibration(dataset, classifier.preprocess)
    pixels, labels = test_images(dataset, classifier)
    twin = timm_twin(NAME, classifier.model.config).eval()
    twin.load_state_dict(classifier.model.state_dict())

    def normal(images: np.ndarray[Any, Any]) -> torch.Tensor:
        return classifier.preprocess.normalize(torch.from_numpy(images).permute(0, 3, 1, 2)).contiguous()

    with tempfile.TemporaryDirectory() as folder:
        ours, schedule = exports(classifier, calibration, Path(folder))
        peers = timm_runtimes(twin, Path(folder), list(calibration.images), classifier)
        calls: dict[str, Any] = {label: lambda x, call=peers[label]: call(normal(x)) for label in _PEERS}
        calls |= {label: runtime.logits for label, runtime in ours.items()}
        for label in _PEERS[1:]:
            calls[label] = lambda x, call=peers[label]: next(iter(call(normal(x)).values()))

        # What is timed of timm begins with normalised tensors.
        def timed(count: int) -> dict[str, Any]:
            ready = {label: partial(peers[label], normal(pixels[:count])) for label in _PEERS}
            return ready | {label: partial(runtime.logits, pixels[:count]) for label, runtime in ours.items()}

        seconds = interleaved(timed(1), given.rounds, rest=REST)
        many = {label: call for label, call in timed(16).items() if not label.endswith(ONE)}
        of_16 = interleaved(many, max(5, given.rounds // 4), rest=REST)
        found = {label: torch.inference_mode()(classes)(call, pixels) for label, call in calls.items()}
        rows = [
            {
                "what": label,
                "top1": percent(found[label] == labels),
                "agreement": percent(found[label] == found["timm eager"]),
                "ms": 1e3 * median(seconds[label]),
                "speedup": _ratio(seconds["timm eager"], seconds[label]),
                "over_nncf": _ratio(seconds[_NNCF], seconds[label]),
            }
            for label in calls
        ]
    for row in rows:
        if (took := of_16.get(row["what"])) is not None:
            row |= {"ms_of_16": 1e3 * median(took), "speedup_of_16": _ratio(of_16["timm eager"], took)}
        times = f"{row['ms']:8.2f} ms, {row['speedup']:.2f}x eager, {row['over_nncf']:.2f}x NNCF"
        times += f"; 16: {row['ms_of_16']:.1f} ms, {row['speedup_of_16']:.2f}x eager" if "ms_of_16" in row else ""
        print(f"{row['what']:29} {row['top1']:6.2f} %, {row['agreement']:6.2f} % {times}")
    print("merged by block:", *schedule)
    command = f"python -m benchmarks.merging {'--model ... --data ... ' if given.model else ''}--name {given.name}"
    sizes = {"images": len(labels), "calibration": len(calibration.paths)}
    write(given.name, command, **sizes, schedule=list(schedule), results=rows)


def _ratio(slow: list[float], fast: list[float]) -> float:
    return median(a / b for a, b in zip(slow, fast, strict=True))


if __name__ == "__main__":
    main()
