"""Opens an export folder as a Runtime: `open_runtime`.

Shapes: B batch, H W height and width, C channels, K classes, F features.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from vitrail.errors import ExportError, ModelError
from vitrail.inference.export_folder import ExportRecord
from vitrail.inference.onnx_runtime import OnnxSession
from vitrail.inference.openvino_runtime import OpenVINOSession
from vitrail.inference.pt2_runtime import Pt2Session
from vitrail.inference.runtime import Images, Outputs, default_batch_size
from vitrail.inference.threads import default_threads
from vitrail.utils.files import user_path


class Session(Protocol):
    """A model file in a runtime, made from its path, the number of threads and the precision.

    input_shape: B H W C, None where it is dynamic; output_shapes: those of each output, by name.
    """

    input_shape: tuple[int | None, ...]
    output_shapes: dict[str, tuple[int | None, ...]]

    def run(self, images: Images, output: str) -> Outputs: ...


SESSIONS: dict[str, type[OnnxSession] | type[OpenVINOSession] | type[Pt2Session]] = {
    "onnx": OnnxSession,
    "openvino": OpenVINOSession,
    "pt2": Pt2Session,
}


class ExportRuntime:
    """The model of an export folder as a Runtime. at_once: calls of several threads that are best computed at once."""

    def __init__(self, record: ExportRecord, session: Session) -> None:
        self.record = record
        self.session = session
        self.name = record.architecture
        self.preprocess = record.preprocess
        self.num_classes = len(record.class_names)
        self.num_features = record.num_features
        self.default_batch_size = default_batch_size(record.preprocess, "cpu")
        self.at_once: int = getattr(session, "at_once", 1)

    def logits(self, images: Images) -> Outputs:
        return self.session.run(images, "logits")

    def features(self, images: Images) -> Outputs:
        return self.session.run(images, "features")

    def fingerprint(self) -> str:
        return self.record.fingerprint()


def open_runtime(folder: str | Path, threads: int = 0) -> ExportRuntime:
    """Check an export folder and load its model.

    threads: 0 for those of the export, else `default_threads`.

    Raises:
        ExportError: the export is damaged, or not of this version.
        ModelError: class names or preprocessing do not match the model.
        DeviceError: its runtime is not installed.
    """
    folder = user_path(folder)
    record = ExportRecord.read(folder)
    record.check_sizes(folder)
    path = folder / record.model
    with ThreadPoolExecutor(1) as pool:  # a checksum takes about as long as loading
        check = pool.submit(record.check_sums, folder)
        try:
            session = SESSIONS[record.target](path, threads or record.threads or default_threads(), record.precision)
        except Exception:
            check.result()  # if the file was changed, this says so
            raise
        check.result()
    _check_shapes(path, record, session)
    return ExportRuntime(record, session)


def _check_shapes(path: Path, record: ExportRecord, session: Session) -> None:
    expected = (None, *record.preprocess.size, record.preprocess.channels)
    if session.input_shape != expected:
        raise ModelError(f"{path} takes images of shape {session.input_shape}, not {expected} as in export.json")
    widths = {"logits": len(record.class_names), "features": record.num_features}
    for name, width in widths.items() if record.class_names else [("features", record.num_features)]:
        shape = session.output_shapes.get(name)
        if shape is None:
            raise ExportError(f"{path} has no output {name!r}: export the model again")
        if shape[1:] != (width,):
            what = "class names" if name == "logits" else "features"
            raise ModelError(f"{path} gives {name} of shape {shape}, and export.json has {width} {what}")
