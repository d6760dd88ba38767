"""ViT against ResNet-20 on digits and on 1,000, 5,000 and 20,000 images of Fashion-MNIST: who wins where.

Each training has the same time; the verdicts are those of `vitrail compare`. With the defaults, digits take
about 15 minutes and Fashion-MNIST three hours; with `--shares 100`, for which its three sizes are the curve, one hour.
A run that was interrupted is continued by the same command. Keep the machine otherwise idle: what is equal is time.
Results on other data, and with other numbers of images, stay in the JSON file; `--note` says there how the machine was
used.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, hardware, write
from vitrail.comparison import measurements
from vitrail.comparison.plan import SHARES
from vitrail.comparison.run import compare
from vitrail.data.catalog import open_dataset
from vitrail.data.dataset import Dataset
from vitrail.data.splits import stratified

SIZES = (1000, 5000, 20_000)
CNN = "resnet20_32"
VIT = {"digits": "vit_nano_patch2_8", "fashion-mnist": "vit_micro_patch8_32"}
KEPT = ("test_images", "images", "length", "best", "a", "b", "difference", "ci95", "p_value", "verdict",
        "images_needed", "curve", "curve_pairs", "crossings", "paragraph", "models")  # fmt: skip


def first_images(dataset: Dataset, count: int, test: int) -> Dataset:
    """The dataset with so many training and test images, of every class alike. The validation images are as few as they
    would be if the data set had no more: a tenth."""
    splits = dict(dataset.splits)
    for name, size in (("train", count), ("val", count // 10), ("test", test)):
        split = dataset.split(name)
        if size < len(split):
            kept, _ = stratified(split.labels, 1 - size / len(split), 0, "benchmark")
            splits[name] = split.take(kept)
    return dataclasses.replace(dataset, name=f"{dataset.name}-{count}", splits=splits)


def run(dataset: Dataset, models: tuple[str, str], arguments: argparse.Namespace, budget: str) -> dict[str, Any]:
    """The result, with the command and the hardware."""
    print(f"== {dataset.name}: {' against '.join(models)}", flush=True)
    out = Path(arguments.out) / dataset.name
    seeds, shares = arguments.seeds, arguments.shares
    result = compare(dataset, models, budget=budget, seeds=seeds, shares=shares, out=out, log=_print, device="cpu")
    print(result["paragraph"], flush=True)
    option = "digits" if dataset.name == "digits" else "fashion"
    command = f"python -m benchmarks.comparison --{option}-budget {budget} --seeds {seeds} --shares "
    command += " ".join(map(str, shares))
    command += f" --test-images {arguments.test_images} --probed {arguments.probed}" if option == "fashion" else ""
    about = {"data": dataset.name, "command": command, "hardware": hardware(), "note": arguments.note}
    return {**about, **{key: result[key] for key in KEPT}}


def _print(line: str) -> None:
    print(line, flush=True)


def store(name: str, result: dict[str, Any]) -> None:
    """Put the result in the place of the one on the same data, or at the end."""
    path = RESULTS / f"{name}.json"
    found = json.loads(path.read_text())["results"] if path.is_file() else []
    at = next((row for row, other in enumerate(found) if other["data"] == result["data"]), len(found))
    write(name, results=[*found[:at], result, *found[at + 1 :]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="*", choices=tuple(VIT), default=tuple(VIT))
    parser.add_argument("--data-dir", help="folder with the files of Fashion-MNIST, which are downloaded otherwise")
    parser.add_argument("--sizes", nargs="*", type=int, default=SIZES, help="training images of Fashion-MNIST")
    parser.add_argument("--test-images", type=int, default=10_000, help="of Fashion-MNIST, at most")
    parser.add_argument("--probed", type=int, default=measurements.PROBED, help="test images of corruptions and probes")
    parser.add_argument("--shares", nargs="*", type=int, default=SHARES, help="percentages of these images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--digits-budget", default="30s", help="time of a training on digits")
    parser.add_argument("--fashion-budget", default="3m", help="time of a training on Fashion-MNIST")
    parser.add_argument("--out", default="runs/comparison", help="folder of the run folders and pages")
    parser.add_argument("--name", default="comparison", help="name of the JSON file in benchmarks/results")
    parser.add_argument("--note", default="", help="what else is to be known about these figures")
    arguments = parser.parse_args()
    measurements.PROBED = arguments.probed
    if "digits" in arguments.data:
        result = run(open_dataset("digits"), (VIT["digits"], CNN), arguments, arguments.digits_budget)
        store(arguments.name, result)
    if "fashion-mnist" in arguments.data:
        whole = open_dataset("fashion-mnist", data_dir=arguments.data_dir)
        for size in arguments.sizes:
            models = (VIT["fashion-mnist"], CNN)
            result = run(first_images(whole, size, arguments.test_images), models, arguments, arguments.fashion_budget)
            store(arguments.name, result)


if __name__ == "__main__":
    main()
