"""Reading of untrusted checkpoint files, without running code in them.

The format is detected from the first bytes: safetensors, NumPy's .npz, or torch.save, a pickle of which only tensors
and plain containers are read (see pickles/). What a file may take is bounded before it is allocated.
"""

import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from vitrail.errors import WeightsError
from vitrail.utils.text import join_names, one_line, printable
from vitrail.weights.archive import open_archive
from vitrail.weights.pickles.read import read_pickled

_MAX_JSON = 16 << 20  # bytes; 100,000 class names take a few MB
_MAX_HEADER = 4 << 20  # bytes, of about 100 for a tensor
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


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
        return _read_zip(path)
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if start[:1] == b"\x80":
        with path.open("rb") as stream:
            return read_pickled(path, None, stream)
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
    if not name.isprintable():
        raise WeightsError(f"{where} names the file {printable(name)!r}, with control characters: do not trust it")
    return name


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises WeightsError if the file cannot be read or has no object."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise WeightsError(f"{path} is too large for a config file")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} contains a {type(content).__name__}, not a JSON object")
    return content


def check_safetensors(path: Path) -> None:
    """Raise WeightsError if a safetensors file has an unreasonably long header, before it is parsed."""
    with path.open("rb") as file:
        start = file.read(8)
    if len(start) == 8 and int.from_bytes(start, "little") > _MAX_HEADER:
        raise WeightsError(f"{path} is damaged or not a safetensors file: its header has over {_MAX_HEADER >> 20} MiB")


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    check_safetensors(path)
    try:
        return load_file(path)
    except Exception as error:  # it raises nearly every kind on a damaged file
        raise WeightsError(f"{path} is damaged, truncated or not a safetensors file: {one_line(error)}") from None


def _read_zip(path: Path) -> Mapping[Any, Any]:
    """A zip archive: .npz, or torch.save with a data.pkl."""
    with open_archive(path) as (archive, file):
        names = [entry.filename for entry in archive.infolist()]
        if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
            if any("/code/" in name or name.endswith("constants.pkl") for name in names):
                raise WeightsError(
                    f"{path} is a TorchScript program, not a checkpoint: save its state_dict() on a trusted machine"
                )
            return read_pickled(path, archive, file)
        if names and all(name.endswith(".npy") for name in names):
            return _read_npz(path, archive)
    raise WeightsError(f"{path} is a zip archive, but neither .npz nor written by torch.save")


def _read_npz(path: Path, archive: zipfile.ZipFile) -> dict[str, torch.Tensor]:
    tensors = {}
    try:
        for entry in archive.infolist():
            with archive.open(entry) as file:
                array = _read_npy(file, entry.file_size)
            name = entry.filename.removesuffix(".npy")
            if array.dtype.kind not in "biuf":
                raise WeightsError(f"{path} contains {printable(name)} of dtype {array.dtype}, not numbers")
            tensors[name] = torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))
    except WeightsError:
        raise
    except Exception as error:  # numpy's parser of headers raises nearly every kind
        hint = "; it contains Python objects, which are not read" if "allow_pickle" in str(error) else ""
        raise WeightsError(
            f"{path} is damaged, truncated or not a .npz file of numbers{hint}: {one_line(error, 120)}"
        ) from None
    return tensors


def _read_npy(file: IO[bytes], size: int) -> npt.NDArray[Any]:
    """An array, whose shape is compared with the size of its entry before memory is allocated."""
    version = np.lib.format.read_magic(file)
    if version not in _NPY_HEADERS:
        raise ValueError(f"version {version} of its arrays is not known")
    shape, _, dtype = _NPY_HEADERS[version](file)
    if dtype.kind != "O" and math.prod(shape) * dtype.itemsize > size:
        raise ValueError("an array is larger than its data")
    file.seek(0)
    array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array
