"""ViT against ResNet-20 on digits and on 1,000, 5,000 and 20,000 images of Fashion-MNIST: who wins where.

Each training has the same time; the verdicts are those of `vitrail compare`. With the defaults, digits take
about 15 minutes and Fashion-MNIST three hours. A run that was interrupted is continued by the same command. Keep the
machine otherwise idle: what is equal is time.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.measure import write
from vitrail.comparison.run import compare
from vitrail.data.catalog import open_dataset
from vitrail.data.dataset import Dataset
from vitrail.data.splits import stratified

SIZES = (1000, 5000, 20_000)
CNN = "resnet20_32"
VIT = {"digits": "vit_nano_patch2_8", "fashion-mnist": "vit_micro_patch8_32"}
KEPT = ("test_images", "images", "length", "best", "a", "b", "difference", "ci95", "p_value", "verdict",
        "images_needed", "curve", "curve_pairs", "crossings", "paragraph", "models")  # fmt: skip


def first_images(dataset: Dataset, count: int) -> Dataset:
    """The dataset with so many training images, of every class alike. The validation images are as few as they would be
    if the data set had no more: a tenth."""
    splits = dict(dataset.splits)
    for name, size in (("train", count), ("val", count // 10)):
        split = dataset.split(name)
        if size < len(split):
            kept, _ = stratified(split.labels, 1 - size / len(split), 0, "benchmark")
            splits[name] = split.take(kept)
    return dataclasses.replace(dataset, name=f"{dataset.name}-{count}", splits=splits)


def run(dataset: Dataset, models: tuple[str, str], arguments: argparse.Namespace, budget: str) -> dict[str, Any]:
    """The result, without the parts that say where it was measured."""
    print(f"== {dataset.name}: {' against '.join(models)}", flush=True)
    out = Path(arguments.out) / dataset.name
    result = compare(dataset, models, budget=budget, seeds=arguments.seeds, out=out, log=print, device="cpu")
    print(result["paragraph"], flush=True)
    return {"data": dataset.name, **{key: result[key] for key in KEPT}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="*", choices=tuple(VIT), default=tuple(VIT))
    parser.add_argument("--data-dir", help="folder with the files of Fashion-MNIST, which are downloaded otherwise")
    parser.add_argument("--sizes", nargs="*", type=int, default=SIZES, help="training images of Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--digits-budget", default="30s", help="time of a training on digits")
    parser.add_argument("--fashion-budget", default="3m", help="time of a training on Fashion-MNIST")
    parser.add_argument("--out", default="runs/comparison", help="folder of the run folders and pages")
    parser.add_argument("--name", default="comparison", help="name of the JSON file in benchmarks/results")
    arguments = parser.parse_args()
    results = []
    if "digits" in arguments.data:
        results.append(run(open_dataset("digits"), (VIT["digits"], CNN), arguments, arguments.digits_budget))
    if "fashion-mnist" in arguments.data:
        whole = open_dataset("fashion-mnist", data_dir=arguments.data_dir)
        for size in arguments.sizes:
            models = (VIT["fashion-mnist"], CNN)
            results.append(run(first_images(whole, size), models, arguments, arguments.fashion_budget))
    command = f"python -m benchmarks.comparison --data {' '.join(arguments.data)} --seeds {arguments.seeds} "
    command += f"--digits-budget {arguments.digits_budget} --fashion-budget {arguments.fashion_budget}"
    write(arguments.name, command=command, results=results)


if __name__ == "__main__":
    main()
