"""The export folder: a classifier for another runtime, described by `export.json`. Importing this imports no torch.

    export.json    ExportRecord as JSON
    model.onnx     uint8 images B H W C, resized and cropped -> logits B K, probabilities B K, features B F
    image.onnx     one uint8 image H W C of any size -> logits 1 K, probabilities 1 K; for programs without vitrail
    weights.bin    the tensors of both

With OpenVINO as target, model.xml and image.xml, each with its .bin.
Shapes: B batch, H W height and width, C channels, K classes, F features.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitrail._version import __version__
from vitrail.errors import ConfigError, ExportError, did_you_mean
from vitrail.images.preprocess import Preprocess
from vitrail.utils.files import atomic_write_text, user_path
from vitrail.utils.text import one_line

RECORD = "export.json"
FORMAT = 1
TARGETS = ("onnx", "openvino", "pt2")
PRECISIONS = ("fp32", "bf16", "int8")
_MODEL_FILES = (".onnx", ".xml", ".bin", ".pt2")


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """The content of export.json.

    source: "name" and "fingerprint" of the classifier that was exported. threads: of the runtime, None for its default.
    notes: of the classifier, such as how the training images were split. folds: names of the folds that were applied.
    merging: how tokens are merged. calibration: the images of a quantisation. check: the result of the check against
    the source. files: size ("bytes") and "sha256" of each model file; `write` fills it in. vitrail: the version that
    wrote it.
    """

    architecture: str
    target: str
    precision: str
    model: str
    image: str
    class_names: tuple[str, ...]
    preprocess: Preprocess
    num_features: int
    source: dict[str, Any]
    threads: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    folds: tuple[str, ...] = ()
    merging: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    check: dict[str, Any] | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    vitrail: str = __version__

    def write(self, folder: Path) -> ExportRecord:
        """Write export.json, atomically, with the sizes and checksums of the model files in the folder."""
        names = sorted(path.name for path in folder.iterdir() if path.suffix in _MODEL_FILES)
        files = {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names}
        record = dataclasses.replace(self, files=files)
        values = {each.name: getattr(record, each.name) for each in dataclasses.fields(record)}
        content = {"format": FORMAT, **values, "preprocess": self.preprocess.to_dict()}
        atomic_write_text(folder / RECORD, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return record

    @classmethod
    def read(cls, folder: Path) -> ExportRecord:
        """Read export.json strictly; the model files are not read.

        Raises:
            ExportError: it is missing, damaged or of another format.
        """
        path = folder / RECORD
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ExportError(f"{path} could not be read ({one_line(error)}): export the model again") from None
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ExportError(f"{path} is not of format {FORMAT}: update vitrail, or export the model again")
        _check_types(path, content)
        try:
            content["preprocess"] = Preprocess.from_dict(content["preprocess"])
        except (ConfigError, TypeError, ValueError) as error:
            raise ExportError(f"{path} has an invalid preprocessing: {one_line(error)}") from None
        content |= {"class_names": tuple(content["class_names"]), "folds": tuple(content["folds"])}
        return cls(**content)

    def check_sizes(self, folder: Path) -> None:
        """Raises ExportError if a model file is missing or has another size than in export.json."""
        for name, expected in self.files.items():
            path = folder / name
            if not path.is_file():
                raise ExportError(f"{path} is missing: copy the whole export, or export the model again")
            if (size := path.stat().st_size) != expected["bytes"]:
                raise _changed(path, f"it has {size:,} bytes, not {expected['bytes']:,}")

    def check_sums(self, folder: Path) -> None:
        """Raises ExportError if a file of `model` has another checksum than in export.json."""
        for name, expected in self.files.items():
            if Path(name).stem != Path(self.image).stem and _sha256(folder / name) != expected["sha256"]:
                raise _changed(folder / name, "its checksum differs")

    def fingerprint(self) -> str:
        """A hex digest that changes with the model's files and the preprocessing."""
        content = json.dumps([self.files, self.preprocess.to_dict(), self.target, self.precision], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def is_export(path: str | Path) -> bool:
    """Whether this is an export folder, perhaps one whose export.json is missing."""
    folder = user_path(path)
    return any((folder / name).is_file() for name in (RECORD, "image.onnx", "image.xml"))


_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "architecture": str,
    "target": str,
    "precision": str,
    "model": str,
    "image": str,
    "class_names": list,
    "preprocess": dict,
    "num_features": int,
    "source": dict,
    "threads": (int, type(None)),
    "notes": dict,
    "folds": list,
    "merging": (dict, type(None)),
    "calibration": (dict, type(None)),
    "check": (dict, type(None)),
    "files": dict,
    "vitrail": str,
}


def _check_types(path: Path, content: dict[str, Any]) -> None:
    for key in content:
        if key not in _KINDS:
            raise ExportError(f"{path} has the unknown key {key!r}{did_you_mean(key, _KINDS)}: update vitrail")
    for key, kind in _KINDS.items():
        if key not in content:
            raise ExportError(f"{path} has no {key!r}: it is damaged; export the model again")
        if not isinstance(content[key], kind):
            raise ExportError(f"{path} has an invalid {key!r}, {one_line(content[key], 60)}: export the model again")
    for key, known in (("target", TARGETS), ("precision", PRECISIONS)):
        if content[key] not in known:
            raise ExportError(f"{path} has the {key} {content[key]!r}, not one of {', '.join(known)}: update vitrail")
    texts = [*content["class_names"], *content["folds"], content["source"].get("name")]
    files = [isinstance(each, dict) and each.keys() == {"bytes", "sha256"} for each in content["files"].values()]
    outside = [name for name in (*content["files"], content["model"], content["image"]) if Path(name).name != name]
    if not all(isinstance(text, str) for text in texts) or not all(files) or outside:
        raise ExportError(f"{path} has invalid class_names, folds, source or files: export the model again")
    if content["model"] not in content["files"]:
        raise ExportError(f"{path} lists no checksum of {content['model']}: export the model again")


def _changed(path: Path, how: str) -> ExportError:
    return ExportError(f"{path} was changed after the export ({how}): copy it again, or export the model again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
