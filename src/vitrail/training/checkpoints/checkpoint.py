"""Checkpoints: all that a run needs to go on, as tensors (safetensors) and JSON, whole or not there at all.

A checkpoint is the folder `step-00000200` in the run's `checkpoint` folder, or `step-00000200.1` where one of the same
number of steps stands already. The newest whole one counts; older ones are removed once a newer one stands.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitrail.errors import VitrailError
from vitrail.utils.files import atomic_folder

_FORMAT = 1
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors in named parts (model, optimizer, ema, best, loss), and everything else as JSON."""

    tensors: dict[str, dict[str, Tensor]]
    record: dict[str, Any]


def save_checkpoint(folder: Path, steps: int, checkpoint: Checkpoint) -> Path:
    """Write `folder/step-...`, then remove the older ones. Returns its path.

    Raises:
        VitrailError: the disk is full or refuses; what stood there before still does.
    """
    # Under a name of its own, and not in place of another: that would be gone for a moment before this one is there.
    same = [number for count, number in map(_numbers, find_checkpoints(folder)) if count == steps]
    place = folder / (f"step-{steps:08d}.{max(same) + 1}" if same else f"step-{steps:08d}")
    with atomic_folder(place) as temporary:
        for part, tensors in checkpoint.tensors.items():
            save_file(_apart(tensors), temporary / f"{part}.safetensors")
        record = {"format": _FORMAT, "parts": sorted(checkpoint.tensors), **checkpoint.record}
        (temporary / _STATE).write_text(json.dumps(record), encoding="utf-8")
    for old in find_checkpoints(folder):
        if old != place:
            shutil.rmtree(old, ignore_errors=True)
    return place


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    return sorted(folder.glob("step-*"), key=_numbers, reverse=True)


def _numbers(place: Path) -> tuple[int, int]:
    """Steps of a checkpoint, and how many of as many steps there were before it."""
    steps, _, number = place.name.removeprefix("step-").partition(".")
    return int(steps), int(number or 0)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder` that can be read; None where there is none at all.

    Raises:
        VitrailError: there are some, and none can be read.
    """
    found, fault = find_checkpoints(folder), ""
    for place in found:
        try:
            record = json.loads((place / _STATE).read_text(encoding="utf-8"))
            if record["format"] != _FORMAT:
                raise ValueError(
                    f"its format is {record['format']}, not {_FORMAT}: another version of vitrail wrote it"
                )
            return Checkpoint({part: load_file(place / f"{part}.safetensors") for part in record["parts"]}, record)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            fault = fault or f"{place} cannot be read: {error}"
    if found:
        raise VitrailError(fault)
    return None


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without views of one another, which safetensors refuses (guests may tie weights)."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        whole = tensor.detach().contiguous()
        address = whole.untyped_storage().data_ptr()
        shared = address in seen or whole.untyped_storage().nbytes() != whole.nbytes
        apart[name] = whole.clone() if shared and whole.numel() else whole
        seen.add(address)
    return apart
