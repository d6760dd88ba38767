"""What the recipes for small images give: a ViT from scratch with `small` (on digits also `tiny`) against `plain`.

The same model, images, number of epochs, batch size and seeds; the recipes are as they come with vitrail, their rates
fitted to the batch by the root rule. No setting was tuned here; the figures are of the test images.

    python -m benchmarks.small_recipe            every run, one after the other, and the table
    python -m benchmarks.small_recipe --report   the table of what is there

A run that was stopped goes on where it stood; one that is finished is not repeated.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import vitrail
from benchmarks.measure import spread, write

DATA: dict[str, dict[str, Any]] = {
    "digits": {"model": "vit_nano_patch2_8", "epochs": 60, "warmup_epochs": 2},
    "fashion-mnist": {"model": "vit_micro_patch8_32", "img_size": 32, "epochs": 2, "warmup_epochs": 0.25},
}
RECIPES = {"digits": ("tiny", "small", "plain"), "fashion-mnist": ("small", "plain")}
SEEDS = range(3)
FIGURES = ("top1", "val_top1", "seconds")


def train(data: str, recipe: str, seed: int, out: Path) -> dict[str, Any]:
    """The summary of this run, which is begun, taken up or read."""
    if not (out / "summary.json").is_file():
        if (out / "config.toml").is_file():
            vitrail.train(resume=out, progress=False)
        else:
            vitrail.train(
                data, recipe=recipe, batch_size=128, seed=seed, out=out, progress=False, amp="off", **DATA[data]
            )
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def report(folder: Path) -> dict[str, Any]:
    """Each recipe's figures, their mean and spread, and the gain over `plain` of the same seed."""
    results = {}
    for data, recipes in RECIPES.items():
        found = {
            recipe: {
                seed: json.loads(path.read_text())
                for seed in SEEDS
                if (path := folder / f"{data}-{recipe}-{seed}" / "summary.json").is_file()
            }
            for recipe in recipes
        }
        plain = found["plain"]
        rows = {}
        for recipe, runs in found.items():
            gains = [run["top1"] - plain[seed]["top1"] for seed, run in runs.items() if seed in plain]
            rows[recipe] = {
                "test_top1": spread([run["top1"] for run in runs.values()]),
                **({"gain": spread(gains)} if recipe != "plain" else {}),
                "seeds": {str(seed): {key: run[key] for key in FIGURES} for seed, run in runs.items()},
            }
        results[data] = {**DATA[data], "recipes": rows}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, action="append", help="by default both")
    parser.add_argument("--folder", type=Path, default=Path("runs/small-recipe"))
    parser.add_argument("--report", action="store_true", help="train nothing; write the table of what is there")
    given = parser.parse_args()
    if not given.report:
        for seed in SEEDS:
            for data in given.data or DATA:
                for recipe in RECIPES[data]:
                    summary = train(data, recipe, seed, given.folder / f"{data}-{recipe}-{seed}")
                    print(f"{data} {recipe} seed {seed}: test {summary['top1']:.2f} %", flush=True)
    results = report(given.folder)
    for data, result in results.items():
        for recipe, figures in result["recipes"].items():
            print(f"{data:14} {recipe:6} test {figures['test_top1']}  gain {figures.get('gain', '-')}")
    write("small_recipe", results=results)


if __name__ == "__main__":
    main()
