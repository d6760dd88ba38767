"""Writes the features of many images to a file; repeating a call that was stopped or killed continues it.

Finished features are written to shards in `<out>.part/`, with fingerprints of the model and the files in state.json.
At the end the shards are joined into the file, which is renamed into place, and the folder is removed.
Shapes: N images, F features.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from vitrail.errors import ConfigError, DataError, DeviceError, RunError, how_to_install
from vitrail.images.reader import Inputs, NoImages, expand, path_of
from vitrail.inference.engine import Engine
from vitrail.utils.files import (
    atomic_write_bytes,
    atomic_write_text,
    disk_errors,
    lock_or_raise,
    remove_leftovers,
    user_path,
)

Source = str | NoImages  # a path, or a folder or pattern without images
Rows = Iterator[tuple[str, npt.NDArray[np.float32]]]  # paths and their features F
Progress = Callable[[int, int], AbstractContextManager[Callable[[int], None]]]

_SHARD = 256  # images in a shard, at least: at most these are computed again after a kill
_ROW_GROUP = 8192  # rows in a row group of a parquet file
_FORMAT = "2"


@dataclass(frozen=True)
class Embedded:
    """The file `path` has `images` rows of `features` numbers.

    `skipped` lists the images that could not be read, {"path", "reason"} each; they have no row.
    """

    path: Path
    images: int
    features: int
    skipped: list[dict[str, str]]


def embed_to_file(
    engine: Engine,
    inputs: Inputs,
    out: str | Path,
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Embedded:
    """Write the input of the model's classification head, float32 N F, one row for each readable image.

    A call that is repeated after it was stopped or killed continues after the last complete shard, and writes the same
    bytes as an uninterrupted one.

    Args:
        engine: for a classifier, `classifier.engine()`.
        inputs: paths of images, folders or patterns, as `Classifier.predict` takes them.
        out: `*.npy`, an array whose paths are in `<out>.json`, or `*.parquet` with the columns `path` and `feature`.
            Either way `<out>.json` describes the model and lists the images that were skipped.
        batch_size: None for the runtime's default. Continuing with another one may change the last bits.
        progress: called with the numbers of finished images and of all images; returns a context manager whose value is
            a function that is called with the number of images of each batch.

    Raises:
        ConfigError: `out` has another extension, or batch_size is below 1.
        DataError: no image could be read, or the inputs are not paths.
        RunError: `out` exists, or `<out>.part` belongs to another model or to other files.
        DeviceError: pyarrow is missing.
    """
    out = user_path(out)
    write = _writer(out)
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
    part = out.with_name(out.name + ".part")
    if out.exists() and not part.exists():
        raise RunError(f"{out} already exists: remove it, or choose another --out")
    sources = _list_sources(inputs)
    with disk_errors(part):
        part.mkdir(parents=True, exist_ok=True)
    busy = RunError(f"another process is writing {out}: wait for it, or choose another --out")
    with lock_or_raise(part / ".lock", busy):
        remove_leftovers(part)
        fingerprint = _check_state(part, engine, sources)
        shards = _find_shards(part, engine.runtime.num_features)
        done = shards[-1].stop if shards else 0
        with progress(done, len(sources)) if progress else contextlib.nullcontext(lambda count: None) as advance:
            _write_shards(engine, sources, done, part, batch_size, advance)
        result = _join_shards(engine, fingerprint, sources, part, out, write)
    removed = part.with_name(f".{part.name}.{secrets.token_hex(4)}.tmp")
    part.rename(removed)  # first, because a folder that is partly removed would look like unfinished work
    shutil.rmtree(removed, ignore_errors=True)
    if not result.images:
        first = result.skipped[0]
        raise DataError(f"none of {len(sources):,} images could be read; the first: {first['path']} {first['reason']}")
    return result


def _list_sources(inputs: Inputs) -> list[Source]:
    """The path of every image; a NoImages for a folder or pattern without images."""
    sources: list[Source] = []
    for source in expand(inputs):
        if not isinstance(source, str | os.PathLike | NoImages):
            raise DataError(f"a feature file lists paths: give paths, not {type(source).__name__}")
        sources.append(source if isinstance(source, NoImages) else os.fspath(source))
    if not sources:
        raise DataError("there are no images to embed")
    return sources


def _path(source: Source) -> str:
    return path_of(source) or ""


def _check_state(part: Path, engine: Engine, sources: Sequence[Source]) -> str:
    """Write state.json, or check the one of an interrupted call; returns the model's fingerprint.

    Raises:
        RunError: the unfinished work is of another model or of other files.
    """
    state = {"format": _FORMAT, "model": engine.runtime.fingerprint(), "files": files_fingerprint(sources)}
    path = part / "state.json"
    if not path.exists() and not any(part.glob("*.safetensors")):
        atomic_write_text(path, json.dumps(state))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    names = {"format": "unknown origin", "model": "another model or precision", "files": "other images"}
    for key, name in names.items():
        if found.get(key) != state[key]:
            raise RunError(f"{part} has unfinished work of {name}: remove it, or choose another --out")
    return state["model"]


def files_fingerprint(sources: Sequence[Source]) -> str:
    """A hex digest that changes with the files' paths, order, sizes and modification times."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sources:
        path = _path(source)
        try:
            stat = os.stat(path)
            version = f"{stat.st_size} {stat.st_mtime_ns}"
        except (OSError, ValueError):
            version = "none"
        digest.update(f"{path}\0{version}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


@dataclass(frozen=True)
class _Shard:
    """Features of the readable sources from `start` to before `stop`; `errors` by index."""

    file: Path
    start: int
    stop: int
    errors: dict[int, str]


def _find_shards(part: Path, width: int) -> list[_Shard]:
    """The complete shards from the first source on, up to the first gap or damaged file."""
    shards: list[_Shard] = []
    start = 0
    while (file := part / f"{start:010d}.safetensors").exists():
        try:
            with safe_open(file, framework="numpy") as content:
                stop = int(content.metadata()["stop"])
                errors = {int(index): reason for index, reason in json.loads(content.metadata()["errors"]).items()}
                shape = tuple(content.get_slice("features").get_shape())
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            break
        if stop <= start or shape != (stop - start - len(errors), width):
            break
        shards.append(_Shard(file, start, stop, errors))
        start = stop
    return shards


def _write_shards(
    engine: Engine,
    sources: Sequence[Source],
    done: int,
    part: Path,
    batch_size: int | None,
    advance: Callable[[int], None],
) -> None:
    """Shards of the sources from `done` on. A shard ends with a batch, so that continuing gives the same batches."""
    remaining: Any = sources[done:]
    start = stop = done
    rows: list[npt.NDArray[np.float32]] = []
    errors: dict[int, str] = {}
    for batch in engine.stream(remaining, batch_size, features=True):
        rows.append(batch.outputs)
        errors |= {index: error for index, error in enumerate(batch.errors, stop) if error is not None}
        stop += len(batch.items)
        if stop - start >= _SHARD or stop == len(sources):
            metadata = {"stop": str(stop), "errors": json.dumps(errors)}
            content = save({"features": np.concatenate(rows)}, metadata)
            atomic_write_bytes(part / f"{start:010d}.safetensors", content)
            start, rows, errors = stop, [], {}
        advance(len(batch.items))


def _join_shards(
    engine: Engine,
    fingerprint: str,
    sources: Sequence[Source],
    part: Path,
    out: Path,
    write: Callable[[Path, Rows, int, int], None],
) -> Embedded:
    """Write the features of all shards to `out`, and its description; neither if no image was readable."""
    runtime = engine.runtime
    shards = _find_shards(part, runtime.num_features)
    errors = {index: reason for shard in shards for index, reason in shard.errors.items()}
    skipped = [{"path": _path(sources[index]), "reason": reason} for index, reason in errors.items()]
    paths = [_path(source) for index, source in enumerate(sources) if index not in errors]
    result = Embedded(out, len(paths), runtime.num_features, skipped)
    if not paths:
        return result
    description: dict[str, Any] = {
        "model": runtime.name,
        "fingerprint": fingerprint,
        "preprocess": runtime.preprocess.to_dict(),
        "images": result.images,
        "features": result.features,
        "skipped": skipped,
    }
    if write is _write_npy:
        description["paths"] = paths
    temporary = part / ".joined.tmp"
    features = (row for shard in shards for row in load_file(shard.file)["features"])
    with disk_errors(out):
        write(temporary, zip(paths, features, strict=True), result.images, result.features)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        atomic_write_text(out.with_name(out.name + ".json"), json.dumps(description, indent=1) + "\n")
        temporary.replace(out)
    return result


def _writer(out: Path) -> Callable[[Path, Rows, int, int], None]:
    """The function that writes files with the extension of `out`."""
    if out.suffix == ".npy":
        return _write_npy
    if out.suffix != ".parquet":
        raise ConfigError(f"{out} is neither .npy nor .parquet: choose one of these extensions")
    if find_spec("pyarrow") is None:
        raise DeviceError(f"parquet needs pyarrow: {how_to_install('parquet')}; or write .npy")
    return _write_parquet


def _write_npy(path: Path, rows: Rows, images: int, width: int) -> None:
    """NumPy's format, row by row. Not by memmap, where a full disk kills the process without a message."""
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (images, width)}
        np.lib.format.write_array_header_1_0(file, header)
        for _, features in rows:
            file.write(features.astype("<f4", copy=False).tobytes())


def _write_parquet(path: Path, rows: Rows, images: int, width: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("path", pa.string()), ("feature", pa.list_(pa.float32(), width))])
    with pq.ParquetWriter(path, schema, use_dictionary=False) as writer:
        while group := list(islice(rows, _ROW_GROUP)):
            # Parquet strings are UTF-8; file names need not be.
            names = pa.array([name.encode("utf-8", "backslashreplace").decode() for name, _ in group], pa.string())
            features = pa.array(np.concatenate([features for _, features in group]))
            table = pa.table([names, pa.FixedSizeListArray.from_arrays(features, width)], schema=schema)
            writer.write_table(table)
