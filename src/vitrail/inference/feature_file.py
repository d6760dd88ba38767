"""Features of many images to a file: a stream that can be killed at any time and goes on where it stood.

What is done lies in shards in `<out>.part/`, beside a note of the model and the files that they belong to. When all is
there, the file is made of the shards, takes its name in one move, and the folder goes.
Shapes: N images, C features.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from vitrail.errors import RunError, VitrailError
from vitrail.images.reader import Crop, Inputs, expand
from vitrail.utils.files import atomic_write_bytes, atomic_write_text, disk_errors, lock_or_raise, remove_leftovers

if TYPE_CHECKING:
    from vitrail.classifier import Classifier

Source = str | Crop  # a path, or a folder or pattern that gave no image
Chunk = tuple[list[str], npt.NDArray[np.float32]]  # paths and their features N C
Progress = Callable[[int, int], AbstractContextManager[Callable[[int], None]]]

_SHARD = 256  # images, about: the most that a kill costs
_GROUP = 8192  # rows of a parquet file that are written at once
_FORMAT = "1"


@dataclass(frozen=True)
class Embedded:
    """What was written. `path` is the file, `images` the number of its rows, `features` their width C.

    `skipped` names the images that could not be read, each {"path", "reason"}; they have no row.
    """

    path: Path
    images: int
    features: int
    skipped: list[dict[str, str]] = field(default_factory=list)


def embed_to_file(
    classifier: Classifier,
    inputs: Inputs,
    out: str | Path,
    *,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Embedded:
    """Write the features that the model's head reads, float32 N C, a row for each image that can be read.

    Args:
        inputs: paths of images, folders or patterns, as `Classifier.predict` takes them.
        out: `*.npy`, an array whose paths stand in `<out>.json`, or `*.parquet` with the columns `path` and `feature`.
            Either way `<out>.json` names the model and the images that were skipped.
        batch_size: images at once. Work that goes on with another one may differ in the last bit.
        progress: called with the images that are done and all there are; gives a context in which a function is told
            how many more are done.

    Work that was stopped or killed goes on where it stood when this is called again.

    Raises:
        VitrailError: no image can be read, `out` is there already or has another ending, pyarrow is missing, or the
            unfinished work beside `out` is of another model or of other files.
    """
    out = Path(out).expanduser()
    write = _writer(out)
    if batch_size < 1:
        raise VitrailError(f"batch_size is at least 1, not {batch_size}")
    part = out.with_name(out.name + ".part")
    if out.exists() and not part.exists():
        raise VitrailError(f"{out} is there already: remove it, or choose another --out")
    sources = _list(inputs)
    with disk_errors(part):
        part.mkdir(parents=True, exist_ok=True)
    busy = RunError(f"another process is writing {out}: wait for it, or choose another --out")
    with lock_or_raise(part / ".lock", busy):
        remove_leftovers(part)
        model = _claim(part, classifier, sources)
        shards = _shards(part, classifier.model.num_features)
        done = shards[-1].stop if shards else 0
        with progress(done, len(sources)) if progress else contextlib.nullcontext(lambda count: None) as advance:
            _embed(classifier, sources, done, part, batch_size, advance)
        result = _assemble(classifier, model, sources, part, out, write)
    gone = part.with_name(f".{part.name}.{secrets.token_hex(4)}.tmp")
    part.rename(gone)  # in one move: half a folder would pass for unfinished work
    shutil.rmtree(gone, ignore_errors=True)
    if not result.images:
        first = f", the first because it {result.skipped[0]['reason']}"
        raise VitrailError(f"none of {len(sources):,} images could be read{first}")
    return result


def _list(inputs: Inputs) -> list[Source]:
    """Every image's path, or the error of a folder or pattern without images."""
    sources: list[Source] = []
    for source in expand(inputs):
        if not isinstance(source, str | os.PathLike | Crop):
            raise VitrailError(f"features go to a file with their paths: give paths, not {type(source).__name__}")
        sources.append(source if isinstance(source, Crop) else os.fspath(source))
    if not sources:
        raise VitrailError("there are no images to embed")
    return sources


def _path(source: Source) -> str:
    return source if isinstance(source, str) else source.path or ""


# --- whose work it is


def _claim(part: Path, classifier: Classifier, sources: Sequence[Source]) -> str:
    """Note whose work this is, or find that it is ours; gives the model's fingerprint.

    Raises:
        VitrailError: it is of another model or of other files.
    """
    note = {"format": _FORMAT, "model": model_fingerprint(classifier), "files": files_fingerprint(sources)}
    path = part / "state.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if next(part.glob("*.safetensors"), None) is None:
            atomic_write_text(path, json.dumps(note))
            return note["model"]
        found = None
    except ValueError:
        found = None
    if found == note:
        return note["model"]
    known = found if isinstance(found, dict) and found.get("format") == _FORMAT else None
    what = "unknown origin" if known is None else "another model" if known["model"] != note["model"] else "other images"
    raise VitrailError(f"{part} holds unfinished work of {what}: remove it, or choose another --out")


