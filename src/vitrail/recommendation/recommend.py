"""`recommend`: which model for these images, this machine and these limits.

The candidates and their order are those of `vitrail train` without --model (training/config/automatic.py); here their
cost is measured, and the first that is within the limits is chosen.
"""

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vitrail.data.catalog import open_dataset
from vitrail.data.dataset import Data, Dataset
from vitrail.errors import ConfigError, VitrailError
from vitrail.models.catalog import VARIANTS
from vitrail.pretrained.resolve import at_hand
from vitrail.recommendation.measurement import Subject, measure, stored
from vitrail.recommendation.sample import probe, sample_size, training_seconds
from vitrail.training.config.automatic import Candidate, DatasetStats, candidates, choose
from vitrail.training.setup import dataset_stats
from vitrail.utils.device import cpu_threads, pick_device
from vitrail.utils.text import format_duration, one_line

_MOST = 8  # candidates that are measured
_SECONDS = 90.0  # after which no further measurement is started
_CHEAPER = 2.0  # a model of so many times the operations of one that is too slow is not measured

Log = Callable[[str], None]


@dataclass(frozen=True)
class Limits:
    """What a model may cost here: milliseconds for one image, memory in 1e6 bytes, and hours of training."""

    latency_ms: float | None = None
    memory_mb: float | None = None
    hours: float | None = None

    def exceeded(self, row: "Row") -> bool:
        """Whether latency or memory breaks a limit, or is unknown where there is one."""
        latency, memory = self.latency_ms, self.memory_mb
        return (latency is not None and (row.latency_ms is None or row.latency_ms > latency)) or (
            memory is not None and (row.peak_mb is None or row.peak_mb > memory)
        )


@dataclass
class Row:
    """A candidate with what was measured; None where it was not, and `note` says why. fits: within all limits.

    seconds: estimated training time, if it was asked for.
    """

    candidate: Candidate
    latency_ms: float | None = None
    peak_mb: float | None = None
    probe_top1: float | None = None
    seconds: float | None = None
    fits: bool = False
    note: str = ""

    @property
    def params(self) -> int:
        """Parameters, as in the catalog."""
        return VARIANTS[self.candidate.model].params

    @property
    def licence(self) -> str | None:
        """The licence of the published weights; None from scratch, or if it is not stated."""
        return VARIANTS[self.candidate.model].weights[0].licence if self.candidate.pretrained else None

    def to_dict(self) -> dict[str, Any]:
        figures = {name: getattr(self, name) for name in ("params", "latency_ms", "peak_mb")}
        top1 = {"published_top1": self.candidate.top1, "probe_top1": self.probe_top1}
        return {"model": self.candidate.model, **figures, **top1, "fits": self.fits}


@dataclass(frozen=True)
class Choice:
    """model, img_size (height, width), weights (a tag, or None from scratch) and recipe."""

    model: str
    img_size: tuple[int, int]
    weights: str | None
    recipe: str


