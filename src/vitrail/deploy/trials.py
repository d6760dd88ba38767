"""The candidates of one export: each is built, compared with the model, timed beside it, and judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitrail.deploy.candidates import CANDIDATES, Builder, Candidate, unavailable
from vitrail.deploy.gate import Agreement, CheckImages, Limits, reject_speed
from vitrail.deploy.image_entry import reject_image_entry
from vitrail.deploy.measure import REFERENCE, ByBatch, count_bytes, measure_latency
from vitrail.errors import ExportError, ModelError
from vitrail.inference.exported import ExportRuntime, open_runtime
from vitrail.inference.torch_runtime import TorchRuntime
from vitrail.utils.text import one_line

_SHARES = (0.05, 0.1, 0.2, 0.4)  # of the layers in float32, one after the other, until int8 passes


@dataclass
class Row:
    """One candidate: what was measured of it, and why the gate refuses it (None: accepted).

    model: the architecture. student: a smaller model, trained for the
    export. float_layers: the layers that int8 leaves in float32.
    """

    candidate: Candidate
    model: str
    student: bool = False
    folder: Path | None = None
    bytes: int | None = None
    latency_ms: ByBatch | None = None
    speedup: ByBatch | None = None
    agreement: Agreement | None = None
    float_layers: tuple[str, ...] = ()
    reason: str | None = None

    def __str__(self) -> str:
        mixed = f", {len(self.float_layers)} layers in fp32" if self.float_layers else ""
        return f"{self.model} {self.candidate}{mixed}"

    def to_dict(self, path: Path | None = None) -> dict[str, Any]:
        """The row of `export --json`. path: of the export, if it is this one."""
        found = self.agreement
        return {
            "model": self.model,
            "student": self.student,
            "target": self.candidate.target,
            "precision": self.candidate.precision,
            "path": None if path is None else str(path),
            "bytes": self.bytes,
            "latency_ms": self.latency_ms,
            "speedup": self.speedup,
            "top1": found and found.top1,
            "top1_reference": found and found.top1_reference,
            "difference": found and found.difference,
            "ci95": found and found.ci95 and list(found.ci95),
            "images": found and found.images,
            "agreement": found and found.agreement,
            "max_abs_logit_error": found.error if found and math.isfinite(found.error) else None,
            "float_layers": list(self.float_layers),
            "accepted": self.reason is None,
            "reason": self.reason,
        }


class ExportRefused(ExportError):
    """No candidate passed the gate; nothing was written. `rows` are those that were measured."""

    def __init__(self, message: str, rows: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.rows = rows


@dataclass
class Trials:
    """reference: the model as its user runs it, for the speed; the images have its logits in float32.

    rows: every candidate that was tried.
    """

    builder: Builder
    reference: TorchRuntime
    images: CheckImages
    limits: Limits
    log: Callable[[str], None]
    rows: list[Row] = field(default_factory=list)
    reference_ms: ByBatch | None = None

    def run(self, candidates: Sequence[Candidate]) -> Row | None:
        """Try candidates; the fastest of those that pass, None if none does."""
        tried = []
        runtimes: dict[str, ExportRuntime] = {}
        for candidate in candidates:
            row, runtime = self._build(candidate)
            tried.append(row)
            if runtime:
                runtimes[str(candidate)] = runtime
        self.rows += tried
        self._time([row for row in tried if str(row.candidate) in runtimes], runtimes)
        for row in sorted(tried, key=_milliseconds):
            best = self._best(tried)
            faster = row.latency_ms and (best is None or _milliseconds(row) < _milliseconds(best))
            if row.candidate.precision == "int8" and faster and self._rejects(row):
                tried += self._mix_precisions(row)
        return self._best(tried)

    def factor(self) -> float:
        """How much faster the fastest accurate candidate has to become."""
        speeds = [row.speedup["1"] for row in self.rows if row.speedup and not self._rejects(row)]
        return self.limits.min_speedup / max(speeds, default=1.0)

    def reference_figures(self) -> dict[str, Any]:
        """The model as its user runs it."""
        found = next((row.agreement for row in self.rows if row.agreement), None)
        return {
            "precision": "bf16" if self.reference.bf16 else "fp32",
            "latency_ms": self.reference_ms,
            "top1": found and found.top1_reference,
        }

    def refuse(self) -> ExportRefused:
        """The error that says why nothing passed, and what would be the best."""
        asked = [row.candidate for row in self.rows]
        reasons = "; ".join(f"{row}: {row.reason}" for row in self.rows)
        interpolation = self.builder.classifier.preprocess.interpolation
        possible = [each for each in CANDIDATES if not unavailable(each, self._calibrated, interpolation)]
        others = [each for each in possible if each not in asked]
        if others:
            self.log(f"looking for an alternative: {', '.join(map(str, others))}")
        best = self.run(others) if others else None
        if best:
            advice = f"the best alternative is --target {best.candidate.target} --precision {best.candidate.precision}"
        else:
            accurate = [row for row in self.rows if row.speedup and not self._rejects(row)]
            best = min(accurate, key=_milliseconds, default=None)
            advice = "none of the others passes: train a smaller model with --distill"
            if best:
                advice = f"the best alternative is {best.candidate}, with a lower --min-speedup, or --distill"
        figures = f" ({_describe(best)})" if best else ""
        message = f"the export is refused: {reasons}. {advice[0].upper()}{advice[1:]}{figures}"
        return ExportRefused(message, [row.to_dict() for row in self.rows])

    @property
    def _calibrated(self) -> bool:
        return self.builder.calibration is not None

    def _build(self, candidate: Candidate, keep: Sequence[Any] = ()) -> tuple[Row, ExportRuntime | None]:
        """Build a candidate and compare it with the model."""
        row = Row(
            candidate,
            self.builder.classifier.architecture,
            self.builder.student,
            float_layers=tuple(node.name for node in keep),
        )
        kept = f", {len(keep)} layers in float32" if keep else ""
        self.log(f"{candidate}{kept}: building")
        try:
            row.folder = self.builder.build(candidate, keep)
            runtime = open_runtime(row.folder)
            row.agreement = Agreement.of(self.images, self.images.run(runtime))
            row.reason = self._rejects(row) or reject_image_entry(row.folder, runtime, self.images)
        except (ExportError, ModelError, RuntimeError) as error:  # of the runtimes and of torch's exporter
            # The runtime's own message, which a shorter one may have replaced, without the temporary folder.
            text = str(error.__context__ or error).replace(f"{self.builder.work}/", "")
            row.reason = f"it cannot be built or loaded: {one_line(text, 400)}"
            return row, None
        row.bytes = count_bytes(row.folder)
        return row, runtime

    def _rejects(self, row: Row) -> str | None:
        changed = row.student or self.builder.merging is not None  # then the logits are not to be the model's
        exact = row.candidate.precision == "fp32" and not changed
        return None if row.agreement is None else row.agreement.reject(self.limits, exact=exact)

    def _time(self, rows: Sequence[Row], runtimes: dict[str, ExportRuntime]) -> None:
        """Measure rows beside the reference, and refuse those that are too slow."""
        if not rows:
            return
        self.log(f"timing {', '.join(str(row.candidate) for row in rows)} beside the model in torch")
        milliseconds, speedup = measure_latency({REFERENCE: self.reference, **runtimes})
        self.reference_ms = milliseconds[REFERENCE]
        for row in rows:
            label = str(row.candidate)
            row.latency_ms, row.speedup = milliseconds[label], speedup[label]
            row.reason = row.reason or reject_speed(row.speedup["1"], self.limits)

    def _mix_precisions(self, row: Row) -> list[Row]:
        """int8 again, with the most sensitive layers in float32: more and more, until the accuracy passes."""
        ranked = self.builder.rank(row.candidate)
        found: list[Row] = []
        for count in dict.fromkeys(math.ceil(share * len(ranked)) for share in _SHARES):
            mixed, runtime = self._build(row.candidate, ranked[:count])
            found.append(mixed)
            if runtime and mixed.reason is None:
                self._time([mixed], {str(row.candidate): runtime})
                break
        self.rows += found
        return found

    def _best(self, rows: Sequence[Row]) -> Row | None:
        return min((row for row in rows if row.reason is None), key=_milliseconds, default=None)


def _milliseconds(row: Row) -> float:
    return row.latency_ms["1"] if row.latency_ms else math.inf


def _describe(row: Row) -> str:
    parts = [f"{row.speedup['1']:.2f}x as fast"] if row.speedup else []
    if row.agreement and row.agreement.difference is not None:
        parts.append(f"top-1 {row.agreement.difference:+.2f} points")
    return ", ".join(parts)
