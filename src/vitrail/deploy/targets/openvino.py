"""Models of OpenVINO, made from ONNX files."""

from pathlib import Path
from typing import Any

from vitrail.deploy.preprocess_graph import PIXELS
from vitrail.inference.openvino_runtime import openvino_core

MODEL, IMAGE = "model.xml", "image.xml"


def read_openvino(path: Path) -> Any:
    """An openvino.Model from an ONNX file or from OpenVINO's own."""
    return openvino_core().read_model(path)


def write_openvino(model: Any, image: Path, folder: Path, *, half: bool) -> None:
    """Write model.xml and image.xml, each with its .bin.

    image: the ONNX file of the image entry of the same model, of which the preprocessing is taken. half: store the
    weights in float16.
    """
    import openvino

    openvino.save_model(model, folder / MODEL, compress_to_fp16=half)
    whole = read_openvino(image)
    own = model.clone()
    (entry,) = own.get_parameters()
    ports = (port for operation in whole.get_ordered_ops() for port in operation.outputs())
    pixels = next(port for port in ports if PIXELS in port.names)
    entry.output(0).replace(pixels)
    joined = openvino.Model(own.get_results(), whole.get_parameters(), "image")
    openvino.save_model(joined, folder / IMAGE, compress_to_fp16=half)
