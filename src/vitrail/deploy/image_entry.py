"""The image entry of an export, run as a program without vitrail would run it.

Shapes: H W height and width, C channels, K classes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vitrail.deploy.gate import CheckImages
from vitrail.images.convert import Pixels, to_channels
from vitrail.inference.export_folder import ExportRecord
from vitrail.inference.exported import ExportRuntime
from vitrail.inference.openvino_runtime import openvino_core
from vitrail.inference.probabilities import softmax

_IMAGES = 8
_TOLERANCE = {"fp32": 0.01, "bf16": 0.05, "int8": 0.05}  # of a probability: pixels may differ by 1 of 255


def reject_image_entry(folder: Path, runtime: ExportRuntime, check: CheckImages) -> str | None:
    """Why the image entry is refused: it does not give the probabilities of the model entry. None if it does."""
    record, split = runtime.record, check.reader.split
    if not record.image:
        return None
    for row in check.rows[:_IMAGES]:
        image = split.image(row)
        pixels = np.asarray(to_channels(image, record.preprocess.channels))
        ours = run_image_entry(folder, record, pixels.reshape(*pixels.shape[:2], -1))
        theirs = softmax(runtime.logits(record.preprocess.crop(image)[None]))
        error = float(np.abs(ours - theirs).max())
        if not error <= _TOLERANCE[record.precision]:  # also if it is not a number
            return f"{record.image} gives other probabilities than {record.model}, by up to {error:.3g}"
    return None


def run_image_entry(folder: Path, record: ExportRecord, pixels: Pixels) -> npt.NDArray[np.float32]:
    """The probabilities K of an image H W C."""
    path = str(folder / record.image)
    if record.target == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found: Any = session.run(["probabilities"], {"image": pixels})[0]
    else:
        settings = {"INFERENCE_PRECISION_HINT": "bf16" if record.precision == "bf16" else "f32"}
        found = openvino_core().compile_model(path, "CPU", settings)(pixels)["probabilities"]
    return np.asarray(found[0])
