"""OpenVINO models with GELU. Oracle: SciPy's erf."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from scipy.special import erf

from vitrail.inference.openvino_runtime import OpenVINOSession, openvino_core

RNG = np.random.default_rng(0)
FIRST = RNG.normal(scale=1e-3, size=(64, 96)).astype(np.float32)  # hidden values of about 1
SECOND = RNG.normal(scale=0.1, size=(96, 10)).astype(np.float32)
IMAGES = RNG.integers(0, 256, (3, 8, 8, 1), np.uint8)


def write_model(path: Path, approximate: str = "none") -> Path:
    """logits = gelu(pixels @ FIRST) @ SECOND."""
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["float"], ["pixels"]),
        helper.make_node("MatMul", ["pixels", "first"], ["hidden"], name="product_1"),
        helper.make_node("Gelu", ["hidden"], ["active"], approximate=approximate),
        helper.make_node("MatMul", ["active", "second"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "gelu",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 8, 8, 1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(FIRST, "first"), numpy_helper.from_array(SECOND, "second")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def kernels(session: OpenVINOSession, batch: int | None) -> list[str]:
    """Of each kernel of the program for this batch size the names of the operations that it computes."""
    program: Any = session._program(batch)
    found = program._model.get_runtime_model().get_ops()
    return [str(kernel.get_rt_info()["originalLayersNames"].value) for kernel in found]


def test_gelu_is_apart_in_the_program_for_single_images(tmp_path: Path) -> None:
    session = OpenVINOSession(write_model(tmp_path / "model.onnx"), 1, "fp32")
    assert list(session._programs) == [None]
    hidden = IMAGES.reshape(3, -1) @ FIRST.astype(np.float64)
    logits = hidden / 2 * (1 + erf(hidden / 2**0.5)) @ SECOND
    for _ in range(2):
        np.testing.assert_allclose(session.run(IMAGES, "logits"), logits, rtol=1e-5, atol=1e-5 * abs(logits).max())
        assert list(session._programs) == [None]
    single = [session.run(IMAGES[:1], "logits")]
    assert list(session._programs) == [None]
    single += [session.run(image[None], "logits") for image in IMAGES[1:]]
    assert list(session._programs) == [None, 1]
    np.testing.assert_allclose(np.concatenate(single), logits, rtol=1e-5, atol=1e-5 * abs(logits).max())
    assert "product_1" in kernels(session, 1)
    assert "product_1,active" in kernels(session, None)


@pytest.mark.parametrize(("precision", "approximate"), [("int8", "none"), ("fp32", "tanh")])
def test_other_gelus_stay(precision: str, approximate: str, tmp_path: Path) -> None:
    session = OpenVINOSession(write_model(tmp_path / "model.onnx", approximate), 1, precision)
    assert not any("Erf" in names for names in kernels(session, 1))


def test_gelu_in_bfloat16_stays_where_the_cpu_has_it(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.onnx")
    if "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        assert not OpenVINOSession(path, 1, "bf16")._splits
    else:
        with pytest.warns(UserWarning, match="float32"):
            session = OpenVINOSession(path, 1, "bf16")
        assert any("Erf" in names for names in kernels(session, 1))
