"""A classifier as ONNX files, which any runtime runs without Python code of this package.

Shapes: B batch, H W height and width, C channels, K classes, F features.
"""

import json
import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import torch
from onnx import compose, helper
from torch import Tensor, nn

from vitrail._version import __version__
from vitrail.classifier import Classifier
from vitrail.deploy.fold.fold import fold_model
from vitrail.deploy.onnx_ops import GraphBuilder, Value
from vitrail.deploy.preprocess_graph import add_preprocess
from vitrail.images.preprocess import Preprocess
from vitrail.utils.files import disk_errors

OPSET = 20  # the first with Gelu
IR_VERSION = 9  # the lowest for it: old runtimes refuse files of a newer one
MODEL, IMAGE, WEIGHTS = "model.onnx", "image.onnx", "weights.bin"


def write_onnx(
    classifier: Classifier, folder: Path, *, skip: Collection[str] = (), model: nn.Module | None = None
) -> None:
    """Write three files to `folder`, which must exist:

    model.onnx: `images` uint8 B H W C of the size of `classifier.preprocess` -> `logits` B K, `probabilities` B K,
    `features` B F. image.onnx: `image` uint8 H W C, upright RGB or grey of any size -> the same for B = 1.
    weights.bin: the weights of both. Without classes (K = 0) `features` is the only output.

    skip: folds to leave out. model: instead of the folded model of `classifier`, a module with the same inputs and
    outputs: pixels B C H W, floats in 0..255, to logits B K and features B F.

    Raises:
        ModelError: the architecture cannot be exported.
        RunError: the disk is full, read-only or forbidden.
    """
    preprocess = classifier.preprocess
    module = fold_model(classifier.model, preprocess, skip) if model is None else model
    graph = _export(module, preprocess, bool(classifier.class_names))
    helper.set_model_props(graph, _metadata(classifier))
    with disk_errors(folder):
        (folder / WEIGHTS).unlink(missing_ok=True)  # onnx appends
        onnx.save_model(
            graph,
            folder / MODEL,
            save_as_external_data=True,
            location=WEIGHTS,
            size_threshold=1024,
            convert_attribute=False,
        )
        graph = onnx.load(folder / MODEL, load_external_data=False)
        onnx.save_model(with_preprocess(graph, preprocess), folder / IMAGE)


class Outputs(nn.Module):
    """uint8 B H W C to the outputs of model.onnx."""

    def __init__(self, model: nn.Module, classes: bool) -> None:
        super().__init__()
        self.model = model
        self.classes = classes

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        logits, features = self.model(images.permute(0, 3, 1, 2).float())
        return (logits, logits.softmax(dim=1), features) if self.classes else (features,)


@contextmanager
def _only_errors(logger: logging.Logger) -> Iterator[None]:
    """Without warnings, such as that operators of torchvision are not installed: no export here has any."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _export(module: nn.Module, preprocess: Preprocess, classes: bool) -> onnx.ModelProto:
    example = torch.zeros(2, *preprocess.size, preprocess.channels, dtype=torch.uint8)
    with warnings.catch_warnings(), _only_errors(logging.getLogger("torch.onnx")), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's exporter uses functions of torch that are deprecated
        program = torch.onnx.export(
            Outputs(module, classes).eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits", "probabilities", "features"] if classes else ["features"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    assert program is not None  # with dynamo
    model: onnx.ModelProto = program.model_proto
    model.ir_version = IR_VERSION
    for part in (model.graph, *model.graph.node, *model.graph.initializer, *model.graph.value_info):
        del part.metadata_props[:]  # Python's stack traces, most of the file without the weights
    return model


def _metadata(classifier: Classifier) -> dict[str, str]:
    return {
        "class_names": json.dumps(classifier.class_names),
        "preprocess": json.dumps(classifier.preprocess.to_dict()),
        "architecture": classifier.architecture,
        "vitrail": __version__,
    }


def with_preprocess(model: onnx.ModelProto, preprocess: Preprocess) -> onnx.ModelProto:
    """`model` behind the preprocessing of one image of any size."""
    graph = GraphBuilder("preprocess/")
    pixels = add_preprocess(graph, Value(graph, "image"), preprocess)
    image = helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, ["height", "width", preprocess.channels])
    output = helper.make_tensor_value_info(
        pixels.name, onnx.TensorProto.UINT8, [1, *preprocess.size, preprocess.channels]
    )
    first = helper.make_graph(graph.nodes, "preprocess", [image], [output], graph.constants)
    # Of graphs, not of models, whose weights would have to be read.
    joined = compose.merge_graphs(first, model.graph, [(pixels.name, model.graph.input[0].name)])
    whole = helper.make_model(joined, opset_imports=model.opset_import, ir_version=model.ir_version)
    helper.set_model_props(whole, {prop.key: prop.value for prop in model.metadata_props})
    return whole
