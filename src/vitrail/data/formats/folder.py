"""A folder of images as a dataset: `<class>/*.jpg`, or train/, val/ and test/ above that."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vitrail.data.dataset import Dataset, FileSplit, Sizes, Skipped, Split
from vitrail.data.splits import SPLIT_NAMES, hold_out
from vitrail.errors import VitrailError, did_you_mean
from vitrail.images.decode import BadImage, Header, decode, image_extensions, read_header

_CHUNK = 64  # files to a task of the scan


@dataclass
class _Found:
    """Image files of one split, by class; `stray` are images that lie in no class folder."""

    classes: list[str]
    files: list[tuple[str, int]]  # (path, number of the class)
    stray: list[str]


def open_folder(
    root: Path,
    *,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    split_seed: int = 0,
    least_classes: int = 2,
    progress: Callable[[int, int | None], None] | None = None,
) -> Dataset:
    """Open a folder. Every header is read, and one image of each class is decoded; what fails is in `skipped`.

    Sub-folders of a class belong to it. Hidden files and files whose names are not images' are passed over in silence.
    Where the folder has no split of its own, val_fraction of the images (and test_fraction, from 10 images a class
    on) is held out, stratified. Raises VitrailError where there is nothing to learn from.
    """
    found = {split: _list_classes(folder) for split, folder in _layout(root).items()}
    first = next(iter(found))
    names = _agree(root, found)
    if len(names) < least_classes:
        raise VitrailError(f"{root} has one class only, {names[0]!r}: a classifier needs at least two class folders")
    skipped: list[Skipped] = []
    parts: dict[str, FileSplit] = {}
    sizes: list[npt.NDArray[np.int64]] = []
    number = {name: i for i, name in enumerate(names)}
    for split, listing in found.items():
        skipped += [{"path": path, "reason": "lies outside the class folders"} for path in listing.stray]
        good, headers = _scan(listing, skipped, progress)
        if split == first:
            good, headers = _prove_classes(root, listing, good, headers, skipped)
        labels = np.array([number[listing.classes[c]] for _, c in good], dtype=np.int64)
        sizes.append(np.array([(h.height, h.width) for h in headers], dtype=np.int64).reshape(-1, 2))
        parts[split] = FileSplit([path for path, _ in good], labels, sizes=sizes[-1])

    def names_of(part: FileSplit) -> list[str]:
        return [Path(os.path.relpath(path, root)).as_posix() for path in part.paths]

    how = hold_out(parts, names_of, "the folder's own", val_fraction, test_fraction, split_seed)
    splits: dict[str, Split] = {
        name: parts[name] for name in ("train", "val", "test") if name in parts and len(parts[name])
    }
    return Dataset(
        name=str(root),
        class_names=tuple(names),
        splits=splits,
        sizes=Sizes.of(np.concatenate(sizes)),
        how_split=how,
        skipped=skipped,
    )


def natural(name: str) -> tuple[list[int | str], str]:
    """Sort key under which "class2" comes before "class10"."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    """What is in a folder and not hidden, in natural order."""
    try:
        with os.scandir(folder) as entries:
            seen = [e for e in entries if not e.name.startswith(".") and e.name != "__MACOSX"]
    except OSError as error:
        raise VitrailError(f"cannot read the folder {folder}: {error.strerror or error}") from None
    return sorted(seen, key=lambda entry: natural(entry.name))


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in image_extensions()


def _layout(root: Path) -> dict[str, Path]:
    """{"train": root} for class folders right here, or one entry for each of train/, val/, test/."""
    folders = [entry.name for entry in _entries(root) if _is_dir(entry)]
    known = [name for name in folders if name.lower() in SPLIT_NAMES]
    trains = any(SPLIT_NAMES[name.lower()] == "train" for name in known)
    # "train" or "test" may also be the name of a class: then it holds images and no folders, beside other classes.
    deep = any(_is_dir(entry) for name in known for entry in _entries(root / name))
    if not known or (len(known) < len(folders) and not (trains and deep)):
        return {"train": root}
    layout: dict[str, Path] = {}
    for name in sorted(known, key=lambda name: ("train", "val", "test").index(SPLIT_NAMES[name.lower()])):
        split = SPLIT_NAMES[name.lower()]
        if split in layout:
            raise VitrailError(f"{root} has both {layout[split].name}/ and {name}/, which mean the same: keep one")
        layout[split] = root / name
    return layout


def _list_classes(folder: Path) -> _Found:
    entries = _entries(folder)
    classes = [entry.name for entry in entries if _is_dir(entry)]
    stray = [entry.path for entry in entries if not _is_dir(entry) and _is_image(entry.name)]
    if not classes:
        if stray:
            raise VitrailError(
                f"{folder} holds images but no class folders: put the images of each class into a folder named after it"
            )
        raise VitrailError(f"{folder} is empty of class folders: it needs one folder of images for each class")
    files = [(path, c) for c, name in enumerate(classes) for path in _walk(str(folder / name), set())]
    return _Found(classes, files, stray)


def _walk(folder: str, visited: set[tuple[int, int]]) -> Iterator[str]:
    """Image files below a folder. A folder already visited, as by a link to a parent, is not entered again."""
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in visited:
        return
    visited.add((status.st_dev, status.st_ino))
    for entry in _entries(folder):
        if _is_dir(entry):
            yield from _walk(entry.path, visited)
        elif _is_image(entry.name):
            yield entry.path


def _agree(root: Path, found: dict[str, _Found]) -> list[str]:
    """The class names, which are those of the first split; the others must have the same."""
    first, *others = found
    names = found[first].classes
    for split in others:
        for name in found[split].classes:
            if name not in names:
                hint = did_you_mean(name, names)
                raise VitrailError(
                    f"{root / split} has the class {name!r}, which {first}/ has not{hint}: name them alike"
                )
        for name in names:
            if name not in found[split].classes:
                raise VitrailError(f"{root / split} lacks the class {name!r}, which {first}/ has: give it a folder too")
    return names


def _scan(
    listing: _Found, skipped: list[Skipped], progress: Callable[[int, int | None], None] | None
) -> tuple[list[tuple[str, int]], list[Header]]:
    """Read all headers. Bad files go to `skipped`; those that lack their end are decoded to find out."""

    def look(files: Sequence[tuple[str, int]]) -> list[Header | BadImage]:
        results: list[Header | BadImage] = []
        for path, _ in files:
            try:
                header = read_header(Path(path))
                if header.doubtful:
                    decode(path)
                results.append(header)
            except BadImage as bad:
                results.append(bad)
        return results

    good: list[tuple[str, int]] = []
    headers: list[Header] = []
    chunks = [listing.files[i : i + _CHUNK] for i in range(0, len(listing.files), _CHUNK)]
    done = 0
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        for chunk, results in zip(chunks, pool.map(look, chunks), strict=True):
            for item, result in zip(chunk, results, strict=True):
                if isinstance(result, BadImage):
                    skipped.append({"path": item[0], "reason": result.reason})
                else:
                    good.append(item)
                    headers.append(result)
            done += len(chunk)
            if progress:
                progress(done, len(listing.files))
    return good, headers


def _prove_classes(
    root: Path, listing: _Found, good: list[tuple[str, int]], headers: list[Header], skipped: list[Skipped]
) -> tuple[list[tuple[str, int]], list[Header]]:
    """Decode images of each class until one works; those that do not are taken out. Raises where a class has none."""
    proven: set[int] = set()
    bad: set[int] = set()
    for row, (path, c) in enumerate(good):
        if c in proven:
            continue
        try:
            decode(path)
            proven.add(c)
        except BadImage as error:
            bad.add(row)
            skipped.append({"path": path, "reason": error.reason})
    for c, name in enumerate(listing.classes):
        if c not in proven:
            tried = {path for path, number in listing.files if number == c}
            why = next((f": {os.path.basename(s['path'])} {s['reason']}" for s in skipped if s["path"] in tried), "")
            raise VitrailError(f"the class {name!r} in {root} has no image that can be used ({len(tried)} files{why})")
    keep = [row for row in range(len(good)) if row not in bad]
    return [good[row] for row in keep], [headers[row] for row in keep]
