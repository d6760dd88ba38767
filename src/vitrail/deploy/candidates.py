"""What a classifier can be exported as, and how each is built."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx

from vitrail.classifier import Classifier
from vitrail.deploy.fold.fold import FOLDS
from vitrail.deploy.graph import IMAGE, MODEL, WEIGHTS, with_preprocess, write_onnx
from vitrail.deploy.quantize.calibration import Calibration
from vitrail.deploy.quantize.dynamic import quantize_dynamic
from vitrail.deploy.quantize.sensitivity import rank_layers
from vitrail.deploy.quantize.static import quantize_static
from vitrail.deploy.targets import openvino as openvino_model
from vitrail.deploy.targets.pt2 import MODEL as PT2_MODEL
from vitrail.deploy.targets.pt2 import write_pt2
from vitrail.errors import ConfigError, DeviceError, how_to_install
from vitrail.inference.export_folder import ExportRecord
from vitrail.utils.torch_compat import cpu_bf16

AUTO = "auto"
_RANKING_IMAGES = 16
_FILES = {  # the model entry and the image entry of each target
    "onnx": (MODEL, IMAGE),
    "openvino": (openvino_model.MODEL, openvino_model.IMAGE),
    "pt2": (PT2_MODEL, ""),
}


@dataclass(frozen=True, order=True)
class Candidate:
    """A runtime and a precision."""

    target: str
    precision: str

    def __str__(self) -> str:
        return f"{self.target} {self.precision}"


CANDIDATES = (
    Candidate("onnx", "fp32"),
    Candidate("onnx", "int8"),
    Candidate("openvino", "fp32"),
    Candidate("openvino", "bf16"),
    Candidate("openvino", "int8"),
)
PT2 = Candidate("pt2", "fp32")  # needs torch to predict, so that "auto" does not try it
WEB = "web"  # the ONNX files, for a browser: its speed cannot be measured here
TARGETS = (*dict.fromkeys(each.target for each in CANDIDATES), PT2.target, WEB)
PRECISIONS = tuple(dict.fromkeys(each.precision for each in CANDIDATES))
_PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino", "nncf"),
    "pt2": (),
}

_FLOAT64_INTERPOLATIONS = ("nearest", "box")


def unavailable(candidate: Candidate, calibrated: bool, interpolation: str) -> str | None:
    """Why this machine or these arguments do not allow a candidate; None if they do. interpolation: of resizing."""
    missing = [name for name in _PACKAGES[candidate.target] if find_spec(name) is None]
    if missing:
        return f"{candidate.target} needs {' and '.join(missing)}: {how_to_install(candidate.target)}"
    if candidate.target == "openvino" and interpolation in _FLOAT64_INTERPOLATIONS:
        return f"OpenVINO has no float64, which decides ties of {interpolation!r} resizing: use target onnx"
    if candidate.precision == "bf16" and cpu_bf16() is None:
        return "this CPU has no instructions for bfloat16"
    if candidate.precision == "int8" and not calibrated:
        return "int8 needs images, to calibrate and to check it: name a dataset with --data"
    return None


def choose_candidates(
    target: str, precision: str, calibrated: bool, interpolation: str
) -> tuple[list[Candidate], dict[str, str]]:
    """The candidates that are asked for, and those of them that are left out, with the reason.

    Raises:
        ConfigError: an unknown target or precision, or no runtime has the precision.
        DeviceError: none of the candidates is possible here.
    """
    for name, value, known in (("target", target, TARGETS), ("precision", precision, PRECISIONS)):
        if value != AUTO and value not in known:
            raise ConfigError(f"{name} must be one of {', '.join(known)} or {AUTO}, not {value!r}")
    if target == WEB:
        target, precision = "onnx", "fp32" if precision == AUTO else precision
    of_target = [each for each in (*CANDIDATES, PT2) if (each != PT2 if target == AUTO else each.target == target)]
    asked = [each for each in of_target if precision in (AUTO, each.precision)]
    if not asked:
        others = ", ".join(each.target for each in CANDIDATES if each.precision == precision)
        raise ConfigError(f"{target} has no {precision} on CPUs: use target {others}")
    reasons = {each: unavailable(each, calibrated, interpolation) for each in asked}
    left_out = {str(each): reason for each, reason in reasons.items() if reason}
    if len(left_out) == len(asked):
        kind = ConfigError if any("--data" in reason for reason in left_out.values()) else DeviceError
        raise kind("; ".join(dict.fromkeys(left_out.values())))
    return [each for each in asked if str(each) not in left_out], left_out


class Builder:
    """Builds export folders of one classifier in the folder `work`.

    source: its name and fingerprint, for export.json; "student" if it was trained for the export. merging: how its
    tokens are merged, if that was chosen for the export.
    """

    def __init__(
        self,
        classifier: Classifier,
        work: Path,
        calibration: Calibration | None,
        source: dict[str, Any],
        merging: dict[str, Any] | None = None,
    ) -> None:
        self.classifier = classifier
        self.work = work
        self.calibration = calibration
        self.source = source
        self.merging = merging
        self.student = "student" in source
        self._ranked: dict[str, list[onnx.NodeProto]] = {}

    @property
    def _exact(self) -> Path:
        """The folder with the ONNX files in float32, from which all others are made."""
        folder = self.work / "onnx-fp32"
        if not (folder / IMAGE).exists():
            folder.mkdir(exist_ok=True)
            write_onnx(self.classifier, folder)
        return folder

    def build(self, candidate: Candidate, keep: Collection[onnx.NodeProto] = ()) -> Path:
        """A new export folder, without a README. keep: layers that int8 leaves in float32."""
        folder = self.work / f"{candidate.target}-{candidate.precision}"
        if keep:
            folder = folder.with_name(f"{folder.name}-{len(keep)}")
        if candidate == PT2:
            folder.mkdir()
            write_pt2(self.classifier, folder)
        elif candidate.target == "openvino":
            self._openvino(folder, candidate.precision, keep)
        elif candidate.precision == "int8":
            self._dynamic(folder, keep)
        else:
            folder = self._exact
        self.record(candidate).write(folder)
        return folder

    def rank(self, candidate: Candidate) -> list[onnx.NodeProto]:
        """The layers that int8 quantises, the most sensitive first."""
        if candidate.target not in self._ranked:
            assert self.calibration is not None
            images = self.calibration.images[:_RANKING_IMAGES]
            products = candidate.target == "onnx"
            self._ranked[candidate.target] = rank_layers(self._exact / MODEL, images, products_only=products)
        return self._ranked[candidate.target]

    def record(self, candidate: Candidate) -> ExportRecord:
        """What export.json says before the check."""
        model, image = _FILES[candidate.target]
        static = candidate == Candidate("openvino", "int8") and self.calibration
        return ExportRecord(
            architecture=self.classifier.architecture,
            target=candidate.target,
            precision=candidate.precision,
            model=model,
            image=image,
            class_names=self.classifier.class_names,
            preprocess=self.classifier.preprocess,
            num_features=self.classifier.model.num_features,
            notes=self.classifier.notes,
            source=self.source,
            folds=tuple(FOLDS),
            merging=self.merging,
            calibration=static.to_dict() if static else None,
        )

    def _dynamic(self, folder: Path, keep: Collection[onnx.NodeProto]) -> None:
        proto = quantize_dynamic(self._exact / MODEL, [node.name for node in keep])
        folder.mkdir()
        onnx.save_model(proto, folder / MODEL, save_as_external_data=True, location=WEIGHTS, size_threshold=1024)
        proto = onnx.load(folder / MODEL, load_external_data=False)
        onnx.save_model(with_preprocess(proto, self.classifier.preprocess), folder / IMAGE)

    def _openvino(self, folder: Path, precision: str, keep: Collection[onnx.NodeProto]) -> None:
        model = openvino_model.read_openvino(self._exact / MODEL)
        if precision == "int8":
            assert self.calibration is not None
            values = [node.output[0] for node in keep]
            model = quantize_static(model, self.calibration.images, self.classifier.model.config, values)
        folder.mkdir()
        openvino_model.write_openvino(model, self._exact / IMAGE, folder, half=precision == "bf16")
