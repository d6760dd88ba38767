"""Extract the flat state dict from a checkpoint: open containers, strip wrapper prefixes."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitrail.errors import WeightsError
from vitrail.utils.text import join_names
from vitrail.weights.tensors import Tensors

# In order of preference: EMA weights before the last step's, a teacher before its student.
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
# Two models in one flat state dict, as DINOv2 and Lightning save them; the first is used.
_MODEL_PAIRS = (("teacher.", "student."), ("ema.", "model."), ("model_ema.", "model."))
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
_MAX_TENSORS = 10_000  # the largest model of the catalog has under 1,000
_MAX_NAME = 1_000  # characters
_MAX_PREFIXES = 8
_COUNTERS = {"n_averaged"}  # of torch.optim.swa_utils


def unwrap(content: Mapping[Any, Any]) -> Tensors:
    """The state dict in `content`, without wrapper prefixes; its `notes` name what was used and ignored.

    Raises:
        WeightsError: there is no state dict, or one of more than 10,000 tensors or with names of over 1,000 characters.
    """
    tensors = _open(content, [])
    if len(tensors) > _MAX_TENSORS:
        raise WeightsError(f"the checkpoint contains {len(tensors):,} tensors: more than {_MAX_TENSORS:,} are not read")
    if any(len(name) > _MAX_NAME for name in tensors):
        raise WeightsError(f"the checkpoint contains a tensor with a name of more than {_MAX_NAME:,} characters")
    for name in _COUNTERS & tensors.keys():
        del tensors[name]
        tensors.unused[name] = "a counter of averaged models"
    return _strip(_choose_model(tensors))


def _open(content: Mapping[Any, Any], path: list[str]) -> Tensors:
    """Search nested containers for tensors."""
    tensors = Tensors((key, x) for key, x in content.items() if isinstance(key, str) and isinstance(x, Tensor))
    inside = [key for key in _CONTAINERS if _contains_tensors(content.get(key))]
    if tensors and not (inside and len(tensors) < 3):
        if path:
            tensors.notes.append(f"the state dict is the checkpoint's {'.'.join(path)!r}")
        return tensors
    if not inside or len(path) > 4:
        keys = join_names((str(key) for key in content), 6) or "it is empty"
        raise WeightsError(f"the checkpoint contains no state dict ({keys})")
    found = _open(content[inside[0]], [*path, inside[0]])
    if len(inside) > 1:
        found.notes.append(f"the checkpoint's {' and '.join(repr(key) for key in inside[1:])} ignored")
    return found


def _contains_tensors(value: object, depth: int = 0) -> bool:
    if not isinstance(value, Mapping) or depth > 4:
        return False
    return any(isinstance(x, Tensor) or _contains_tensors(x, depth + 1) for x in value.values())


def _choose_model(tensors: Tensors) -> Tensors:
    for first, second in _MODEL_PAIRS:
        sizes = [sum(name.startswith(prefix) for name in tensors) for prefix in (first, second)]
        if min(sizes) > 2 and 2 * sum(sizes) > len(tensors):
            out = tensors.empty_copy()
            out.update({name: tensor for name, tensor in tensors.items() if not name.startswith(second)})
            out.notes.append(f"{sizes[1]} tensors of the checkpoint's {second[:-1]!r} ignored")
            return out
    return tensors


def _strip(tensors: Tensors) -> Tensors:
    """Strip prefixes that most names have, repeatedly. Names without them are recorded as outside."""
    for _ in range(_MAX_PREFIXES):
        prefix = next((p for p in _PREFIXES if 2 * sum(name.startswith(p) for name in tensors) > len(tensors)), None)
        if prefix is None:
            break
        out = tensors.empty_copy()
        for name, tensor in tensors.items():
            bare = name.removeprefix(prefix)
            if bare in out:
                raise WeightsError(f"the checkpoint contains {bare} twice, with and without {prefix!r}: remove one")
            out[bare] = tensor
            if (origin := tensors.file_name(name)) != bare:
                out.origin[bare] = origin
            if bare == name or name in tensors.outside:
                out.outside.add(bare)
        tensors = out
    return tensors