@dataclass
class Recommendation:
    """choice: None if no candidate is within the limits. reasons: a line each. candidates: the preferred first.

    command: trains the choice. runner_up: what the next candidate would cost; both None without one.
    """

    choice: Choice | None
    reasons: list[str]
    candidates: list[Row] = field(default_factory=list)
    command: str | None = None
    runner_up: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: `choice`, `reasons` and `candidates`."""
        choice = self.choice and {**vars(self.choice), "img_size": list(self.choice.img_size)}
        return {"choice": choice, "reasons": self.reasons, "candidates": [row.to_dict() for row in self.candidates]}


def recommend(
    data: Data,
    *,
    max_latency_ms: float | None = None,
    max_memory_mb: float | None = None,
    hours: float | None = None,
    pretrained: bool | None = None,
    device: str = "auto",
    threads: int | None = None,
    data_dir: str | Path | None = None,
    log: Log = lambda line: None,
) -> Recommendation:
    """Recommend a model, input size, weights and recipe. Without limits, those of `train` without a model.

    Args:
        data: as of `train`.
        max_latency_ms: for one image, median, without decoding. max_memory_mb: see `Measurement.peak_mb`.
        hours: of training, as estimated.
        pretrained: whether to start from published weights, as of `train`; None: for images above 64 pixels, if the
            weights are on this machine.
        device: as of `train`. threads: of the CPU; None: as torch is set.
        log: called with a line of progress before each measurement.

    Raises:
        ConfigError: a limit is not positive. DataError: the data cannot be opened. DeviceError: no such device.
    """
    limits = Limits(max_latency_ms, max_memory_mb, hours)
    for name, limit in (("max_latency_ms", max_latency_ms), ("max_memory_mb", max_memory_mb), ("hours", hours)):
        if limit is not None and not limit > 0:
            raise ConfigError(f"{name} must be above 0, not {limit:g}")
    chosen_device = pick_device(device)
    dataset = open_dataset(data, data_dir=data_dir)
    stats = dataset_stats(dataset, pretrained)
    with cpu_threads(threads), torch.random.fork_rng(devices=[]):
        rows = _measured(candidates(stats), dataset, limits, chosen_device, log)
        _probe_all(rows, dataset, limits, chosen_device, log)
        if hours is not None:
            _check_hours(rows, dataset, stats, hours, chosen_device, log)
    return _conclude(rows, dataset, stats, limits, str(data) if isinstance(data, str | Path) else dataset.name)


def _measured(
    found: Sequence[Candidate], dataset: Dataset, limits: Limits, device: torch.device, log: Log
) -> list[Row]:
    """The candidates with latency and memory. With limits the cheapest come first, so that they exclude others."""
    rows = [Row(candidate) for candidate in found]
    order = sorted(rows, key=lambda row: row.candidate.gmacs)
    if limits.latency_ms is None and limits.memory_mb is None:
        order = rows = rows[:_MOST]
    measured, start = 0, time.perf_counter()
    for row in order:
        if reason := _hopeless(row, rows, limits):
            row.note = reason
            continue
        candidate = row.candidate
        subject = Subject(
            candidate.model, candidate.size, _channels(candidate, dataset), dataset.num_classes, str(device)
        )
        result = stored(subject)
        if result is None:
            if measured >= _MOST or time.perf_counter() - start > _SECONDS:
                row.note = f"not measured: {measured} others took long enough; the next call measures it"
                continue
            log(f"measuring {candidate.model} at {_size(candidate.size)} ...")
            outcome = measure(subject)
            measured += 1
            if isinstance(outcome, str):
                row.note = f"could not be measured: {one_line(outcome, 100)}"
                continue
            result = outcome
            if result.busy:
                row.note = "measured while other processes needed the processor; not stored"
                log(f"the machine is busy: {candidate.model} is faster on an idle one")
        row.latency_ms, row.peak_mb = result.latency_ms, result.peak_mb
    for row in rows:
        row.fits = not limits.exceeded(row)
    return rows


def _channels(candidate: Candidate, dataset: Dataset) -> int:
    """Input channels: those of the weights, else of the images."""
    return VARIANTS[candidate.model].config.in_chans if candidate.pretrained else dataset.channels


def _hopeless(row: Row, rows: Sequence[Row], limits: Limits) -> str:
    """Why a candidate cannot be within the limits, so that it need not be measured; "" if it may be."""
    if limits.memory_mb is not None and 4 * row.params > 1e6 * limits.memory_mb:
        return f"not measured: its weights alone take {4 * row.params / 1e6:,.0f} MB"
    if limits.latency_ms is not None:
        for other in rows:
            too_slow = other.latency_ms is not None and other.latency_ms > limits.latency_ms
            if too_slow and row.candidate.gmacs > _CHEAPER * other.candidate.gmacs:
                return f"not measured: {other.candidate.model} is too slow, with fewer operations"
    return ""


def _probe_all(rows: Sequence[Row], dataset: Dataset, limits: Limits, device: torch.device, log: Log) -> None:
    """Set the accuracy of nearest neighbours of those within the limits, all on the same images."""
    ready = [row for row in rows if row.fits and row.candidate.pretrained and at_hand(row.candidate.model)]
    slowest = max((row.latency_ms or 0.0 for row in ready), default=0.0)
    for row in ready:
        count = min(len(dataset.split("train")), sample_size(max(slowest, 1e-3)))
        log(f"nearest neighbours of {count} images with {row.candidate.model} ...")
        try:
            found = probe(row.candidate, dataset, count, device)
        except VitrailError as error:
            row.note = f"no probe: {one_line(error, 100)}"
            continue
        if found is not None:
            row.probe_top1 = round(found.top1, 2)
            row.note = f"leave-one-out nearest neighbours of {found.images} images"


def _check_hours(
    rows: Sequence[Row], dataset: Dataset, stats: DatasetStats, hours: float, device: torch.device, log: Log
) -> None:
    """Estimate the training time of candidates in their order, up to the first within the limit."""
    decided = False
    for row in (row for row in rows if row.fits):
        if decided:
            row.note = row.note or "training time not estimated"
            row.fits = False
            continue
        log(f"training steps of {row.candidate.model} ...")
        row.seconds = training_seconds(row.candidate, dataset, stats, device)
        row.fits = decided = row.seconds is not None and row.seconds <= 3600 * hours
        if not row.fits:
            long = "cannot be estimated" if row.seconds is None else f"would take {format_duration(row.seconds)}"
            row.note = f"training {long}"


def _conclude(rows: list[Row], dataset: Dataset, stats: DatasetStats, limits: Limits, data: str) -> Recommendation:
    fitting = [row for row in rows if row.fits]
    images = f"{stats.images:,} training images of about {_size(stats.size)} px, {dataset.num_classes} classes"
    if not fitting:
        measured = [row for row in rows if row.latency_ms is not None]
        least = min(measured, key=lambda row: row.candidate.gmacs, default=None)
        closest = f"; the cheapest measured is {least.candidate.model}: {_cost(least)}" if least else ""
        notes = f", {least.note}" if least and least.note else ""
        return Recommendation(None, [images, f"no candidate is within the limits{closest}{notes}"], rows)
    row = fitting[0]
    candidate = row.candidate
    # As `train` decides; if a limit excludes what it would take, with the model named.
    named = {} if candidate == rows[0].candidate else {"model": candidate.model, "img_size": candidate.size}
    choice = choose(replace(stats, pretrained=candidate.pretrained), named)
    reasons = [images] if named else [f"{images}: {candidate.why}"]
    reasons += [line for line in choice.reasons if line.startswith("recipe")]
    reasons += [_weights_line(row, rows), _limits_line(row, rows, limits)]
    reasons += _probe_lines(row, fitting)
    tag = VARIANTS[candidate.model].weights[0].tag if candidate.pretrained else None
    result = Choice(candidate.model, candidate.size, tag, choice.values["recipe"])
    others = [other for other in rows if other is not row and other.latency_ms is not None]
    following = next((other for other in others if other.fits), next(iter(others), None))
    return Recommendation(result, reasons, rows, _command(candidate, data), _runner_up(row, following))


def _weights_line(row: Row, rows: Sequence[Row]) -> str:
    """Where the weights come from, or what they would be."""
    candidate = row.candidate
    if candidate.pretrained:
        record = VARIANTS[candidate.model].weights[0]
        where = "on this machine" if at_hand(candidate.model) else "not on this machine yet: training downloads them"
        top1 = f", published top-1 {record.top1:.1f} %" if record.top1 else ""
        return f"weights {record.name}, licence {record.licence or 'not stated'}{top1}; {where}"
    if not any(other.candidate.pretrained for other in rows):
        return "from scratch: published weights are of images of 224 pixels or more"
    best = next((other.candidate.model for other in rows if other.candidate.pretrained and other.fits), None)
    if best is None:
        return "from scratch: no model with published weights is within the limits"
    if at_hand(best):
        return f"from scratch, although weights of {best} are on this machine"
    return f"from scratch: the weights of {best} are not on this machine; --pretrained downloads them"


def _limits_line(row: Row, rows: Sequence[Row], limits: Limits) -> str:
    parts = []
    if row.latency_ms is not None:
        most = "" if limits.latency_ms is None else f" of at most {limits.latency_ms:g}"
        parts.append(f"{_milliseconds(row.latency_ms)}{most} ms an image")
    if row.peak_mb is not None:
        most = "" if limits.memory_mb is None else f" of at most {limits.memory_mb:,.0f}"
        parts.append(f"{row.peak_mb:,.0f}{most} MB of memory")
    if row.seconds is not None and limits.hours is not None:
        parts.append(f"about {format_duration(row.seconds)} of at most {limits.hours:g} h to train")
    before = [other.candidate.model for other in rows[: rows.index(row)]]
    over = f"; over a limit: {', '.join(before)}" if before else ""
    return f"measured here: {', '.join(parts)}{over}" if parts else f"cost {row.note}"


def _probe_lines(row: Row, fitting: Sequence[Row]) -> list[str]:
    """What the nearest neighbours say, or why they say nothing."""
    probed = [other for other in fitting if other.probe_top1 is not None]
    if not probed:
        if not any(other.candidate.pretrained for other in fitting):
            return []
        return ["no probe of your images: no weights of a candidate are on this machine"]
    best = max(probed, key=lambda other: other.probe_top1 or 0.0)
    own = f"{row.probe_top1:.1f} % with {row.candidate.model}" if row.probe_top1 is not None else "not measured"
    line = f"{best.note}: top-1 {own}"
    if best is not row:
        line += f", highest {best.probe_top1:.1f} % with {best.candidate.model}"
    return [line]


def _runner_up(row: Row, other: Row | None) -> str | None:
    """What the next candidate would cost, compared with the choice."""
    if other is None:
        return None
    text = f"{other.candidate.model} at {_size(other.candidate.size)}: {_cost(other)}"
    if row.latency_ms and other.latency_ms:
        text += f", {other.latency_ms / row.latency_ms:.2g}x the latency"
    mine, theirs = row.candidate.top1, other.candidate.top1
    if mine is not None and theirs is not None:
        text += f", {theirs - mine:+.1f} points of published top-1"
    return text if other.fits else f"{text}; not within the limits"


def _command(candidate: Candidate, data: str) -> str:
    size = [] if candidate.img_size is None else ["--img-size", "x".join(map(str, dict.fromkeys(candidate.img_size)))]
    weights = ["--pretrained"] if candidate.pretrained else []
    return shlex.join(["vitrail", "train", data, "--model", candidate.model, *size, *weights])


def _cost(row: Row) -> str:
    memory = "" if row.peak_mb is None else f", {row.peak_mb:,.0f} MB"
    return f"{_milliseconds(row.latency_ms or 0.0)} ms{memory}"


def _milliseconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _size(size: tuple[int, int]) -> str:
    return "x".join(str(side) for side in size)
