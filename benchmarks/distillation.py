"""What a teacher gives: a DeiT student of Fashion-MNIST with a CNN teacher, and the same student without one.

Every arm has the same student, images, views, steps and settings, and differs in its loss alone. The teacher is one
ResNet-20 that was trained on the same training images; what it says of a view is stored, so that all arms of a seed ask
it once. Nothing was tuned for the comparison: the settings are those of the plain student, the weight is DeiT's, the
temperature a usual one. Validation images choose the epoch, and the figures are of the test images.

    python -m benchmarks.distillation                           every arm and seed, one after the other, and the table
    python -m benchmarks.distillation --arm token-hard --seed 1 one of them
    python -m benchmarks.distillation --report                  the table of what is there

A run that was stopped goes on where it stood; one that is finished is not repeated.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

import vitrail
from benchmarks.measure import spread, write
from vitrail.data.catalog import open_dataset
from vitrail.data.dataset import ArraySplit, Dataset
from vitrail.utils.counter_rng import permutation

TOKEN, PLAIN = "deit_micro_distilled_patch8_32", "vit_micro_patch8_32"
ARMS: dict[str, dict[str, Any]] = {
    "token-none": {"model": TOKEN},
    "token-hard": {"model": TOKEN, "distill": "hard"},
    "token-soft": {"model": TOKEN, "distill": "soft"},
    "logits-none": {"model": PLAIN},
    "logits-hard": {"model": PLAIN, "distill": "hard"},
    "logits-soft": {"model": PLAIN, "distill": "soft"},
}
STUDENT: dict[str, Any] = {
    "batch_size": 64,
    "lr": 2e-3,
    "warmup_epochs": 0.5,
    "weight_decay": 0.05,
    "label_smoothing": 0.1,
    "clip_grad": 1.0,
    "ema": 0.998,
    "pad_shift": 2,
    "flip": 0.5,
    "amp": "off",
}
TAUGHT: dict[str, Any] = {"hard": {"distill_weight": 0.5}, "soft": {"distill_weight": 0.5, "temperature": 2.0}}
TEACHER: dict[str, Any] = {
    "model": "resnet20_32",
    "batch_size": 128,
    "lr": 4e-3,
    "warmup_epochs": 1,
    "weight_decay": 0.05,
    "label_smoothing": 0.0,  # smoothed labels make a worse teacher (https://arxiv.org/abs/1906.02629)
    "clip_grad": 1.0,
    "ema": 0.99,
    "pad_shift": 2,
    "flip": 0.5,
    "amp": "off",
}


def images(count: int) -> Dataset:
    """Fashion-MNIST, of the training images the first `count` of a fixed order; 0 for all."""
    dataset = open_dataset("fashion-mnist")
    train = dataset.split("train")
    if not count:
        return dataset
    assert isinstance(train, ArraySplit)
    some = train.take(np.sort(permutation(0, 0, len(train))[:count]))
    return dataclasses.replace(dataset, splits={**dataset.splits, "train": some})


def finished(data: Dataset, out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The summary of the run in `out`, which is begun, taken up or read."""
    if not (out / "summary.json").is_file():
        if (out / "config.toml").is_file():
            vitrail.train(data, resume=out)
        else:
            vitrail.train(data, out=out, **settings)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def run(folder: Path, data: Dataset, arm: str, seed: int, epochs: float, teacher_epochs: float) -> None:
    """One arm with one seed; the teacher first, if an arm needs it."""
    settings = {**STUDENT, **ARMS[arm], "seed": seed, "epochs": epochs}
    if "distill" in settings:
        finished(data, folder / "teacher", {**TEACHER, "epochs": teacher_epochs})
        settings |= TAUGHT[settings["distill"]]
        settings |= {"teacher": folder / "teacher", "teacher_outputs": str(folder / "outputs")}
    summary = finished(data, folder / f"{arm}-{seed}", settings)
    print(f"{arm} seed {seed}: test {summary['top1']:.2f} %, val {summary['val_top1']:.2f} %", flush=True)


def report(folder: Path) -> dict[str, Any]:
    """What is there, as a record: each seed's figures, their mean and spread, and the gain over the arm without."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*-*-*/summary.json")):
        arm, _, seed = path.parent.name.rpartition("-")
        found.setdefault(arm, {})[int(seed)] = json.loads(path.read_text())
    arms = {}
    for arm in (arm for arm in ARMS if arm in found):
        runs = found[arm]
        top1 = {seed: runs[seed]["top1"] for seed in sorted(runs)}
        record: dict[str, Any] = {
            **ARMS[arm],
            "params": next(iter(runs.values()))["params"],
            "test_top1": spread(list(top1.values())),
            "seeds": {
                str(seed): {key: runs[seed][key] for key in ("top1", "val_top1", "loss", "ece", "seconds", "steps")}
                for seed in sorted(runs)
            },
        }
        base = found.get(f"{arm.partition('-')[0]}-none", {})
        pairs = [value - base[seed]["top1"] for seed, value in top1.items() if seed in base]
        if pairs and not arm.endswith("-none"):
            record["gain"] = spread(pairs)
        arms[arm] = record
    teacher = folder / "teacher" / "summary.json"
    return {
        "data": "fashion-mnist; nothing tuned, epochs chosen by validation images, figures of the 10,000 test images",
        "teacher": json.loads(teacher.read_text())["top1"] if teacher.is_file() else None,
        "settings": {"student": STUDENT, "taught": TAUGHT, "teacher": TEACHER},
        "arms": arms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=ARMS, action="append", help="by default all")
    parser.add_argument("--seed", type=int, action="append", help="by default 0, 1 and 2")
    parser.add_argument("--epochs", type=float, default=8.0)
    parser.add_argument("--teacher-epochs", type=float, default=6.0)
    parser.add_argument("--train-images", type=int, default=0, help="by default all 54,000")
    parser.add_argument("--folder", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--report", action="store_true", help="train nothing; write the table of what is there")
    given = parser.parse_args()
    folder = given.folder / f"{given.epochs:g}-epochs-{given.train_images or 'all'}-images-{given.teacher_epochs:g}"
    if not given.report:
        data = images(given.train_images)
        for seed in given.seed or range(3):
            for arm in given.arm or ARMS:
                run(folder, data, arm, seed, given.epochs, given.teacher_epochs)
    words = f"--epochs {given.epochs:g} --teacher-epochs {given.teacher_epochs:g} --train-images {given.train_images}"
    record = report(folder)
    for arm, figures in record["arms"].items():
        print(f"{arm:12} test {figures['test_top1']}  gain {figures.get('gain', '-')}")
    write("distillation", f"python -m benchmarks.distillation {words}", **record)


if __name__ == "__main__":
    main()
