"""What `vitrail doctor` finds among planted faults, what it finds where there are none, and what it costs.

    python -m benchmarks.doctor --fashion FOLDER --textile FOLDER [--parts duplicates,clean,labels,cleanvision,speed]

FOLDER of --fashion: the idx files of Fashion-MNIST (Debian's dataset-fashion-mnist); of --textile: 2,000 photographs
(conformal-clip-data 0.1.4). Faults are planted in copies in a temporary folder. Results of parts are merged.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measure import RESULTS, write
from benchmarks.planted_faults import agreement
from vitrail.data.catalog import open_dataset
from vitrail.data.dataset import ArraySplit, Dataset, FileSplit, Sizes
from vitrail.data.duplicates.groups import near_pairs
from vitrail.diagnosis.doctor import doctor
from vitrail.diagnosis.label_errors import find_label_errors, simple_features
from vitrail.diagnosis.scan import scan_images

PLANTED = 100  # copies of each kind


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def resized(image: Image.Image, factor: float) -> Image.Image:
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.BICUBIC)


def cropped(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    """80 % of each side, anywhere."""
    width, height = round(image.width * 0.8), round(image.height * 0.8)
    x, y = (int(draw.integers(0, whole - part + 1)) for whole, part in ((image.width, width), (image.height, height)))
    return image.crop((x, y, x + width, y + height))


def changes(draw: np.random.Generator) -> dict[str, Any]:
    turn = Image.Transpose
    return {
        "exact": lambda image: image,
        "recompressed": lambda image: jpeg(image, int(draw.integers(50, 96))),
        "resized": lambda image: jpeg(resized(image, float(draw.uniform(0.5, 2))), 90),
        "mirrored": lambda image: jpeg(image.transpose(turn.FLIP_LEFT_RIGHT), 90),
        "rotated": lambda image: jpeg(image.transpose((turn.ROTATE_90, turn.ROTATE_180)[draw.integers(2)]), 90),
        "cropped": lambda image: jpeg(cropped(image, draw), 90),
    }


def duplicates(images: list[Image.Image], folder: Path) -> dict[str, Any]:
    """Recall of each kind, and the precision of all pairs. A group is right if all of it comes from one image."""
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True)
    origin: dict[str, int] = {}
    kinds: dict[str, str] = {}

    def save(image: Image.Image, name: str, i: int, kind: str = "") -> None:
        path = str(folder / f"{name}.png")
        image.save(path, compress_level=1)
        origin[path], kinds[path] = i, kind

    for i, image in enumerate(images):
        save(image, f"{i:05d}", i)
    for kind, change in changes(draw).items():
        for i in draw.choice(len(images), PLANTED, replace=False).tolist():
            save(change(images[i]), f"{kind}-{i:05d}", i, kind)
    paths = sorted(origin)
    labels = np.zeros(len(paths), np.int64)
    split = FileSplit(paths, labels, np.array([Image.open(path).size[::-1] for path in paths]))
    dataset = Dataset("planted", ("a", "b"), {"train": split}, Sizes.of(split.sizes))
    start = time.perf_counter()
    found = doctor(dataset, forecast_model="none").evidence
    seconds = time.perf_counter() - start
    scan = found.scan
    right = wrong = 0
    together: dict[str, set[int]] = {}
    for group in found.duplicates.every:
        sources = [origin[scan.path(i)] for i in group]
        for i in group:
            together.setdefault(kinds[scan.path(i)], set()).update(
                [i] if sources.count(origin[scan.path(i)]) > 1 else []
            )
        same = sum(sources.count(s) * (sources.count(s) - 1) // 2 for s in set(sources))
        right, wrong = right + same, wrong + len(group) * (len(group) - 1) // 2 - same
    return {
        "images": len(images),
        "planted_of_each": PLANTED,
        "recall": {kind: len(together.get(kind, ())) / PLANTED for kind in changes(draw)},
        "pairs_right": right,
        "pairs_wrong": wrong,
        "precision": right / max(1, right + wrong),
        "seconds": round(seconds, 1),
    }


def clean(pixels: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Near-duplicate pairs on images without planted copies. Equal images in the source are not counted."""
    split = ArraySplit(pixels, np.zeros(len(pixels), np.int64), "fashion-mnist/train")
    dataset = Dataset("clean", ("a", "b"), {"train": split}, Sizes.of(split.sizes))
    start = time.perf_counter()
    scan = scan_images(dataset)
    pairs = near_pairs(scan.thumbs, scan.colours)
    seconds = time.perf_counter() - start
    names = [(scan.path(c.first), scan.path(c.second)) for c, _ in pairs]
    return {"images": len(pixels), "pairs": len(names), "names": names[:20], "seconds": round(seconds, 1)}