def model_fingerprint(classifier: Classifier) -> str:
    """A word that changes with any weight, and with how an image becomes the model's input."""
    digest = hashlib.blake2b(digest_size=16)
    about = [classifier.architecture, repr(classifier.model.config), classifier.preprocess.to_dict()]
    digest.update(json.dumps(about, sort_keys=True).encode())
    for name, tensor in classifier.model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def files_fingerprint(sources: Sequence[Source]) -> str:
    """A word that changes with the list of files, their order, sizes and dates."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sources:
        path = _path(source)
        try:
            state = os.stat(path)
            about = f"{state.st_size} {state.st_mtime_ns}"
        except (OSError, ValueError):
            about = "none"
        digest.update(f"{path}\0{about}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


# --- shards


@dataclass(frozen=True)
class _Shard:
    """Features of the readable ones among the sources from `start` to before `stop`; `errors` by place."""

    file: Path
    start: int
    stop: int
    errors: dict[int, str]


def _shards(part: Path, width: int) -> list[_Shard]:
    """What is done, from the first source on without a gap. A file that is not whole ends it."""
    shards: list[_Shard] = []
    start = 0
    while (file := part / f"{start:010d}.safetensors").exists():
        try:
            with safe_open(file, framework="numpy") as content:
                stop = int(content.metadata()["stop"])
                errors = {int(place): reason for place, reason in json.loads(content.metadata()["errors"]).items()}
                shape = tuple(content.get_slice("features").get_shape())
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            break
        if stop <= start or shape != (stop - start - len(errors), width):
            break
        shards.append(_Shard(file, start, stop, errors))
        start = stop
    return shards


def _embed(
    classifier: Classifier,
    sources: Sequence[Source],
    done: int,
    part: Path,
    batch_size: int,
    advance: Callable[[int], None],
) -> None:
    """Shard by shard from `done` on. Shards are whole batches, so that batches are the same after a kill."""
    size = max(1, _SHARD // batch_size) * batch_size
    rest: Any = sources[done:]
    stream = classifier.stream_features(rest, batch_size)
    for start in range(done, len(sources), size):
        stop = min(start + size, len(sources))
        rows, errors = [], {}
        for place in range(start, stop):
            _, features, error = next(stream)
            if features is None:
                errors[place] = error or "cannot be read"
            else:
                rows.append(features)
            advance(1)
        array = np.stack(rows) if rows else np.empty((0, classifier.model.num_features), np.float32)
        metadata = {"stop": str(stop), "errors": json.dumps(errors)}
        atomic_write_bytes(part / f"{start:010d}.safetensors", save({"features": array}, metadata))


# --- the file


def _assemble(
    classifier: Classifier,
    fingerprint: str,
    sources: Sequence[Source],
    part: Path,
    out: Path,
    write: Callable[..., None],
) -> Embedded:
    """Make the file of the shards and move it to its place, unless there is no row for it."""
    width = classifier.model.num_features
    shards = _shards(part, width)
    skipped = [
        {"path": _path(sources[place]), "reason": reason} for shard in shards for place, reason in shard.errors.items()
    ]
    result = Embedded(out, len(sources) - len(skipped), width, skipped)
    if not result.images:
        return result
    about: dict[str, Any] = {
        "model": classifier.architecture,
        "fingerprint": fingerprint,
        "preprocess": classifier.preprocess.to_dict(),
        "images": result.images,
        "features": width,
        "skipped": skipped,
    }
    if write is _write_npy:
        about["paths"] = [path for shard in shards for path in _good(shard, sources)]
    whole = part / ".whole.tmp"
    with disk_errors(out):
        chunks = ((list(_good(shard, sources)), load_file(shard.file)["features"]) for shard in shards)
        write(whole, chunks, result.images, width)
        with whole.open("rb") as file:
            os.fsync(file.fileno())
        atomic_write_text(out.with_name(out.name + ".json"), json.dumps(about, indent=1) + "\n")
        whole.replace(out)
    return result


def _good(shard: _Shard, sources: Sequence[Source]) -> Iterator[str]:
    """Paths of the shard's rows."""
    return (_path(sources[place]) for place in range(shard.start, shard.stop) if place not in shard.errors)


def _writer(out: Path) -> Callable[..., None]:
    """What writes files with the ending of `out`."""
    if out.suffix == ".npy":
        return _write_npy
    if out.suffix != ".parquet":
        raise VitrailError(f"{out} is neither .npy nor .parquet: name the file of features so that it ends in one")
    if find_spec("pyarrow") is None:
        raise VitrailError("parquet needs pyarrow: pip install 'vitrail[parquet]', or write .npy")
    return _write_parquet


def _write_npy(path: Path, chunks: Iterable[Chunk], images: int, width: int) -> None:
    """NumPy's own format, chunk by chunk. A map of the file would be killed by a full disk; writing says so."""
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (images, width)}
        np.lib.format.write_array_header_1_0(file, header)
        for _, rows in chunks:
            file.write(rows.astype("<f4", copy=False).tobytes())


def _write_parquet(path: Path, chunks: Iterable[Chunk], images: int, width: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("path", pa.string()), ("feature", pa.list_(pa.float32(), width))])
    with pq.ParquetWriter(path, schema, use_dictionary=False) as writer:
        for paths, rows in _grouped(chunks):
            # Parquet's text is UTF-8, and a file's name need not be.
            names = pa.array([path.encode("utf-8", "backslashreplace").decode() for path in paths], pa.string())
            values = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), width)
            writer.write_table(pa.table([names, values], schema=schema))


def _grouped(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """The same rows in larger pieces: a reader pays for every piece."""
    paths: list[str] = []
    parts: list[npt.NDArray[np.float32]] = []
    for names, rows in chunks:
        paths += names
        parts.append(rows)
        if len(paths) >= _GROUP:
            yield paths, np.concatenate(parts)
            paths, parts = [], []
    if paths:
        yield paths, np.concatenate(parts)
