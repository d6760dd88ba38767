"""Checkpoint formats: one pure function each, from the file's tensor names to timm's, which are ours.

A format is a table of rules, pattern -> new name, and a function that applies them; some also merge tensors. Unknown
names are kept for strict loading (`load.py`) to report. `detect` chooses the format whose rules match the most names.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vitrail.errors import WeightsError
from vitrail.utils.text import join_names
from vitrail.weights.formats import google as google
from vitrail.weights.formats import timm as timm
from vitrail.weights.formats import torchvision as torchvision
from vitrail.weights.formats import transformers as transformers
from vitrail.weights.formats.keymap import Rules
from vitrail.weights.tensors import Tensors


@dataclass(frozen=True)
class Format:
    """A checkpoint format: its name, its rules, and the function that converts it."""

    name: str
    rules: Rules
    convert: Callable[[Tensors], Tensors]

    def count_known(self, names: list[str]) -> int:
        """How many of the names its rules match."""
        pattern = re.compile("|".join(f"(?:{pattern})" for pattern in self.rules))
        return sum(pattern.fullmatch(name) is not None for name in names)


FORMATS = (
    Format("timm ViT", timm.TIMM_VIT, timm.timm_vit),
    Format("timm Swin", timm.TIMM_SWIN, timm.timm_swin),
    Format("ResNet", timm.TIMM_RESNET, timm.timm_resnet),
    Format("timm ConvNeXt", timm.TIMM_CONVNEXT, timm.timm_convnext),
    Format("authors' ViT", timm.AUTHORS_VIT, timm.authors_vit),
    Format("authors' Swin", timm.AUTHORS_SWIN, timm.authors_swin),
    Format("authors' ConvNeXt", timm.AUTHORS_CONVNEXT, timm.authors_convnext),
    Format("torchvision ViT", torchvision.TORCHVISION_VIT, torchvision.torchvision_vit),
    Format("torchvision Swin", torchvision.TORCHVISION_SWIN, torchvision.torchvision_swin),
    Format("torchvision ConvNeXt", torchvision.TORCHVISION_CONVNEXT, torchvision.torchvision_convnext),
    Format("transformers ViT", transformers.TRANSFORMERS_VIT, transformers.transformers_vit),
    Format("transformers DINOv2", transformers.TRANSFORMERS_DINOV2, transformers.transformers_dinov2),
    Format("transformers Swin", transformers.TRANSFORMERS_SWIN, transformers.transformers_swin),
    Format("Google ViT", google.GOOGLE_VIT, google.google_vit),
)


def detect(names: Iterable[str]) -> Format:
    """The format that matches the most names; the first in `FORMATS` on a tie.

    Raises:
        WeightsError: none matches half of them.
    """
    names = list(names)
    known = [layout.count_known(names) for layout in FORMATS]
    best = max(known)
    if not names or 2 * best < len(names):
        raise WeightsError(
            f"unknown checkpoint format (tensor names: {join_names(names, 4) or 'none'}): "
            f"supported formats: {', '.join(layout.name for layout in FORMATS)}"
        )
    return FORMATS[known.index(best)]


def convert_names(tensors: Tensors) -> tuple[Tensors, Format]:
    """The tensors under our names, and their format.

    Unknown names outside the others' wrapper prefix, such as Lightning's losses and metrics, are unused.
    """
    layout = detect(tensors)
    out = layout.convert(tensors)
    for name in [name for name in out if name in out.outside]:
        out.unused[out.file_name(name)] = "it is outside the model in the checkpoint"
        del out[name]
    return out, layout
