"""Models in ONNX files, run by onnxruntime without torch: those of exports (`OnnxSession`), and any (`OnnxModel`).

An OnnxModel takes normalised float images B C H W. Its first output is the logits B K; an output named "features", if
there is one, is the input of the classification head, B F. Its metadata may contain `class_names` (a JSON list) and
`preprocess` (JSON, as in a model folder).

Shapes: B batch, C channels, H W height and width, K classes, F features.
"""

import hashlib
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from vitrail.errors import ConfigError, DeviceError, ExportError, ModelError, how_to_install
from vitrail.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from vitrail.inference.runtime import Images, Outputs, default_batch_size
from vitrail.utils.text import format_shape, one_line

T = TypeVar("T")
Shape = tuple[int | None, ...]

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_FEATURES = "features"  # the name of the output
_TWO_SESSIONS = 400 << 20  # bytes of a model at most, of which there may be two sessions: each has its weights
_ERRORS = 3  # the lowest severity of messages that onnxruntime prints
# Threads wait for the next operation of a call without sleeping, because waking takes as long as a short operation; but
# not for the next call, as they would by default: that takes the cores from the decoder and from other processes.
# onnxruntime before 1.26 does not know the first option, and waits for some milliseconds within a call.
_WAITING = {"intra_op.spin_duration_us": "500", "force_spinning_stop": "1"}


def _import(path: Path) -> Any:
    """The package onnxruntime, which `path` needs."""
    try:
        import onnxruntime
    except ImportError:
        raise DeviceError(f"{path} needs onnxruntime: {how_to_install('onnx')}") from None
    return onnxruntime


