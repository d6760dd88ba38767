"""Checkpoints: all that a run needs to resume, as tensors (safetensors) and JSON, written atomically.

A checkpoint is the folder `step-00000200` in the run's `checkpoint` folder, or `step-00000200.1` if one of the same
number of steps exists. SHA256SUMS has the checksums of its files. The newest whole one is used; the last two are kept.
"""

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitrail.errors import RunError
from vitrail.utils.files import atomic_folder, mismatches, write_checksums
from vitrail.utils.text import one_line

_FORMAT = 2  # 1: vitrail 0.1.0
_STATE = "state.json"
_NAME = re.compile(r"step-[0-9]{1,15}(\.[0-9]{1,9})?")


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors in parts (model, optimizer, ema, best, loss), and everything else as JSON.

    place: where it was read from. damaged: why newer ones were not used.
    """

    tensors: dict[str, dict[str, Tensor]]
    record: dict[str, Any]
    place: Path | None = None
    damaged: tuple[str, ...] = ()


def save_checkpoint(folder: Path, steps: int, checkpoint: Checkpoint, keep: Path | None = None) -> Path:
    """Write `folder/step-...`, then remove the older ones but one. Returns its path.

    keep: the older one that stays, known to be whole; None: the newest of them.

    Raises:
        VitrailError: the disk is full or not writable; the previous checkpoints are unchanged.
    """
    # Under a new name: replacing an existing folder would leave a moment without any checkpoint.
    same = [number for count, number in map(_numbers, find_checkpoints(folder)) if count == steps]
    place = folder / (f"step-{steps:08d}.{max(same) + 1}" if same else f"step-{steps:08d}")
    with atomic_folder(place) as temporary:
        for part, tensors in checkpoint.tensors.items():
            save_file(unshared(tensors), temporary / f"{part}.safetensors")
        record = {"format": _FORMAT, "parts": sorted(checkpoint.tensors), **checkpoint.record}
        (temporary / _STATE).write_text(json.dumps(record), encoding="utf-8")
        write_checksums(temporary, _files(checkpoint.tensors))
    older = [other for other in find_checkpoints(folder) if other != place]
    for old in older:
        if old != (keep if keep in older else older[0]):
            shutil.rmtree(old, ignore_errors=True)
    return place


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    found = (place for place in folder.glob("step-*") if _NAME.fullmatch(place.name))
    return sorted(found, key=_numbers, reverse=True)


def _numbers(place: Path) -> tuple[int, int]:
    """Steps of a checkpoint, and its number among those of as many steps."""
    steps, _, number = place.name.removeprefix("step-").partition(".")
    return int(steps), int(number or 0)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint in `folder`; None if there are none.

    Raises:
        RunError: there are some, and none is whole.
    """
    damaged: list[str] = []
    for place in find_checkpoints(folder):
        try:
            return _load(place, damaged)
        except (OSError, ValueError, LookupError, TypeError, RecursionError, SafetensorError) as error:
            damaged.append(f"could not read {place}: {one_line(error)}")
    if damaged:
        raise RunError(damaged[0])
    return None


def _load(place: Path, damaged: list[str]) -> Checkpoint:
    """One checkpoint, compared with its checksums before it is parsed. Raises ValueError or others if it is damaged."""
    record = json.loads((place / _STATE).read_text(encoding="utf-8"))
    if record["format"] != _FORMAT:
        version = "vitrail 0.1.0" if record["format"] == 1 else "the version of vitrail that wrote it"
        raise ValueError(f"its format is {record['format']}, not {_FORMAT}: resume the run with {version}")
    if wrong := mismatches(place, _files(record["parts"])):
        raise ValueError(f"{wrong[0]} is damaged, its checksum differs")
    tensors = {part: load_file(place / f"{part}.safetensors") for part in record["parts"]}
    return Checkpoint(tensors, record, place, tuple(damaged))


def _files(parts: Iterable[str]) -> list[str]:
    return [_STATE, *(f"{part}.safetensors" for part in parts)]


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