def wrong_labels(name: str, dataset: Dataset, share: float = 0.05) -> dict[str, Any]:
    """Precision and recall of suspect labels, with a share of the labels replaced by another class."""
    draw = np.random.default_rng(0)
    scan = scan_images(dataset)
    labels, classes = scan.labels.copy(), dataset.num_classes
    planted = draw.choice(len(labels), round(share * len(labels)), replace=False)
    labels[planted] = (labels[planted] + draw.integers(1, classes, len(planted))) % classes
    start = time.perf_counter()
    found = find_label_errors(simple_features(scan), labels).rows
    hits = len(np.intersect1d(found, planted))
    return {
        "data": name,
        "images": len(labels),
        "planted": len(planted),
        "found": len(found),
        "precision": hits / max(1, len(found)),
        "recall": hits / len(planted),
        "seconds": round(time.perf_counter() - start, 1),
    }


def speed(images: list[Image.Image], folder: Path, count: int = 10_000) -> dict[str, Any]:
    """The whole command on `count` JPEG photographs of 500 x 375 pixels, without and with a forecast."""
    draw = np.random.default_rng(0)
    for i in range(count):
        image = images[i % len(images)]
        width, height = image.size
        left, top = int(draw.integers(0, width // 3)), int(draw.integers(0, height // 3))
        path = folder / f"class{i % 10}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = image.crop((left, top, left + 2 * width // 3, top + 2 * height // 3))
        part.resize((500, 375), Image.Resampling.BILINEAR).save(path, quality=85)
    return {
        "images": count,
        "size": [500, 375],
        "load_before": os.getloadavg()[0],
        "without_forecast": _command(folder, "--forecast-model", "none"),
        "with_forecast": _command(folder),
    }


def _command(folder: Path, *options: str) -> dict[str, Any]:
    """Seconds, seconds of processor time and peak memory of the process.

    The peak is the system's own, read every 10 ms, because the forecast starts it anew.
    """
    start, before, peak = time.perf_counter(), _processor_seconds(), 0
    with tempfile.TemporaryFile() as output:
        command = [sys.executable, "-m", "vitrail", "doctor", str(folder), "--json", *options]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            with suppress(OSError, IndexError):
                peak = max(peak, int(status.read_text().partition("VmHWM:")[2].split()[0]))
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        output.seek(0)
        findings = json.load(output)["findings"]
    return {
        "seconds": round(seconds, 1),
        "processor_seconds": round(_processor_seconds() - before, 1),
        "peak_mb": peak >> 10,
        "status": process.returncode,
        "findings": {each["check"]: each["count"] for each in findings},
    }


def _processor_seconds() -> float:
    """Of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fashion", required=True)
    parser.add_argument("--textile", required=True)
    parser.add_argument("--count", type=int, default=2000, help="photographs in which duplicates are planted")
    parser.add_argument("--clean", type=int, default=20_000, help="images without planted faults")
    parser.add_argument("--parts", default="duplicates,clean,labels,cleanvision,speed")
    options = parser.parse_args()
    file = RESULTS / "doctor.json"
    results: dict[str, Any] = json.loads(file.read_text())["results"] if file.exists() else {}
    textile = [Image.open(path).convert("RGB") for path in sorted(Path(options.textile).rglob("*.jpg"))]
    fashion = open_dataset("fashion-mnist", data_dir=options.fashion)
    train = fashion.split("train")
    assert isinstance(train, ArraySplit)
    with tempfile.TemporaryDirectory() as temporary:
        for part in options.parts.split(","):
            if part == "duplicates":
                results["duplicates_textile"] = duplicates(textile[: options.count], Path(temporary, "textile"))
            elif part == "clean":
                results["clean_fashion_mnist"] = clean(train.images[: options.clean])
            elif part == "labels":
                rows = np.arange(5000)
                small = Dataset("fashion", fashion.class_names, {"train": train.take(rows)}, fashion.sizes)
                results["wrong_labels"] = [
                    wrong_labels("digits", open_dataset("digits")),
                    wrong_labels("fashion-mnist, 5,000 images", small),
                ]
            elif part == "cleanvision":
                photos = [resized(image, 0.5) for image in textile[::10]]
                results["cleanvision"] = agreement(photos, Path(temporary, "cleanvision"), 8)
            elif part == "speed":
                results["speed"] = speed(textile, Path(temporary, "speed"))
            write("doctor", "python -m benchmarks.doctor --fashion FOLDER --textile FOLDER", results=results)
            print(json.dumps(results, indent=1), flush=True)


if __name__ == "__main__":
    main()