def _options(onnxruntime: Any, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    for name, value in _WAITING.items():
        options.add_session_config_entry(f"session.{name}", value)
    return options


def _shape(node: Any) -> Shape:
    """The shape of an input or output, None for a side of any length."""
    return tuple(side if isinstance(side, int) else None for side in node.shape)


class OnnxModel:
    """An ONNX file, on CUDA if onnxruntime supports it, else on the CPU.

    threads: 0 for onnxruntime's default. preprocess: from the metadata, else ImageNet's mean and std at the size of the
    input, which is then stated in `notes`; None if the input has no fixed size. class_names: None if unknown.

    Raises:
        DeviceError: onnxruntime is not installed.
        ModelError: the file does not exist, is not an ONNX model of images, or has invalid metadata.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        onnxruntime = _import(path)
        if not path.is_file():
            raise ModelError(f"{path} does not exist: check the path")
        self.path = path
        known = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [name for name in known if name in onnxruntime.get_available_providers()]
        self.device_type = "cuda" if providers[0] == known[0] else "cpu"
        options = _options(onnxruntime, threads)
        try:
            self.session: Any = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime's errors have no common base class of their own
            raise ModelError(f"{path} is not an ONNX model: {one_line(error)}") from None
        inputs = self.session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in _TYPES:
            found = ", ".join(f"{each.name} {each.type} {each.shape}" for each in inputs)
            raise ModelError(f"{path} takes {found}, not one batch of float images (B, C, H, W)")
        self._input = inputs[0].name
        self._dtype = _TYPES[inputs[0].type]
        self.shape = _shape(inputs[0])  # B C H W
        self.outputs: list[str] = [each.name for each in self.session.get_outputs()]
        self.bytes = path.stat().st_size
        self.identity = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        self.notes: tuple[str, ...] = ()
        self.class_names = self._metadata("class_names", _class_names)
        self.preprocess = self._metadata("preprocess", Preprocess.from_dict) or self._default_preprocess()

    def _metadata(self, key: str, convert: Callable[[Any], T]) -> T | None:
        text = self.session.get_modelmeta().custom_metadata_map.get(key)
        if text is None:
            return None
        try:
            return convert(json.loads(text))
        except (ValueError, TypeError, AttributeError, ConfigError) as error:
            raise ModelError(f"{self.path}: its metadata has invalid {key}: {one_line(error)}") from None

    def _default_preprocess(self) -> Preprocess | None:
        _, channels, height, width = self.shape
        if channels is None or height is None or width is None:
            return None
        self.notes = ("it has no preprocessing: ImageNet's mean and std are assumed",)
        imagenet = Preprocess(size=(height, width), mean=IMAGENET_MEAN, std=IMAGENET_STD)
        return imagenet.with_channels(channels)

    def run(self, images: npt.NDArray[np.floating], output: str | None = None) -> Outputs:
        """The output of this name, the first by default, for normalised images B C H W.

        Raises:
            ModelError: the model does not take images of this size.
        """
        size = self.shape[0] or len(images)  # a file may take one batch size only: the last batch is filled up
        parts = []
        for start in range(0, len(images), size):
            part = images[start : start + size].astype(self._dtype, copy=False)
            count = len(part)
            padded = np.concatenate([part, np.zeros((size - count, *part.shape[1:]), part.dtype)])
            try:
                (found,) = self.session.run([output or self.outputs[0]], {self._input: padded})
            except Exception as error:  # as above
                shape = format_shape(part.shape[1:])
                raise ModelError(f"{self.path} cannot take images of {shape}: {one_line(error)}") from None
            parts.append(found[:count])
        return np.concatenate(parts).astype(np.float32, copy=False)


def _class_names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("not a list of strings")
    return tuple(value)


class OnnxRuntime:
    """An ONNX file as a Runtime. preprocess: instead of the file's.

    Raises:
        DeviceError, ModelError: as OnnxModel; or no preprocessing is known, or the file does not take such images.
    """

    def __init__(self, path: Path, preprocess: Preprocess | None = None, threads: int = 0) -> None:
        self.model = OnnxModel(path, threads)
        self.name = path.name
        found = preprocess or self.model.preprocess
        if found is None:
            raise ModelError(f"{path} has no preprocessing in its metadata and takes any size: pass preprocess=")
        self.preprocess = found
        self.default_batch_size = self.model.shape[0] or default_batch_size(found, self.model.device_type)
        blank = np.zeros((1, *found.size, found.channels), np.uint8)
        logits = self.logits(blank)
        features = self.features(blank) if _FEATURES in self.model.outputs else None
        for output in (logits, features):
            if output is not None and output.ndim != 2:
                raise ModelError(f"{path} has an output of shape {output.shape}, not (B, K) logits or (B, F) features")
        self.num_classes = logits.shape[1]
        self.num_features = 0 if features is None else features.shape[1]

    def logits(self, images: Images) -> Outputs:
        return self.model.run(self._normalize(images))

    def features(self, images: Images) -> Outputs:
        if _FEATURES not in self.model.outputs:
            raise ModelError(f"{self.model.path} has no output named {_FEATURES!r}: export the model with its features")
        return self.model.run(self._normalize(images), _FEATURES)

    def fingerprint(self) -> str:
        settings = json.dumps(self.preprocess.to_dict(), sort_keys=True)
        return hashlib.blake2b(f"{self.model.identity} {settings}".encode(), digest_size=16).hexdigest()

    def _normalize(self, images: Images) -> npt.NDArray[np.float32]:
        """uint8 B H W C to normalised float32 B C H W, the same bits as Preprocess.normalize."""
        mean, std = np.array(self.preprocess.mean), np.array(self.preprocess.std)
        scale, shift = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
        return np.ascontiguousarray((images * scale + shift).transpose(0, 3, 1, 2))


class OnnxSession:
    """The model of an export, on the CPU: uint8 images B H W C, and outputs by name.

    Where at least as many threads call at once as there are cores, each call is computed by one core, in a second
    session that is opened for the first of them, with the same results: cores that compute one image together wait for
    each other at the end of every operation. Models of more than 400 MB, and those whose files have changed meanwhile,
    have one session. precision: as in the file; onnxruntime chooses none. at_once: how many calls are best computed at
    once.

    Raises:
        DeviceError: onnxruntime is not installed.
        ExportError: the file is not an ONNX model.
    """

    def __init__(self, path: Path, threads: int, precision: str) -> None:
        self._path = path
        self._together = self._open(threads)
        self._single: Any = None
        self._files = _files(path)
        self.at_once = threads if sum(size for *_, size in self._files) <= _TWO_SESSIONS else 1
        self._opens_single = self.at_once > 1
        self._opening = threading.Lock()
        self._running: list[None] = []  # an element for each call; a list, since its methods are atomic
        (node,) = self._together.get_inputs()
        self._input = node.name
        self.input_shape = _shape(node)
        self.output_shapes: dict[str, Shape] = {each.name: _shape(each) for each in self._together.get_outputs()}

    def run(self, images: Images, output: str) -> Outputs:
        """The output of this name, for images B H W C. May be called from several threads."""
        self._running.append(None)
        try:
            session = self._session_of_one() if len(self._running) >= self.at_once else self._together
            (found,) = session.run([output], {self._input: images})
        finally:
            self._running.pop()
        return np.asarray(found, np.float32)

    def _session_of_one(self) -> Any:
        """The session that computes with one thread; the other one, where that cannot be."""
        with self._opening:
            if self._opens_single:
                self._opens_single = False
                with suppress(ExportError, OSError):  # no memory for a second one; no file any more
                    single = self._open(1)
                    self._single = single if _files(self._path) == self._files else None
        return self._single or self._together

    def _open(self, threads: int) -> Any:
        onnxruntime = _import(self._path)
        options = _options(onnxruntime, threads)
        options.log_severity_level = _ERRORS
        try:
            return onnxruntime.InferenceSession(str(self._path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common base class of their own
            reason = one_line(error)
            raise ExportError(f"{self._path} is not a model for this version of onnxruntime: {reason}") from None


def _files(path: Path) -> list[tuple[int, int, int]]:
    """Of an ONNX file and of the weights beside it: number on the disk, time of the last change, and bytes."""
    found = [each.stat() for each in (path, path.with_name("weights.bin")) if each.exists()]
    return [(each.st_ino, each.st_mtime_ns, each.st_size) for each in found]
