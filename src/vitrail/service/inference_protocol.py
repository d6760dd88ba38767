"""The Open Inference Protocol, version 2 (https://github.com/kserve/open-inference-protocol), which KServe and Triton
speak, with its binary tensor extension.

Inputs, one of them in a request:
  files    BYTES [-1]          encoded images, as `POST /predict` takes them; base64 in JSON
  images   FP32 [-1, C, H, W]  pixels from 0 to 1 of resized and cropped images, not normalised (the model does that)
  pixels   UINT8 [-1, H, W, C] the same from 0 to 255
Outputs: logits and probabilities FP32 [-1, K], labels BYTES [-1].
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from vitrail.images.convert import Pixels
from vitrail.inference.probabilities import softmax
from vitrail.service.bodies import Refused
from vitrail.service.schemas import (
    InferRequest,
    InferResponse,
    InputTensor,
    ModelMetadata,
    OutputTensor,
    RequestedOutput,
    TensorMetadata,
)
from vitrail.utils.text import format_shape, one_line, printable

Array = npt.NDArray[Any]

HEADER_LENGTH = "inference-header-content-length"
VERSION = "1"
OUTPUTS = ("logits", "probabilities", "labels")
_DTYPES: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "UINT8": np.dtype("u1")}
_MAX_DEPTH = 6  # of nested lists


def metadata(name: str, size: tuple[int, int], channels: int, classes: int) -> ModelMetadata:
    """What the model takes and gives."""

    def tensor(name: str, datatype: str, *shape: int) -> TensorMetadata:
        return TensorMetadata(name=name, datatype=datatype, shape=[-1, *shape])

    return ModelMetadata(
        name=name,
        versions=[VERSION],
        platform="vitrail",
        inputs=[
            tensor("files", "BYTES"),
            tensor("images", "FP32", channels, *size),
            tensor("pixels", "UINT8", *size, channels),
        ],
        outputs=[
            tensor("logits", "FP32", classes),
            tensor("probabilities", "FP32", classes),
            tensor("labels", "BYTES"),
        ],
    )


class Inference:
    """A parsed request: `files`, encoded images, or `pixels`, images H W C of the model's size.

    Raises:
        Refused: it does not follow the protocol or the metadata.
    """

    def __init__(self, body: bytes, headers: Mapping[str, str], model: ModelMetadata, most: int) -> None:
        self._model = model
        self.request, binary = _split(body, headers)
        for output in self.request.outputs:
            if output.name not in OUTPUTS:
                raise Refused(400, f"there is no output {printable(output.name)!r}: use {', '.join(OUTPUTS)}")
        tensor = self.request.inputs[0]
        known = {each.name: each for each in model.inputs}
        if tensor.name not in known:
            raise Refused(400, f"there is no input {printable(tensor.name)!r}: use {', '.join(known)}")
        wanted = known[tensor.name]
        if tensor.datatype != wanted.datatype:
            raise Refused(400, f"the input {tensor.name} is {wanted.datatype}, not {printable(tensor.datatype)}")
        shape = tensor.shape
        if len(shape) != len(wanted.shape) or shape[1:] != wanted.shape[1:] or not 1 <= shape[0] <= most:
            found = format_shape(shape)
            raise Refused(
                400, f"the input {tensor.name} has the shape {found}: use {wanted.shape} with 1 to {most} images"
            )
        self.files: list[bytes] = []
        self.pixels: list[Pixels] = []
        if tensor.name == "files":
            self.files = _read_bytes(tensor, binary)
        else:
            self.pixels = list(_to_pixels(_read_numbers(tensor, binary)))

    def respond(self, logits: npt.NDArray[np.float32], labels: list[str]) -> tuple[bytes, dict[str, str]]:
        """Body and headers of the response. logits: B K; labels: of the K classes."""
        values: dict[str, Any] = {
            "logits": logits,
            "probabilities": softmax(logits).astype(np.float32),
            "labels": [labels[index] for index in logits.argmax(axis=1)],
        }
        asked = self.request.outputs or [RequestedOutput(name=name) for name in OUTPUTS]
        every = bool(self.request.parameters.get("binary_data_output"))
        tensors, parts = [], []
        for output in asked:
            value = values[output.name]
            strings = output.name == "labels"
            tensor = OutputTensor(
                name=output.name,
                datatype="BYTES" if strings else "FP32",
                shape=[len(value)] if strings else list(value.shape),
            )
            if output.parameters.get("binary_data", every):
                raw = _write_bytes(value) if strings else np.ascontiguousarray(value, "<f4").tobytes()
                tensor.parameters = {"binary_data_size": len(raw)}
                parts.append(raw)
            else:
                tensor.data = value if strings else value.ravel().tolist()
            tensors.append(tensor)
        response = InferResponse(
            model_name=self._model.name, model_version=VERSION, id=self.request.id, outputs=tensors
        )
        text = response.model_dump_json(exclude_none=True).encode()
        if not parts:
            return text, {"content-type": "application/json"}
        return text + b"".join(parts), {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(text))}


def _split(body: bytes, headers: Mapping[str, str]) -> tuple[InferRequest, bytes]:
    """The JSON of a body, and the binary tensors that follow it."""
    length = headers.get(HEADER_LENGTH)
    size = len(body)
    if length is not None:
        if not (length.isascii() and length.isdigit()) or len(length) > 12 or int(length) > len(body):
            raise Refused(400, f"{HEADER_LENGTH} must be the length of the JSON, at most that of the body")
        size = int(length)
    try:
        return InferRequest.model_validate_json(body[:size]), body[size:]
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Refused(400, one_line(f"{where}: {first['msg']}" if where else first["msg"])) from None


def _binary(tensor: InputTensor, binary: bytes) -> bytes | None:
    """The tensor's binary data; None if its values are in the JSON.

    Raises:
        Refused: the size does not match the body, or there are both.
    """
    size = tensor.parameters.get("binary_data_size")
    if size is None:
        if tensor.data is None:
            raise Refused(400, f"the input {tensor.name} has no data")
        return None
    if tensor.data is not None or not isinstance(size, int) or size != len(binary):
        raise Refused(400, f"the input {tensor.name} must have binary data of {len(binary)} bytes, and no other")
    return binary


def _read_numbers(tensor: InputTensor, binary: bytes) -> Array:
    dtype, count = _DTYPES[tensor.datatype], int(np.prod(tensor.shape))
    raw = _binary(tensor, binary)
    if raw is None:
        values = _flat(tensor.data or [])
        if len(values) != count or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in values):
            raise Refused(400, f"the input {tensor.name} needs {count} numbers")
        array = np.array(values, np.float64)
        if tensor.datatype == "UINT8" and not ((array >= 0) & (array <= 255) & (array == np.rint(array))).all():
            raise Refused(400, f"the input {tensor.name} needs whole numbers from 0 to 255")
        return array.astype(dtype).reshape(tensor.shape)
    if len(raw) != count * dtype.itemsize:
        raise Refused(400, f"the input {tensor.name} needs {count * dtype.itemsize} bytes, not {len(raw)}")
    return np.frombuffer(raw, dtype).reshape(tensor.shape)


def _flat(values: list[Any]) -> list[Any]:
    """Nested lists as one; the protocol allows both."""
    for _ in range(_MAX_DEPTH):
        if not any(isinstance(value, list) for value in values):
            break
        values = [each for value in values for each in (value if isinstance(value, list) else [value])]
    return values


def _to_pixels(values: Array) -> npt.NDArray[np.uint8]:
    """uint8 B H W C of FP32 B C H W in 0..1, or of what is uint8 already."""
    if values.dtype == np.uint8:
        return values
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise Refused(400, "the input images has values outside of 0 to 1: send pixels / 255, not normalised")
    return np.ascontiguousarray(np.rint(values * 255).astype(np.uint8).transpose(0, 2, 3, 1))


def _read_bytes(tensor: InputTensor, binary: bytes) -> list[bytes]:
    """Byte strings: each with its length before it (4 bytes, little endian), or base64 in JSON."""
    count, raw = tensor.shape[0], _binary(tensor, binary)
    found: list[bytes] = []
    if raw is None:
        for value in _flat(tensor.data or []):
            try:
                found.append(base64.b64decode(value, validate=True))
            except (TypeError, ValueError, binascii.Error):
                raise Refused(400, f"the input {tensor.name} needs base64 strings") from None
    else:
        place = 0
        while place + 4 <= len(raw):
            (length,) = struct.unpack_from("<I", raw, place)
            found.append(raw[place + 4 : place + 4 + length])
            place += 4 + length
        if place != len(raw):
            raise Refused(400, f"the binary data of {tensor.name} ends in the middle of a string")
    if len(found) != count:
        raise Refused(400, f"the input {tensor.name} has {len(found)} strings, not {count}")
    return found


def _write_bytes(texts: list[str]) -> bytes:
    return b"".join(struct.pack("<I", len(raw)) + raw for raw in (text.encode() for text in texts))
