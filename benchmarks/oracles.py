"""timm without a complete torchvision, as in `tests/conftest.py`: PyTorch's CPU build lacks two operators."""

import torch

_library = torch.library.Library("torchvision", "DEF")
for _signature in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
):
    try:
        _library.define(_signature)
    except RuntimeError:  # a full torchvision has defined it
        break
