"""Static int8 of OpenVINO by NNCF: weights and activations, with ranges from calibration images."""

import contextlib
import io
import logging
from collections.abc import Collection, Sequence
from typing import Any

from vitrail.images.convert import Pixels
from vitrail.models.configs import ModelConfig, ResNetConfig, SwinConfig

_OPERATIONS = ("MatMul", "Convolution", "GroupConvolution")


def quantize_static(model: Any, images: Sequence[Pixels], config: ModelConfig, keep: Collection[str] = ()) -> Any:
    """An openvino.Model in int8; `model` is not changed.

    images: uint8 H W C. keep: names of layers to leave in float32: those of the values that they compute.
    """
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedSmoothQuantParameters

    smooth = AdvancedSmoothQuantParameters(matmul=-1, convolution=-1) if isinstance(config, SwinConfig) else None
    advanced = nncf.AdvancedQuantizationParameters(**({"smooth_quant_alphas": smooth} if smooth else {}))
    nncf.set_log_level(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        return nncf.quantize(
            model.clone(),
            nncf.Dataset([image[None] for image in images]),
            subset_size=len(images),
            model_type=None if isinstance(config, ResNetConfig) else nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=[operation_of(model, name) for name in keep]),
            advanced_parameters=advanced,
        )


def operation_of(model: Any, value: str) -> str:
    """OpenVINO's name of the layer that computes this value; it may have become a product and an addition."""
    named = (each for each in model.get_ops() if any(value in port.names for port in each.outputs()))
    (operation,) = (each for each in named if each.get_type_name() != "Result")  # an output has its value's name
    while operation.get_type_name() not in _OPERATIONS:
        operation = operation.input_value(0).get_node()
    return str(operation.friendly_name)
