"""timm where torchvision is incomplete: its build for CUDA beside PyTorch's CPU build lacks two operators.

Import this before timm. It only declares the operators, since timm's import looks their names up.
"""

from importlib.util import find_spec
from pathlib import Path

import torch


def declare_missing_operators() -> None:
    found = find_spec("torchvision")
    if found is None or found.origin is None:
        return
    try:
        torch.ops.load_library(Path(found.origin).with_name("_C.so"))  # as torchvision does; it declares its own
    except OSError:
        for signature in (
            "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        ):
            _library.define(signature)


_library = torch.library.Library("torchvision", "FRAGMENT")
declare_missing_operators()
