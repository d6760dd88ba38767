"""Reading of untrusted checkpoint files, without running code in them.

The format is detected from the first bytes: safetensors, NumPy's .npz, or torch.save, a pickle of which only tensors
and plain containers are read.
"""

import argparse
import contextlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from vitrail.errors import WeightsError
from vitrail.utils.text import join_names, one_line, printable

_MAX_COMPRESSION = 200  # a zip archive with a higher ratio is rejected as a zip bomb
_MAX_JSON_BYTES = 64 << 20


def read_file(path: str | Path) -> Mapping[Any, Any]:
    """The content of a checkpoint file: tensors by name, or nested containers of them (see `unwrap.py`).

    Raises:
        WeightsError: the file is missing, truncated, damaged, of an unknown format, or needs code to be read.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
    if not size:
        raise WeightsError(f"{path} is empty: download or copy it again")
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a Git LFS pointer, not the file itself: run 'git lfs pull' in its folder")
    if start.startswith(b"PK"):
        return _read_zip(path, size)
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if start[:1] == b"\x80" or start[257:262] == b"ustar":  # tar: torch before 2018
        return _read_pickle(path)
    raise WeightsError(f"{path} is not a checkpoint: expected safetensors, .npz or a torch.save file")


def read_shards(index: str | Path) -> dict[str, torch.Tensor]:
    """A sharded checkpoint, given its index (`*.index.json`); the shards are in the same folder.

    Raises:
        WeightsError: a shard is missing or outside the folder, or index and shards differ.
    """
    index = Path(index)
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(x, str) for pair in table.items() for x in pair):
        raise WeightsError(f"{index} is not a checkpoint index: it has no weight_map from tensor names to files")
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(set(table.values())):
        shard = read_file(index.parent / plain_name(name, index))
        for key, tensor in shard.items():
            if key not in table:
                raise WeightsError(
                    f"{index.parent / name} contains {printable(str(key))}, which {index.name} does not list"
                )
            if isinstance(tensor, torch.Tensor) and table[key] == name:
                tensors[key] = tensor
    if missing := [key for key in table if key not in tensors]:
        raise WeightsError(f"{index} lists tensors that its files do not contain: {join_names(missing)}")
    return tensors


def plain_name(name: str, where: Path) -> str:
    """Return `name` if it is a plain file name. Raises WeightsError for a path."""
    if not name or name in (".", "..") or any(char in name for char in "/\\\0:"):
        raise WeightsError(f"{where} names the file {printable(name)!r}, which is outside its folder: do not trust it")
    return name


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises WeightsError if the file cannot be read or has no object."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise WeightsError(f"{path} is too large for a config file")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} contains a {type(content).__name__}, not a JSON object")
    return content


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # it raises nearly every kind on a damaged file
        raise WeightsError(f"{path} is damaged, truncated or not a safetensors file: {one_line(error)}") from None


def _read_zip(path: Path, size: int) -> Mapping[Any, Any]:
    """A zip archive: .npz, or torch.save with a data.pkl."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise WeightsError(f"{path} is damaged or truncated: {one_line(error)}") from None
    if sum(entry.file_size for entry in entries) > _MAX_COMPRESSION * size:
        raise WeightsError(f"{path} would unpack to more than {_MAX_COMPRESSION} times its size: do not trust it")
    names = [entry.filename for entry in entries]
    if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        if any("/code/" in name or name.endswith("constants.pkl") for name in names):
            raise WeightsError(
                f"{path} is a TorchScript program, not a checkpoint: save its state_dict() on a trusted machine"
            )
        return _read_pickle(path)
    if names and all(name.endswith(".npy") for name in names):
        return _read_npz(path)
    raise WeightsError(f"{path} is a zip archive, but neither .npz nor written by torch.save")


def _read_npz(path: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name in archive.files:
                array = archive[name]
                if array.dtype.kind not in "biuf":
                    raise WeightsError(f"{path} contains {printable(name)} of dtype {array.dtype}, not numbers")
                tensors[name] = torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))
    except (zipfile.BadZipFile, OSError, ValueError, TypeError, KeyError, EOFError, MemoryError) as error:
        hint = "; it contains Python objects, which are not read" if "allow_pickle" in str(error) else ""
        raise WeightsError(
            f"{path} is damaged, truncated or not a .npz file of numbers{hint}: {one_line(error, 120)}"
        ) from None
    return tensors


def _read_pickle(path: Path) -> Mapping[Any, Any]:
    """With torch's restricted unpickler; argparse.Namespace, common for settings, is allowed as plain data."""
    try:
        # torch.load looks at the suffix, which an open file lacks; only zip archives can be memory-mapped.
        mapped = zipfile.is_zipfile(path) and path.suffix != ".safetensors"
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            content = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise WeightsError(_needs_code(path, error)) from None
    except Exception as error:  # torch raises any kind on a damaged file
        raise WeightsError(f"{path} is damaged or truncated: {one_line(error, 120)}") from None
    if not isinstance(content, Mapping):
        what = type(content).__name__
        raise WeightsError(f"{path} contains a {what}, not a state dict: save model.state_dict() on a trusted machine")
    return content


def _needs_code(path: Path, error: Exception) -> str:
    found: list[str] = []
    if zipfile.is_zipfile(path):
        with contextlib.suppress(Exception):  # the names are only for the message
            found = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    if not found and "Unsupported" not in str(error) and "GLOBAL" not in str(error):
        return f"{path} is damaged or not a checkpoint: {one_line(error, 120)}"
    what = f" ({join_names(found, 4)})" if found else ""
    return (
        f"{path} needs Python code to be read{what}, which is not run: if you trust the file, load it "
        f"with torch.load(..., weights_only=False) and save its state_dict() as safetensors"
    )
