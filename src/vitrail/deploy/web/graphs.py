"""The ONNX files of a web folder, made from those of an export.

onnx/model.onnx takes `pixel_values` as transformers.js makes them, onnx/image.onnx an image of any size; both have
their weights in onnx/model.onnx_data, the name that transformers.js expects.

Shapes: B batch, H W height and width, C channels.
"""

import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import compose, helper

from vitrail.deploy.graph import IMAGE, MODEL, WEIGHTS
from vitrail.deploy.onnx_ops import GraphBuilder, Value
from vitrail.images.preprocess import Preprocess

FOLDER, DATA = "onnx", "model.onnx_data"
_INPUT = "pixel_values"


def write_graphs(export: Path, preprocess: Preprocess, folder: Path) -> None:
    """Write `folder`/onnx from the ONNX files of `export`."""
    out = folder / FOLDER
    out.mkdir()
    shutil.copyfile(export / WEIGHTS, out / DATA)
    image = onnx.load(export / IMAGE, load_external_data=False)
    model = onnx.load(export / MODEL, load_external_data=False)
    for graph, name in ((image, IMAGE), (_from_normalised(model, preprocess), MODEL)):
        for tensor in graph.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = DATA
        onnx.save_model(graph, out / name)


def _from_normalised(model: onnx.ModelProto, preprocess: Preprocess) -> onnx.ModelProto:
    """`model` for images that are normalised, float B C H W. They are rounded to the pixels that they were.

    A grey model takes colours: transformers.js has no setting for grey.
    """
    grey = preprocess.channels == 1
    height, width = preprocess.size
    graph = GraphBuilder("web/")
    channels = (1, preprocess.channels, 1, 1)
    values = Value(graph, _INPUT) * np.array(preprocess.std, np.float32).reshape(channels)
    pixels = (values + np.array(preprocess.mean, np.float32).reshape(channels)) * 255.0
    if grey:
        luma = np.array([0.299, 0.587, 0.114], np.float32).reshape(1, 3, 1, 1)
        pixels = graph.op("ReduceSum", pixels * luma, np.array([1], np.int64), keepdims=1)
    pixels = graph.op("Clip", graph.op("Round", pixels), np.float32(0), np.float32(255))
    pixels = graph.op("Transpose", graph.op("Cast", pixels, to=onnx.TensorProto.UINT8), perm=[0, 2, 3, 1])
    shape: list[str | int | None] = ["batch", 3 if grey else preprocess.channels, height, width]
    given = helper.make_tensor_value_info(_INPUT, onnx.TensorProto.FLOAT, shape)
    made = helper.make_tensor_value_info(
        pixels.name, onnx.TensorProto.UINT8, ["batch", height, width, preprocess.channels]
    )
    first = helper.make_graph(graph.nodes, "pixels", [given], [made], graph.constants)
    joined = compose.merge_graphs(first, model.graph, [(pixels.name, model.graph.input[0].name)])
    whole = helper.make_model(joined, opset_imports=model.opset_import, ir_version=model.ir_version)
    helper.set_model_props(whole, {prop.key: prop.value for prop in model.metadata_props})
    return whole
