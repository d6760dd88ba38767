"""Train a recipe with several seeds and print the figures that its header quotes: repeat.py RECIPE SEEDS FOLDER."""

import statistics
import sys
from pathlib import Path

import vitrail


def main(recipe: Path, seeds: int, folder: Path) -> None:
    reports = []
    for seed in range(seeds):
        run = vitrail.train(recipe=recipe, seed=seed, out=folder / f"{recipe.stem}-{seed}", progress=False)
        reports.append(run.report)
        print(f"seed {seed}: {run.report['top1']:.2f} % in {run.report['seconds']:.0f} s", flush=True)
    top1 = [report["top1"] for report in reports]
    seconds = [report["seconds"] for report in reports]
    spread = statistics.stdev(top1) if seeds > 1 else 0.0
    print(
        f"{reports[0]['split']} top-1 {statistics.mean(top1):.2f} +- {spread:.2f} % (n = {seeds}, "
        f"{min(top1):.2f} to {max(top1):.2f}), training {statistics.mean(seconds):.0f} s ({max(seconds):.0f} at most)"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
