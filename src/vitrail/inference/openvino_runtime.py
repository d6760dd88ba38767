"""OpenVINO models (model.xml and model.bin) of an export, on the CPU without torch.

Shapes: B batch, H W height and width, C channels, K classes, F features.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.errors import DeviceError, ExportError, how_to_install
from vitrail.inference.runtime import Images, Outputs
from vitrail.utils.memory import mapped_spans, releasing_pages
from vitrail.utils.text import one_line

_LOCK = threading.Lock()


def openvino_core() -> Any:
    """The only Core of the process, with its CPU plugin loaded.

    The plugin of a Core gives the thread that loads it a stack for signals, and sets back the one before when it is
    freed. With several Cores that one may be freed already: the next signal, such as Ctrl-C, is then handled in freed
    memory, and ends the process with a segmentation fault (OpenVINO 2026.4). A first Core that is never freed prevents
    it, also for those that NNCF makes.
    """
    with _LOCK:
        return _core()


@cache
def _core() -> Any:
    import openvino

    core = openvino.Core()
    core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")  # loads the plugin
    return core


class OpenVINOSession:
    """A model of uint8 images B H W C with named outputs.

    precision: "bf16" computes in bfloat16 where the CPU has instructions for it, else, with a warning, in float32.
    "fp32" and "int8" compute what is not quantised in float32, so that an export gives the same on every CPU: left to
    itself, OpenVINO takes bfloat16 on a CPU that has it.

    The model is compiled for any batch size, and models that gain by it for single images too. In int8, and where
    tokens are put in another order (Swin's windows, 6 to 10 %; merged tokens), both are compiled when they are first
    needed. In float32 with GELU, which is then apart from the product before it, the second single image is the first
    that needs the other model: a process that asks about one image starts sooner. For others the gain is at most 2 %,
    less than the copy of the weights in memory is worth.

    Raises:
        DeviceError: openvino is not installed.
        ExportError: the file is not an OpenVINO model; also from `run`.
    """

    def __init__(self, path: Path, threads: int, precision: str) -> None:
        try:
            import openvino  # noqa: F401
        except ImportError:
            raise DeviceError(f"{path} needs OpenVINO: {how_to_install('openvino')}") from None
        self._path = path
        core = openvino_core()
        bf16 = precision == "bf16"
        if bf16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            warnings.warn(f"{path}: this CPU has no bfloat16: computed in float32, at its speed", stacklevel=2)
            bf16 = False
        self._settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
            "INFERENCE_NUM_THREADS": threads,
        }
        weights = path.with_suffix(".bin")
        try:
            with _LOCK:  # no other session maps this file meanwhile: what is new is held by this graph
                others = mapped_spans(weights)
                self._graph: Any = core.read_model(str(path))
                self._weights = mapped_spans(weights) - others
        except RuntimeError as error:
            raise self._unsuitable(error) from None
        self.input_shape = _sizes(self._graph.inputs[0])
        self.output_shapes = {port.any_name: _sizes(port) for port in self._graph.outputs}
        operations = self._graph.get_ops()
        self._splits = precision != "int8" and not bf16 and any(map(_is_gelu, operations))
        self._singly = precision == "int8" or any(map(_reorders, operations))
        self._programs: dict[int | None, _Program] = {}
        self._lock = threading.Lock()
        if not self._singly:
            self._program(None)  # here, because the caller checks the files meanwhile

    def run(self, images: Images, output: str) -> Outputs:
        """The output of this name, for images B H W C. May be called from several threads."""
        program = self._program(1 if self._singly and len(images) == 1 else None)
        self._singly |= self._splits and len(images) == 1  # from the second on
        return program.run(images, output)

    def _program(self, batch: int | None) -> _Program:
        """The model for this batch size, or for any, compiled when it is first needed."""
        with self._lock:
            if batch not in self._programs:
                graph = self._graph
                try:
                    if batch is not None:
                        graph = graph.clone()
                        graph.reshape([batch, *self.input_shape[1:]])
                        if self._splits:
                            _split_gelu(graph)
                    with releasing_pages(self._weights):  # most of them are copied in another order
                        self._programs[batch] = _Program(openvino_core().compile_model(graph, "CPU", self._settings))
                except RuntimeError as error:
                    raise self._unsuitable(error) from None
            return self._programs[batch]

    def _unsuitable(self, error: RuntimeError) -> ExportError:
        return ExportError(f"{self._path} is not a model for this version of OpenVINO: {one_line(error)}")


class _Program:
    """A compiled model, with infer requests that are each used by one thread at a time."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._idle = deque[Any]()

    def run(self, images: Images, output: str) -> Outputs:
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._model.create_infer_request()
        try:
            request.infer([images], share_inputs=True)
            return np.array(request.get_tensor(output).data, np.float32)
        finally:
            self._idle.append(request)


def _is_gelu(operation: Any) -> bool:
    attributes: dict[str, Any] = operation.get_attributes()
    kind: str = operation.get_type_name()
    return kind == "Gelu" and attributes.get("approximation_mode", "ERF") == "ERF"


def _split_gelu(graph: Any) -> None:
    """Write each GELU, x / 2 (1 + erf(x / sqrt(2))), as h + h erf(x / sqrt(2)) with h = x / 2.

    OpenVINO computes a GELU in one kernel with the product before it, by which that product in float32 is slower than
    one alone: those run in a kernel of MLAS, which has no activation. It does not recognise this form, and computes
    GELU in a kernel of its own: a ViT-S takes about 0.95 times as long with AVX2 (not measured with AVX512), if the
    batch size is fixed. For any batch size it takes a kernel for each of the five operations, and nothing is gained.
    """
    from openvino import opset13 as ops

    for gelu in filter(_is_gelu, graph.get_ordered_ops()):
        x = gelu.input_value(0)
        half = ops.multiply(x, np.float32(0.5))
        erf = ops.erf(ops.multiply(x, np.float32(2**-0.5)))
        gelu.output(0).replace(ops.add(half, ops.multiply(half, erf)).output(0))


def _reorders(operation: Any) -> bool:
    """Whether it selects tokens, by their index or their score."""
    kind: str = operation.get_type_name()
    if kind != "Gather":
        return kind == "TopK"
    rank = operation.input(1).get_partial_shape().rank
    return bool(rank.is_static and rank.get_length() > 0)


def _sizes(port: Any) -> tuple[int | None, ...]:
    return tuple(size.get_length() if size.is_static else None for size in port.partial_shape)
