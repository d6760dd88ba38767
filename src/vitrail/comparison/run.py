"""`compare`: trains all arms, measures them, and writes compare.json and compare.html.

plan.json         what is compared; the same call goes on where it was interrupted, another one is refused
arms/             a run folder for each training
measured/         what was measured of each arm, and the timings
compare.json      the result
compare.html      the report
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.classifier import Classifier, load_torch
from vitrail.comparison.arms import run_folder, train_arm
from vitrail.comparison.measurements import measure
from vitrail.comparison.page import write_page
from vitrail.comparison.plan import SEEDS, SHARES, Arm, Plan, make_plan
from vitrail.comparison.timings import time_models
from vitrail.comparison.verdict import paragraph, summarize
from vitrail.data.catalog import check_outside, open_dataset
from vitrail.data.contents import fingerprint
from vitrail.data.dataset import Data, Dataset
from vitrail.errors import RunError
from vitrail.training.checkpoints.provenance import environment
from vitrail.training.checkpoints.run_folder import RUNS
from vitrail.training.config.schema import Use, keys_for, make_config
from vitrail.utils.device import pick_device
from vitrail.utils.files import atomic_write_text, lock_or_raise, user_path
from vitrail.utils.text import format_duration

Log = Callable[[str], None]


def compare(
    data: Data,
    models: Sequence[str] | None = None,
    *,
    budget: float | str | None = None,
    seeds: int = SEEDS,
    shares: Sequence[int] = SHARES,
    out: str | Path | None = None,
    verbose: bool = False,
    log: Log | None = None,
    command: str = "",
    **settings: Any,
) -> dict[str, Any]:
    """Which of several models is the most accurate on these images, each trained with its own recipe for the same time.

    Args:
        data: a folder of images, a CSV or parquet table, a dataset's name, wds: shards or an hf-dataset:; or a frame, a
            list of (path, label), a torch dataset, arrays, or a Dataset (see docs/data.md).
        models: names from `list_models()`, each as NAME or NAME@RECIPE; None: the ViT that `train` would choose, a Swin
            if one fits the image size, and the ResNet of the most similar cost.
        budget: of one training: seconds, "10m" or "2h"; by default 10 minutes, or as many `epochs` as are given.
        seeds: trainings of each model on each share.
        shares: percentages of the training images; 100 is always among them.
        out: the folder; by default runs/compare-<data>. A comparison in it that was interrupted goes on.
        verbose: print the progress of each training.
        log: is called with a line of text for each arm. command: the command to name in the report.
        settings: of all trainings, see `TrainConfig`: img_size, pretrained, device, val_fraction, ...

    Returns:
        The content of compare.json.

    Raises:
        VitrailError: of the kind of what is wrong.
        Stopped: by Ctrl-C or SIGTERM, a KeyboardInterrupt: the same call goes on.
    """
    log = log or (lambda text: None)
    dataset = open_data(data, settings)
    plan = make_plan(dataset, models, seeds=seeds, shares=shares, settings={**settings, "budget": budget})
    folder = RUNS / f"compare-{Path(dataset.name).name}" if out is None else user_path(out)
    check_outside(folder, dataset.name)
    folder.mkdir(parents=True, exist_ok=True)
    busy = RunError(f"another comparison is writing to {folder}: wait for it, or choose another folder with --out")
    with lock_or_raise(folder / ".lock", busy):
        _enter(folder, plan, dataset)
        for line in plan_lines(plan, dataset):
            log(line)
        records = _run_arms(plan, dataset, folder, verbose, log)
        result = {**_about(plan, dataset, command), "folder": str(folder)}
        result |= summarize(plan, records, _timings(plan, folder, log))
        result["paragraph"] = paragraph(result)
        write_json(folder / "compare.json", result)
        write_page(result, folder / "compare.html")
    return result


def _about(plan: Plan, dataset: Dataset, command: str) -> dict[str, Any]:
    """What was compared on what, and where."""
    device = pick_device(plan.settings.get("device", "auto"))
    labels = dataset.split(dataset.eval_split()).labels
    return {
        "data": dataset.name,
        "classes": dataset.num_classes,
        "images": dataset.counts(),
        "split": dataset.eval_split(),
        "most_frequent": 100 * float(np.bincount(labels).max()) / len(labels),
        "how_split": dataset.how_split,
        "plan": plan.to_dict(),
        "length": plan.length,
        "device": str(device),
        "environment": environment(device),
        "command": command,
    }


def open_data(data: Data, settings: Mapping[str, Any]) -> Dataset:
    """The dataset, split as the settings say."""
    keys = (*keys_for(Use.HELD_OUT), "data_dir")
    flat = make_config({key: settings[key] for key in keys if settings.get(key) is not None}).flat
    return open_dataset(data, **{key: flat[key] for key in keys})


def plan_lines(plan: Plan, dataset: Dataset) -> list[str]:
    """What will be trained, and how long it takes at most."""
    names = ", ".join(contender.label for contender in plan.contenders)
    size = plan.settings.get("img_size")
    count, budget = len(plan.arms), plan.settings.get("budget")
    total = f", {format_duration(count * budget)} at most, without measurements" if budget else ""
    shares = ", ".join(str(share) for share in plan.shares)
    return [
        f"models   {names}{f', images of {size[0]}x{size[1]} px' if size else ''}",
        f"data     {dataset.name}: {', '.join(f'{n:,} {name}' for name, n in dataset.counts().items())}",
        f"arms     {count}: {len(plan.contenders)} models x {shares} % of the training images x {plan.seeds} seeds, "
        f"{plan.length} each{total}",
    ]


def _enter(folder: Path, plan: Plan, dataset: Dataset) -> None:
    """Write the plan, or check that it is the one in the folder. Raises RunError."""
    record = {**plan.to_dict(), "data": dataset.name, "fingerprint": fingerprint(dataset).text}
    path = folder / "plan.json"
    if not path.exists():
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise RunError(f"{folder} is not empty and contains no comparison: choose another --out")
        write_json(path, record)
        return
    before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(record))
    different = [key for key in now if before.get(key) != now[key]]
    if different:
        key = different[0]
        what = "the images" if key == "fingerprint" else f"{key} {before.get(key)}, now {now[key]}"
        raise RunError(f"{folder} contains a comparison with other settings ({what}): choose another --out")


def _run_arms(plan: Plan, dataset: Dataset, out: Path, verbose: bool, log: Log) -> list[dict[str, Any]]:
    """What was measured of every arm, trained where it is missing, in the order of the plan."""
    records, arms, start, done = [], plan.arms, time.perf_counter(), 0
    for number, arm in enumerate(arms, 1):
        path = _measured(out, arm.key)
        if not path.exists():
            classifier = train_arm(arm, plan, dataset, out, verbose)
            write_json(path, measure(arm, classifier, classifier.report, dataset, run_folder(out, arm)))
            done += 1
        record = json.loads(path.read_text(encoding="utf-8"))
        records.append(record)
        left = (time.perf_counter() - start) / done * (len(arms) - number) if done else 0.0
        eta = f", {format_duration(left)} left" if left else ""
        log(
            f"{number}/{len(arms)}  {arm}: top-1 {record['top1']:.2f} % after {format_duration(record['seconds'])}{eta}"
        )
    return records


def _timings(plan: Plan, out: Path, log: Log) -> dict[str, dict[str, Any]]:
    """Of the models of seed 0 and all images; measured once."""
    path = _measured(out, "timings")
    if not path.exists():
        log("timing   the models, on one image and at several input sizes")
        device = pick_device(plan.settings.get("device", "auto"))
        models: dict[str, Classifier] = {
            each.label: load_torch(run_folder(out, Arm(each, 100, 0)).path, device) for each in plan.contenders
        }
        write_json(path, time_models(models))
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _measured(out: Path, name: str) -> Path:
    return out / "measured" / f"{name}.json"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a file of plain JSON, atomically."""
    atomic_write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
