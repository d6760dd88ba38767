"""`export`: a classifier for another runtime, kept only if it predicts what the model predicts, and is faster."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitrail.classifier import Classifier
from vitrail.data.catalog import open_dataset
from vitrail.data.dataset import ArraySplit, Data, Dataset, Sizes
from vitrail.deploy.candidates import AUTO, PT2, WEB, Builder, Candidate, choose_candidates
from vitrail.deploy.gate import MAX_LOSS, MIN_SPEEDUP, CheckImages, Limits
from vitrail.deploy.merging import choose_merging, merged_classifier
from vitrail.deploy.page import write_page, write_readme
from vitrail.deploy.quantize.calibration import Calibration, choose_calibration
from vitrail.deploy.student import choose_student, train_student
from vitrail.deploy.trials import Row, Trials
from vitrail.deploy.web.folder import is_web_folder, write_web
from vitrail.errors import ConfigError, RunError
from vitrail.inference.export_folder import ExportRecord, is_export
from vitrail.inference.runtime import Runtime
from vitrail.inference.torch_runtime import TorchRuntime
from vitrail.prediction import SPLIT_OPTIONS
from vitrail.training.checkpoints.provenance import environment
from vitrail.utils.files import atomic_folder, disk_errors

Log = Callable[[str], None]

_UNLABELLED = 256  # images that are compared without labels


@dataclass(frozen=True)
class Result:
    """`folder` is the export, `rows` are all candidates that were measured, the one that was kept first.

    reference: latency_ms and precision of the model. left_out: candidates that were not built, with the reason.
    """

    folder: Path
    rows: list[dict[str, Any]]
    reference: dict[str, Any]
    left_out: dict[str, str]
    notes: list[str]


def export(
    classifier: Classifier,
    out: str | Path,
    *,
    target: str = AUTO,
    precision: str = AUTO,
    data: Data | None = None,
    check: Data | None = None,
    data_dir: str | Path | None = None,
    max_loss: float = MAX_LOSS,
    min_speedup: float | None = None,
    merge: float | None = None,
    distill: str | None = None,
    settings: Mapping[str, Any] | None = None,
    name: str | None = None,
    log: Log | None = None,
    command: str = "",
) -> Result:
    """Write a folder that predicts without torch, if it passes the gate.

    Args:
        out: the folder; an export that is there is replaced once the new one has passed.
        target: "onnx", "openvino", "auto": the fastest on this machine; "pt2"; or "web", a folder for browsers.
        precision: "fp32", "bf16", "int8", or "auto": the fastest that passes.
        data: a dataset whose training images calibrate int8; by default that of `check`. data_dir: its files.
        check: labelled images on which the export may lose `max_loss` points of top-1; its split is that of
            `Classifier.evaluate`. None: only the agreement with the model is measured, on at most 256 images of `data`.
        min_speedup: over the model in torch, for one image; by default 1.15, and 0 for pt2 and web.
        merge: of a ViT or DeiT, merge so many tokens that at most this percentage of the calibration images change
            class; the export may then lose as many points. None: no tokens are merged.
        distill: a model of the catalog, or "auto": trained on this one's logits if nothing passes. settings: of that.
        name: of the source. command: for the page. log: called with a line for each step.

    Raises:
        ExportRefused: no candidate passed the gate; with the reason and the best alternative. Nothing is written.
        ConfigError: an unknown target or precision, or int8 without images.
        DataError, DeviceError: the images cannot be used; a package is missing, or the CPU has no bfloat16.
        RunError: `out` is something else than an export, or the disk is full.
    """
    out = Path(out).expanduser()
    data = check if data is None else data
    _check_arguments(classifier, out, distill is not None and data is None)
    candidates, left_out = choose_candidates(target, precision, data is not None, classifier.preprocess.interpolation)
    reference, user = (
        TorchRuntime(classifier.model, classifier.preprocess, precision_, classifier.architecture, frozen=True)
        for precision_ in ("off", classifier.precision)
    )
    images, dataset, notes = _open_images(classifier, reference, data, check, data_dir)
    calibration = None if dataset is None else choose_calibration(dataset, classifier.preprocess)
    source = {"name": name or classifier.architecture, "fingerprint": reference.fingerprint()}
    limits = _limits(target, max(max_loss, merge or 0.0), min_speedup)
    classifier, merging = (classifier, None) if merge is None else _merged(classifier, calibration, merge)
    with _work_folder(out) as work:
        builder = Builder(classifier, work, calibration, source, merging)
        trials = Trials(builder, user, images, limits, log or (lambda text: None))
        best = _find(trials, candidates, dataset, distill, settings or {})
        if target == WEB:
            return _keep_web(best, trials, out, left_out, notes)
        return _keep(best, trials, out, left_out, notes, command)


def _find(
    trials: Trials,
    candidates: list[Candidate],
    dataset: Dataset | None,
    distill: str | None,
    settings: Mapping[str, Any],
) -> Row:
    """The best candidate of the model, else of a student. Raises ExportRefused."""
    best = trials.run(candidates)
    if best is None and distill is not None and dataset is not None:
        trials.builder = _student_builder(trials, distill, dataset, settings)
        best = trials.run(candidates)
    if best is None:
        raise trials.refuse()
    return best


def _merged(classifier: Classifier, calibration: Calibration | None, loss: float) -> tuple[Classifier, dict[str, Any]]:
    """The classifier with merged tokens, chosen on the calibration images, and how."""
    if calibration is None:
        raise ConfigError("how many tokens may merge is chosen on images: name them with --data or --check")
    merging = choose_merging(classifier, list(calibration.images), loss)
    if not any(merging.schedule):
        raise ConfigError(f"no tokens of {classifier.architecture} can merge at a loss of {loss:g} points: allow more")
    return merged_classifier(classifier, merging.schedule), merging.to_dict()


def _limits(target: str, max_loss: float, min_speedup: float | None) -> Limits:
    if min_speedup is None:
        min_speedup = 0.0 if target in (PT2.target, WEB) else MIN_SPEEDUP
    return Limits(max_loss, min_speedup)


def _check_arguments(classifier: Classifier, out: Path, lacks_images: bool) -> None:
    if out.exists() and not is_export(out) and not is_web_folder(out):
        raise RunError(f"{out} exists and is not an export: choose another --out")
    if not classifier.class_names:
        raise ConfigError("this model has no classes, and so nothing to check: train a head first")
    if lacks_images:
        raise ConfigError("a student is trained on images: name them with --data or --check")


def _student_builder(trials: Trials, name: str, dataset: Dataset, settings: Mapping[str, Any]) -> Builder:
    """Train a smaller model on the logits of the one to export; its builder."""
    before = trials.builder
    classifier = before.classifier
    name = choose_student(classifier, trials.factor()) if name == AUTO else name
    trials.log(f"nothing passed: training {name} on the logits of {classifier.architecture}")
    options = {key: value for key, value in classifier.notes.get("split", {}).items() if key in SPLIT_OPTIONS}
    student = train_student(classifier, name, dataset, {**options, **settings})
    work = before.work / "student"
    work.mkdir()
    calibration = choose_calibration(dataset, student.preprocess)
    return Builder(student, work, calibration, {**before.source, "student": student.architecture})


def _open_images(
    classifier: Classifier,
    reference: Runtime,
    data: Data | None,
    check: Data | None,
    data_dir: str | Path | None,
) -> tuple[CheckImages, Dataset | None, list[str]]:
    """The images of the check, those of the calibration, and what is to be said of them."""
    options = {key: value for key, value in classifier.notes.get("split", {}).items() if key in SPLIT_OPTIONS}

    def open_images(source: Data) -> Dataset:
        return open_dataset(source, data_dir=data_dir, class_names=classifier.class_names, **options)

    if data is None:
        pixels = np.random.default_rng(0).integers(
            0, 256, (_UNLABELLED, *classifier.preprocess.size, classifier.preprocess.channels), np.uint8
        )
        split = ArraySplit(pixels, np.zeros(len(pixels), np.int64), "noise")
        dataset = Dataset("noise", classifier.class_names, {"test": split}, Sizes.of(split.sizes))
        note = "accuracy was not checked, and agreement on noise only: name labelled images with --check"
        return CheckImages.open(reference, dataset, "test", labelled=False, limit=None), None, [note]
    images = open_images(data)
    labelled = images if check is data else None if check is None else open_images(check)
    notes = []
    if labelled is None:
        notes.append("accuracy was not checked: name labelled images with --check")
    checked = labelled or images
    name = checked.eval_split()
    if name == "train":
        notes.append(f"{checked.name} has no test or val split: the check is on training images")
    limit = None if labelled else _UNLABELLED
    found = CheckImages.open(reference, checked, name, labelled=labelled is not None, limit=limit)
    return found, images, notes


@contextlib.contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, on the same disk; removed at the end."""
    folder = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    with disk_errors(out):
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _keep(best: Row, trials: Trials, out: Path, left_out: dict[str, str], notes: list[str], command: str) -> Result:
    """Write the export of a row to `out`, which appears whole."""
    assert best.folder is not None  # of an accepted row
    rows = [best, *(row for row in trials.rows if row is not best)]
    found = [row.to_dict(out if row is best else None) for row in rows]
    result = Result(out, found, trials.reference_figures(), left_out, notes)
    with atomic_folder(out) as temporary:
        for path in best.folder.iterdir():
            path.rename(temporary / path.name)
        record = dataclasses.replace(ExportRecord.read(temporary), check=best.to_dict()).write(temporary)
        write_readme(record, temporary / "README.md", out.name)
        facts = _facts(record, trials, left_out)
        write_page(record, found, facts, notes, result.reference, command, temporary / "export.html")
    return result


def _keep_web(best: Row, trials: Trials, out: Path, left_out: dict[str, str], notes: list[str]) -> Result:
    """Write a web folder from the export of a row to `out`, which appears whole."""
    assert best.folder is not None  # of an accepted row
    with atomic_folder(out) as temporary:
        write_web(trials.builder.classifier, best.folder, temporary, out.name)
    row = best.to_dict(out) | {"target": WEB, "bytes": sum(path.stat().st_size for path in out.rglob("*.*"))}
    return Result(out, [row], trials.reference_figures(), left_out, notes)


def _facts(record: ExportRecord, trials: Trials, left_out: dict[str, str]) -> dict[str, str]:
    images, limits = trials.images, trials.limits
    return {
        "model": f"{record.source['name']} ({record.source['fingerprint']})",
        "check": f"{len(images.rows):,} images of {images.data}, {images.split}"
        + (f", {len(images.skipped)} could not be read" if images.skipped else ""),
        "limits": f"{limits.max_loss:g} points of top-1 lost, at least {limits.min_speedup:g}x as fast for one image",
        **{f"not built: {name}": reason for name, reason in left_out.items()},
        **{key: str(value) for key, value in environment(torch.device("cpu")).items()},
    }
