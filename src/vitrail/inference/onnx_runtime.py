"""Models in ONNX files as teachers, run by onnxruntime.

A file may say in its metadata what it knows: `class_names` (a JSON list) and `preprocess` (JSON, as in a model folder).

Shapes: B batch, C channels, H W height and width, K classes.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitrail.errors import VitrailError
from vitrail.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from vitrail.utils.text import one_line

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxModel(nn.Module):
    """Float images B C H W to the file's first output, on any device; the file runs where onnxruntime can.

    Raises:
        VitrailError: onnxruntime is missing, or the file is, or it holds no model of images.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError:
            raise VitrailError(f"{path} needs onnxruntime: pip install 'vitrail[onnx]'") from None
        if not path.is_file():
            raise VitrailError(f"there is no {path}: check the path")
        self.path = path
        usual = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [name for name in usual if name in onnxruntime.get_available_providers()]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session: Any = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime has many, all of one base
            raise VitrailError(f"{path} is no ONNX model: {one_line(error)}") from None
        self.input = self._one_input()
        self.dtype = _TYPES[self.input.type]
        self.fixed = [side if isinstance(side, int) else None for side in self.input.shape]  # B C H W
        self.bytes = path.stat().st_size
        self.identity = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        self.notes: tuple[str, ...] = ()
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.class_names = self._class_names(metadata.get("class_names"))
        self.preprocess = self._preprocess(metadata.get("preprocess"))

    def _one_input(self) -> Any:
        inputs = self.session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in _TYPES:
            found = ", ".join(f"{each.name} {each.type} {each.shape}" for each in inputs)
            raise VitrailError(f"{self.path} takes {found}, not one batch of float images (B, C, H, W)")
        return inputs[0]

    def _class_names(self, text: str | None) -> tuple[str, ...] | None:
        if text is None:
            return None
        try:
            names = json.loads(text)
        except ValueError:
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise VitrailError(f"{self.path} has class_names in its metadata that are no JSON list of words")
        return tuple(names)

    def _preprocess(self, text: str | None) -> Preprocess | None:
        """From the metadata; else ImageNet's at the size that the input has; None where it takes any size."""
        if text is not None:
            try:
                return Preprocess.from_dict(json.loads(text))
            except (ValueError, TypeError, AttributeError, VitrailError) as error:
                raise VitrailError(f"{self.path} has preprocessing of nonsense in its metadata: {error}") from None
        _, channels, height, width = self.fixed
        if channels is None or height is None or width is None:
            self.notes = ("it says nothing of its preprocessing: it is shown what the student sees",)
            return None
        self.notes = ("it says nothing of its preprocessing: ImageNet's mean and deviation are assumed",)
        mean: tuple[float, ...] = IMAGENET_MEAN
        std: tuple[float, ...] = IMAGENET_STD
        if channels == 1:
            mean, std = (sum(mean) / 3,), (sum(std) / 3,)
        return Preprocess(size=(height, width), mean=mean, std=std, channels=channels)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.detach().float().cpu().numpy().astype(self.dtype, copy=False)
        size = self.fixed[0] or len(pixels)
        answers = [self._run(pixels[start : start + size], size) for start in range(0, len(pixels), size)]
        return torch.from_numpy(np.concatenate(answers).astype(np.float32, copy=False)).to(images.device)

    def _run(self, pixels: Any, size: int) -> Any:
        """A batch of the size that the file asks for: a smaller one is filled up."""
        count = len(pixels)
        if count < size:
            pixels = np.concatenate([pixels, np.zeros((size - count, *pixels.shape[1:]), pixels.dtype)])
        return self.session.run(None, {self.input.name: pixels})[0][:count]
