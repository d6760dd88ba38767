"""Dynamic int8 of ONNX Runtime: weights in 8 bits for each output channel; the range of an activation is found anew in
each batch.

Only matrix products with weights are quantised: a quantised convolution is slower than a float one there. As the range
is that of the batch, a prediction depends a little on the other images in it.
"""

import tempfile
from collections.abc import Collection
from pathlib import Path

import onnx
from onnx import helper

from vitrail.deploy.quantize.layers import layers, matrix_products, weight_count
from vitrail.errors import ExportError
from vitrail.utils.torch_compat import cpu_vnni

_MIN_SHARE = 0.5  # of the weights, that quantised layers need to have


def quantize_dynamic(model: Path, keep: Collection[str] = ()) -> onnx.ModelProto:
    """The model with its matrix products in int8, but for the nodes named in `keep`.

    Raises:
        ExportError: most of the weights are in layers that cannot be quantised, such as the convolutions of a ResNet.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as onnxruntime_quantize

    proto = onnx.load(model)
    products = matrix_products(proto.graph)
    share = weight_count(proto.graph, iter(products)) / max(1, weight_count(proto.graph, layers(proto.graph)))
    if share < _MIN_SHARE:
        raise ExportError(
            f"ONNX Runtime's dynamic int8 quantises matrix products, which have {100 * share:.0f} % of the weights"
            " here: use --target openvino, which quantises convolutions too"
        )
    properties = {each.key: each.value for each in proto.metadata_props}
    helper.set_model_props(proto, {"onnx.quant.pre_process": "onnxruntime.quant"})  # else it warns
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        out = Path(folder, "quantized.onnx")
        onnxruntime_quantize(
            proto,
            out,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=not cpu_vnni(),  # 7 bits: sums of products of 8 bits overflow the 16 bits of AVX2
            weight_type=QuantType.QInt8,
            nodes_to_quantize=[node.name for node in products if node.name not in keep],
            use_external_data_format=True,
        )
        quantized = onnx.load(out)
    helper.set_model_props(quantized, properties)
    return quantized
