"""From what a training script saved to one flat state dict: containers opened, wrappers' prefixes taken off."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitrail.errors import WeightsError
from vitrail.utils.text import join_names
from vitrail.weights.tensors import Tensors

# In order of preference: an average over training before the last step, a teacher before its student.
_CONTAINERS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "teacher",
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "student",
    "net",
)
# Flat keys of two networks in one: DINOv2's and Lightning's habit.
_TWINS = (("teacher.", "student."), ("ema.", "model."), ("model_ema.", "model."))
_PREFIXES = (
    "_orig_mod.",
    "module.",
    "model.",
    "backbone.",
    "net.",
    "network.",
    "encoder_q.",
    "teacher.",
    "student.",
    "ema.",
)
_COUNTERS = {"n_averaged"}  # torch.optim.swa_utils keeps how many models it has averaged


def unwrap(content: Mapping[Any, Any]) -> Tensors:
    """The state dict within `content`, without the wrappers' prefixes; `notes` tell what was chosen and ignored.

    Raises:
        WeightsError: there is no state dict.
    """
    tensors, notes = _open(content, [])
    tensors.notes += notes
    for name in _COUNTERS & tensors.keys():
        del tensors[name]
        tensors.unused[name] = "a counter of the average"
    return _strip(_choose_twin(tensors))


def _open(content: Mapping[Any, Any], path: list[str]) -> tuple[Tensors, list[str]]:
    """Go into containers until tensors appear."""
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    inside = [key for key in _CONTAINERS if _holds_tensors(content.get(key))]
    if tensors and not (inside and len(tensors) < 3):
        notes = [f"the state dict is the checkpoint's {'.'.join(path)!r}"] if path else []
        return Tensors(tensors), notes
    if not inside or len(path) > 4:
        keys = join_names((str(key) for key in content), 6) or "it is empty"
        raise WeightsError(f"the checkpoint holds no state dict ({keys})")
    found, notes = _open(content[inside[0]], [*path, inside[0]])
    if len(inside) > 1:
        notes.append(f"the checkpoint's {' and '.join(repr(key) for key in inside[1:])} ignored")
    return found, notes


def _holds_tensors(value: object, depth: int = 0) -> bool:
    if not isinstance(value, Mapping) or depth > 4:
        return False
    return any(isinstance(x, Tensor) or _holds_tensors(x, depth + 1) for x in value.values())


def _choose_twin(tensors: Tensors) -> Tensors:
    for first, second in _TWINS:
        sizes = [sum(name.startswith(prefix) for name in tensors) for prefix in (first, second)]
        if min(sizes) > 2 and 2 * sum(sizes) > len(tensors):
            out = Tensors((name, tensor) for name, tensor in tensors.items() if not name.startswith(second))
            out.notes += [*tensors.notes, f"{sizes[1]} tensors of the checkpoint's {second[:-1]!r} ignored"]
            out.unused |= tensors.unused
            return out
    return tensors


def _strip(tensors: Tensors) -> Tensors:
    """Take off prefixes that most names have, one after another. Names without them are noted as outside."""
    while prefix := next(
        (p for p in _PREFIXES if 2 * sum(name.startswith(p) for name in tensors) > len(tensors)), None
    ):
        out = tensors.empty_copy()
        for name, tensor in tensors.items():
            bare = name.removeprefix(prefix)
            if bare in out:
                raise WeightsError(f"the checkpoint holds {bare} twice, with and without {prefix!r}: remove one")
            out[bare] = tensor
            if (called := tensors.file_name(name)) != bare:
                out.origin[bare] = called
            if bare == name or name in tensors.outside:
                out.outside.add(bare)
        tensors = out
    return tensors
