"""Checkpoints: all that a run needs to resume, as tensors (safetensors) and JSON, written atomically.

A checkpoint is the folder `step-00000200` in the run's `checkpoint` folder, or `step-00000200.1` if one of the same
number of steps exists. The newest readable one is used; older ones are removed after a newer one is written.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitrail.errors import RunError
from vitrail.utils.files import atomic_folder

_FORMAT = 2  # 1: vitrail 0.1.0
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors in parts (model, optimizer, ema, best, loss), and everything else as JSON."""

    tensors: dict[str, dict[str, Tensor]]
    record: dict[str, Any]


def save_checkpoint(folder: Path, steps: int, checkpoint: Checkpoint) -> Path:
    """Write `folder/step-...`, then remove the older ones. Returns its path.

    Raises:
        VitrailError: the disk is full or not writable; the previous checkpoint is unchanged.
    """
    # Under a new name: replacing an existing folder would leave a moment without any checkpoint.
    same = [number for count, number in map(_numbers, find_checkpoints(folder)) if count == steps]
    place = folder / (f"step-{steps:08d}.{max(same) + 1}" if same else f"step-{steps:08d}")
    with atomic_folder(place) as temporary:
        for part, tensors in checkpoint.tensors.items():
            save_file(unshared(tensors), temporary / f"{part}.safetensors")
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
    """Steps of a checkpoint, and its number among those of as many steps."""
    steps, _, number = place.name.removeprefix("step-").partition(".")
    return int(steps), int(number or 0)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest readable checkpoint in `folder`; None if there are none.

    Raises:
        RunError: there are some, and none can be read.
    """
    found, error_message = find_checkpoints(folder), ""
    for place in found:
        try:
            record = json.loads((place / _STATE).read_text(encoding="utf-8"))
            if record["format"] != _FORMAT:
                version = "vitrail 0.1.0" if record["format"] == 1 else "the version of vitrail that wrote it"
                raise ValueError(f"its format is {record['format']}, not {_FORMAT}: resume the run with {version}")
            return Checkpoint({part: load_file(place / f"{part}.safetensors") for part in record["parts"]}, record)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            error_message = error_message or f"could not read {place}: {error}"
    if found:
        raise RunError(error_message)
    return None


def unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without shared memory, which safetensors refuses (external models may tie weights)."""
    seen: set[int] = set()
    unshared = {}
    for name, tensor in tensors.items():
        value = tensor.detach().contiguous()
        address = value.untyped_storage().data_ptr()
        shared = address in seen or value.untyped_storage().nbytes() != value.nbytes
        unshared[name] = value.clone() if shared and value.numel() else value
        seen.add(address)
    return unshared
