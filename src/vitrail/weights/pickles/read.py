"""Files of torch.save, read without unpickling: no name in a file is ever imported or called (see machine.py).

The length of the pickle is bounded, and the tensors are views of the file.
"""

import io
import mmap
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vitrail.errors import WeightsError
from vitrail.utils.text import one_line
from vitrail.weights.pickles.machine import MAX_PICKLE, Instructions, Machine, Refused, StorageOf, parse, too_long

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the format before torch 1.6
_ALIGNMENT = 8  # bytes; data elsewhere are copied
_ERRORS = (
    ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, OSError, EOFError,
    struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def read_pickled(path: Path, archive: zipfile.ZipFile | None, file: BinaryIO) -> Mapping[Any, Any]:
    """The content of an open torch.save file: a zip archive, or of the format before torch 1.6.

    Raises:
        WeightsError: it is damaged, exceeds the limits, contains tensors that are not dense, or needs code to be read.
    """
    try:
        content = _read_stream(file) if archive is None else _read_zipped(archive, file)
    except Refused as error:
        raise WeightsError(f"{path} {error}") from None
    except _ERRORS as error:
        raise WeightsError(f"{path} is damaged, truncated or not a checkpoint: {one_line(error, 120)}") from None
    if not isinstance(content, dict):
        what = "tensor" if isinstance(content, Tensor) else type(content).__name__
        raise WeightsError(f"{path} contains a {what}, not a state dict: save model.state_dict() on a trusted machine")
    return content


def _read_zipped(archive: zipfile.ZipFile, file: BinaryIO) -> Any:
    """data.pkl, and one entry for each storage."""
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"{len(pickles)} entries named data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{root}byteorder")
    if order and (order.file_size > MAX_PICKLE or archive.read(order) != b"little"):
        raise Refused("has big-endian numbers: save it on a machine with little-endian ones")
    if entries[pickles[0]].file_size > MAX_PICKLE:
        raise Refused(too_long())
    instructions = parse(io.BytesIO(archive.read(pickles[0])))
    size = file.seek(0, io.SEEK_END)
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        entry = entries[f"{root}data/{key}"]
        length = count * dtype.itemsize
        if entry.file_size < length:
            raise ValueError(f"the data of storage {key} are incomplete")
        if entry.compress_type != zipfile.ZIP_STORED:
            return torch.frombuffer(bytearray(archive.read(entry)), dtype=torch.uint8)[:length].view(dtype)
        file.seek(entry.header_offset)
        name_length, extra_length = struct.unpack("<26xHH", file.read(30))
        return _view(mapped, entry.header_offset + 30 + name_length + extra_length, dtype, count)

    return Machine(_Storages(storage).get, size).run(instructions)


def _read_stream(file: BinaryIO) -> Any:
    """Four pickles (magic number, protocol, system, content), a pickle with the storages' keys, and their data."""
    head = io.BytesIO(file.read(MAX_PICKLE))
    parts = [parse(head) for _ in range(5)]
    size = file.seek(0, io.SEEK_END)
    kinds: dict[str, tuple[torch.dtype, int]] = {}

    def note(key: str, dtype: torch.dtype, count: int) -> Tensor:
        if kinds.setdefault(key, (dtype, count)) != (dtype, count):
            raise ValueError(f"storage {key} has two sizes")
        return torch.empty(count, dtype=dtype, device="meta")

    def plain(part: Instructions) -> Any:
        return Machine(note, size).run(part)

    magic, protocol, system = (plain(part) for part in parts[:3])
    if magic != _MAGIC or protocol != _PROTOCOL or not isinstance(system, dict) or not system.get("little_endian"):
        raise ValueError("it does not start as torch.save begins a file")
    plain(parts[3])  # notes the type of each storage
    keys = plain(parts[4])
    mapped, position = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), head.tell()
    storages: dict[str, Tensor] = {}
    for key in keys if isinstance(keys, list) else ():
        dtype, count = kinds[key]
        (stored,) = struct.unpack_from("<q", mapped, position)
        if stored != count:
            raise ValueError(f"the data of storage {key} are incomplete")
        storages[key] = _view(mapped, position + 8, dtype, count)
        position += 8 + count * dtype.itemsize
    return Machine(lambda key, dtype, count: storages[key], size).run(parts[3])


def _view(mapped: mmap.mmap, start: int, dtype: torch.dtype, count: int) -> Tensor:
    """A flat tensor of a part of the file."""
    length = count * dtype.itemsize
    if length < 0 or start + length > len(mapped):
        raise ValueError("the data end early")
    if not count:
        return torch.empty(0, dtype=dtype)
    found = torch.frombuffer(mapped, dtype=torch.uint8, count=length, offset=start)
    return (found if start % _ALIGNMENT == 0 else found.clone()).view(dtype)


@dataclass
class _Storages:
    """Each storage is made once."""

    make: StorageOf
    known: dict[str, Tensor] = field(default_factory=dict)

    def get(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        if key not in self.known:
            self.known[key] = self.make(key, dtype, count)
        return self.known[key]
