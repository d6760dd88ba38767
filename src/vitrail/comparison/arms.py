"""The training of one arm, in a run folder of its own: new, resumed, or finished before."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from vitrail.classifier import Classifier, load_torch
from vitrail.comparison.plan import Arm, Plan
from vitrail.data.dataset import Dataset
from vitrail.data.splits import stratified
from vitrail.training.checkpoints.run_folder import RunFolder
from vitrail.training.run import train
from vitrail.utils.counter_rng import fold
from vitrail.utils.device import pick_device


def part_of(dataset: Dataset, share: int, seed: int) -> Dataset:
    """The dataset with `share` percent of its training images, of every class alike; validation and test as they are.

    The part depends on (share, seed) alone and is the same for all models. A smaller part lies in a larger one.
    """
    if share == 100:
        return dataset
    images = dataset.split("train")
    kept, _ = stratified(images.labels, 1 - share / 100, fold(seed, "share of the images"), "compare")
    return dataclasses.replace(dataset, splits={**dataset.splits, "train": images.take(kept)})


def run_folder(out: Path, arm: Arm) -> RunFolder:
    """The run folder of an arm."""
    return RunFolder(out / "arms" / arm.key)


def train_arm(arm: Arm, plan: Plan, dataset: Dataset, out: Path, verbose: bool = False) -> Classifier:
    """Train an arm, or go on where it was interrupted; a finished one is loaded. verbose: print its progress.

    Raises:
        RunError: the run folder is of other images, or is damaged.
        Stopped: by Ctrl-C or SIGTERM; the arm can be resumed.
    """
    folder = run_folder(out, arm)
    if not folder.summary.exists():
        images = part_of(dataset, arm.share, arm.seed)
        if folder.config.exists():
            train(images, resume=folder.path, progress=verbose)
        else:
            train(
                images,
                model=arm.contender.model,
                recipe=arm.contender.recipe,
                seed=arm.seed,
                out=folder.path,
                progress=verbose,
                **plan.settings,
            )
    return load_torch(folder.path, pick_device(plan.settings.get("device", "auto")))
