"""What a checkpoint format consists of: rules that rename tensors, and conversions of several tensors."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vitrail.errors import WeightsError
from vitrail.utils.text import format_shape, printable
from vitrail.weights.tensors import Tensors

Rules = dict[str, str | None]  # pattern of the full name -> our name; None: known and unused

PARAM = r"\.(weight|bias)"
BUFFERS = r"\.(weight|bias|running_mean|running_var|num_batches_tracked)"
WHY_BUFFER = "a constant that the model computes"


@dataclass(frozen=True)
class Format:
    """A checkpoint format.

    rules: the first one that matches a name applies. why_unused: for rules without a new name. conversions: applied
    after the rules, in order.
    """

    name: str
    rules: Rules
    why_unused: str = ""
    conversions: tuple[Callable[[Tensors], Tensors], ...] = ()

    def count_known(self, names: list[str]) -> int:
        """How many of the names its rules match."""
        pattern = re.compile("|".join(f"(?:{pattern})" for pattern in self.rules))
        return sum(pattern.fullmatch(name) is not None for name in names)

    def convert(self, tensors: Tensors) -> Tensors:
        """The tensors under our names. Raises WeightsError if two get the same name."""
        compiled = [(re.compile(pattern), new) for pattern, new in self.rules.items()]
        out = tensors.empty_copy()
        for name, tensor in tensors.items():
            match, new = next(((m, new) for p, new in compiled if (m := p.fullmatch(name))), (None, name))
            if new is None:
                out.unused[tensors.file_name(name)] = self.why_unused
                continue
            put(out, match.expand(new) if match else name, tensor, tensors.file_name(name))
            if match is None and name in tensors.outside:
                out.outside.add(name)
        for conversion in self.conversions:
            out = conversion(out)
        return out


def put(out: Tensors, name: str, tensor: Tensor, origin: str) -> None:
    """Add a tensor under its new name. Raises WeightsError if the name is taken."""
    if name in out:
        raise WeightsError(
            f"the file contains {name} twice, as {printable(out.file_name(name))} and {printable(origin)}: remove one"
        )
    out[name] = tensor
    if origin != name:
        out.origin[name] = origin


def join_qkv(tensors: Tensors) -> Tensors:
    """Concatenate x.q, x.k and x.v to x.qkv, weights and biases. Incomplete groups are kept."""
    out = tensors.empty_copy()
    groups: dict[str, dict[str, str]] = {}
    for name in tensors:
        if match := re.fullmatch(r"(.+)\.([qkv])\.(weight|bias)", name):
            groups.setdefault(f"{match[1]}.qkv.{match[3]}", {})[match[2]] = name
    complete = {new: [parts[letter] for letter in "qkv"] for new, parts in groups.items() if len(parts) == 3}
    joined = {name for parts in complete.values() for name in parts}
    for name, tensor in tensors.items():
        if name not in joined:
            put(out, name, tensor, tensors.file_name(name))
    for new, parts in complete.items():
        if len({tensors[name].shape for name in parts}) > 1 or not tensors[parts[0]].ndim:
            shapes = (f"{printable(tensors.file_name(name))} is {format_shape(tensors[name].shape)}" for name in parts)
            raise WeightsError(f"cannot join tensors of different shapes: {'; '.join(shapes)}")
        origin = " + ".join(tensors.file_name(name) for name in parts)
        put(out, new, torch.cat([tensors[name] for name in parts]), origin)
    out.outside = tensors.outside
    return out


def drop_head(tensors: Tensors, why: str) -> None:
    """Move the classifier's tensors to the unused ones."""
    for name in ("head.weight", "head.bias"):
        if tensors.pop(name, None) is not None:
            tensors.unused[tensors.file_name(name)] = why


def without_pre_logits(tensors: Tensors) -> Tensors:
    """Remove pre_logits, a layer between features and head that timm's ViT lacks, and the head trained on it."""
    layer = [name for name in tensors if name.startswith("pre_logits.")]
    if layer:
        drop_head(tensors, "its input is a 'pre_logits' layer, which this model does not have")
    for name in layer:
        del tensors[name]
        tensors.unused[tensors.file_name(name)] = "this model has no pre_logits layer"
    return tensors


def shift_merging(tensors: Tensors) -> Tensors:
    """Swin: move patch merging from the end of a stage to the beginning of the next one, as in timm."""
    out = tensors.empty_copy()
    out.outside = tensors.outside
    for name, tensor in tensors.items():
        match = re.fullmatch(r"layers\.(\d+)(\.downsample\..+)", name)
        new = f"layers.{int(match[1]) + 1}{match[2]}" if match else name
        put(out, new, tensor, tensors.file_name(name))
    return out
