"""THE table of checkpoint formats: each converts the file's tensor names to timm's, which are ours.

A format is a table of rules, pattern -> new name; some also merge tensors. Unknown names are kept for strict loading
(`load.py`) to report. `detect` chooses the format whose rules match the most names.
"""

from collections.abc import Iterable

from vitrail.errors import WeightsError
from vitrail.utils.text import join_names
from vitrail.weights.formats import google, timm, torchvision, transformers
from vitrail.weights.formats.keymap import Format
from vitrail.weights.tensors import Tensors

FORMATS = (
    timm.VIT,
    timm.SWIN,
    timm.RESNET,
    timm.CONVNEXT,
    timm.AUTHORS_VIT,
    timm.AUTHORS_SWIN,
    timm.AUTHORS_CONVNEXT,
    torchvision.VIT,
    torchvision.SWIN,
    torchvision.CONVNEXT,
    transformers.VIT,
    transformers.DINOV2,
    transformers.SWIN,
    google.VIT,
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

    Unknown names without the wrapper prefix of the other names, such as Lightning's losses and metrics, are unused.
    """
    layout = detect(tensors)
    out = layout.convert(tensors)
    for name in [name for name in out if name in out.outside]:
        out.unused[out.file_name(name)] = "it is outside the model in the checkpoint"
        del out[name]
    return out, layout
