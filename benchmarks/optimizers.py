"""AdamW and Muon on a ViT from scratch: the same model, images, recipe, number of epochs and seeds.

Digits and Fashion-MNIST in short runs, at two learning rates each. The figures are of the test images.

    python -m benchmarks.optimizers            every run, one after the other, and the table
    python -m benchmarks.optimizers --next     the next run that is missing
    python -m benchmarks.optimizers --report   the table of what is there
"""

import argparse
import json
from pathlib import Path
from typing import Any

import vitrail
from benchmarks.measure import spread, write

DATA: dict[str, dict[str, Any]] = {
    "digits": {"recipe": "tiny", "model": "vit_nano_patch2_8", "batch_size": 128, "epochs": 26, "warmup_epochs": 2},
    "fashion-mnist": {
        "recipe": "small",
        "model": "vit_micro_patch8_32",
        "img_size": 32,
        "batch_size": 128,
        "epochs": 2,
        "warmup_epochs": 0.25,
    },
}
RATES = {"digits": (5e-3, 2e-2), "fashion-mnist": (2e-3, 4e-3)}
OPTIMIZERS = ("adamw", "muon")
SEEDS = range(3)
FIGURES = ("top1", "val_top1", "seconds")


def runs(folder: Path) -> dict[tuple[str, float, str, int], Path]:
    """The folder of each run by data, rate, optimizer and seed."""
    return {
        (data, rate, optimizer, seed): folder / f"{data}-{rate:g}-{optimizer}-{seed}"
        for data, rates in RATES.items()
        for seed in SEEDS
        for rate in rates
        for optimizer in OPTIMIZERS
    }


def train(data: str, rate: float, optimizer: str, seed: int, out: Path) -> None:
    """Begin or resume a run, and print what it gave."""
    if (out / "config.toml").is_file():
        vitrail.train(resume=out, progress=False)
    else:
        vitrail.train(data, lr=rate, optimizer=optimizer, seed=seed, out=out, progress=False, **DATA[data])
    print(out.name, f"{json.loads((out / 'summary.json').read_text())['top1']:.2f} %", flush=True)


def report(folder: Path) -> list[dict[str, Any]]:
    """A row for each data, rate and optimizer."""
    found: dict[tuple[str, float, str], dict[int, Any]] = {}
    for (data, rate, optimizer, seed), out in runs(folder).items():
        if (path := out / "summary.json").is_file():
            found.setdefault((data, rate, optimizer), {})[seed] = json.loads(path.read_text())
    return [
        {
            "data": data,
            "optimizer": optimizer,
            "lr": rate,
            **DATA[data],
            "test_top1": spread([summary["top1"] for summary in seeds.values()]),
            "seconds": spread([summary["seconds"] for summary in seeds.values()]),
            "seeds": {str(seed): {key: summary[key] for key in FIGURES} for seed, summary in seeds.items()},
        }
        for (data, rate, optimizer), seeds in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/optimizers"))
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--next", action="store_true", help="train the next run that is missing")
    only.add_argument("--report", action="store_true", help="train nothing")
    given = parser.parse_args()
    missing = {run: out for run, out in runs(given.folder).items() if not (out / "summary.json").is_file()}
    for run, out in [] if given.report else list(missing.items())[: 1 if given.next else None]:
        train(*run, out)
    results = report(given.folder)
    for row in results:
        print(f"{row['data']:14} {row['optimizer']:6} lr {row['lr']:<6g} test {row['test_top1']}  {row['seconds']}")
    write("optimizers", results=results)


if __name__ == "__main__":
    main()
