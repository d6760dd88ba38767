"""A folder of images: `<class>/*.jpg`, or train/, val/ and test/ above that."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import dropwhile, groupby
from pathlib import Path

import numpy as np

from vitrail.data.dataset import Dataset, FileSplit, SkippedImage
from vitrail.data.formats.scan import Label, Sample, Scan, scan_files
from vitrail.data.splits import SPLIT_NAMES, SPLITS, SplitOptions, make_dataset, natural
from vitrail.errors import DataError, did_you_mean
from vitrail.images.decode import BadImage, decode, image_extensions
from vitrail.utils.download import Progress
from vitrail.utils.files import user_path
from vitrail.utils.text import counted, join_names, printable, readable

File = tuple[str, str]  # path, class


@dataclass
class _Listing:
    """Image files of one split. skipped: images that are in no class folder, and links that were not followed."""

    classes: list[str]
    files: list[File]
    skipped: list[SkippedImage]


def open_folder(folder: str, options: SplitOptions, progress: Progress | None = None) -> Dataset:
    """Open a folder. Every header is read and one image of each class is decoded; files that fail are in `skipped`.

    Subfolders of a class belong to it. Hidden files and files without an image extension are ignored. A class is named
    as its folder; one whose name is not UTF-8, or has control characters, gets a readable one, with a warning. A link
    to a folder above it, or to another class, is not followed. Folders beside split folders are left out. Without split
    folders, val_fraction of the images (and test_fraction, from 10 images per class on) is held out, stratified.
    Raises DataError if there are no usable images.
    """
    root = user_path(folder)
    folders, beside = _split_folders(root)
    listings = {split: _list_classes(path) for split, path in folders.items()}
    first = next(iter(listings))
    class_names = _common_classes(root, listings)
    options.check_classes(root, class_names)
    index: dict[Label, int] = {name: i for i, name in enumerate(class_names)}
    given = ", ".join(f"{path.name}/" for path in folders.values())
    skipped: list[SkippedImage] = [
        {"path": str(root / name), "reason": f"is beside {given} and so left out"} for name in beside
    ]
    splits: dict[str, FileSplit] = {}
    for split, listing in listings.items():
        skipped += listing.skipped
        scan = scan_files(listing.files, progress)
        if split == first:
            _check_each_class(root, listing, scan)
        skipped += scan.skipped
        labels = np.array([index[label] for label in scan.labels], dtype=np.int64)
        splits[split] = FileSplit([sample.name for sample in scan.samples], labels, sizes=scan.sizes)

    def names_of(split: FileSplit) -> list[str]:
        return [Path(os.path.relpath(path, root)).as_posix() for path in split.paths]

    return make_dataset(str(root), class_names, splits, options, names_of=names_of, skipped=skipped)


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    """Entries of a folder that are not hidden, in natural order."""
    try:
        with os.scandir(folder) as entries:
            visible = [e for e in entries if not e.name.startswith(".") and e.name != "__MACOSX"]
    except OSError as error:
        raise DataError(f"could not read the folder {printable(str(folder), 400)}: {error.strerror or error}") from None
    return sorted(visible, key=lambda entry: natural(entry.name))


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symbolic link to itself
        return False


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in image_extensions()


def _split_folders(root: Path) -> tuple[dict[str, Path], list[str]]:
    """{"train": root} if root contains class folders, else an entry for each of train/, val/ and test/; and the names
    of the folders beside these."""
    folders = [entry.name for entry in _entries(root) if _is_dir(entry)]
    known = [name for name in folders if name.lower() in SPLIT_NAMES]
    has_train = any(SPLIT_NAMES[name.lower()] == "train" for name in known)
    # "train" or "test" may also be a class name: then the folder contains images, not folders, and has siblings.
    has_subfolders = any(_is_dir(entry) for name in known for entry in _entries(root / name))
    if not known or (len(known) < len(folders) and not (has_train and has_subfolders)):
        return {"train": root}, []
    found: dict[str, Path] = {}
    for name in sorted(known, key=lambda name: SPLITS.index(SPLIT_NAMES[name.lower()])):
        split = SPLIT_NAMES[name.lower()]
        if split in found:
            raise DataError(f"{root} has both {found[split].name}/ and {name}/, which mean the same split: keep one")
        found[split] = root / name
    return found, [name for name in folders if name not in known]


def _list_classes(folder: Path) -> _Listing:
    entries = _entries(folder)
    folders = [entry.name for entry in entries if _is_dir(entry)]
    loose = [entry.path for entry in entries if not _is_dir(entry) and _is_image(entry.name)]
    if not folders:
        found = "images but no class folders" if loose else "no class folders"
        raise DataError(f"{folder} contains {found}: put the images of each class into a folder named after the class")
    listing = _Listing(_class_names(folder, folders), [], [])
    listing.skipped += [{"path": path, "reason": "is not in a class folder"} for path in loose]
    # Entered through a link in a class folder, any of these would give the images of other classes this class's label.
    others = {_identity(path) for path in (*(folder / name for name in folders), *folder.resolve().parents, folder)}
    for name, path in zip(listing.classes, folders, strict=True):
        own = folder / path
        listing.files += [(file, name) for file in _walk(own, others - {_identity(own)}, listing.skipped)]
    return listing


def _class_names(folder: Path, folders: list[str]) -> list[str]:
    """The names of the classes: those of the folders, each made readable; warns if one differs."""
    names = [readable(name) for name in folders]
    count = Counter(names)  # two folders may read alike: "é" in UTF-8 and in Latin-1
    both = list(zip(names, folders, strict=True))
    names = [name if count[name] == 1 or name == own else printable(own, len(name) * 4) for name, own in both]
    changed = [f"{printable(own)} as {name}" for name, own in zip(names, folders, strict=True) if name != own]
    if changed:
        what = "folders whose names are not UTF-8 or have control characters are classes by another name"
        warnings.warn(f"{folder}: {what}: {join_names(changed)}", stacklevel=2)
    return names


def _identity(folder: Path | str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _walk(folder: Path, others: set[tuple[int, int]], skipped: list[SkippedImage]) -> Iterator[str]:
    """Image files below a folder, in natural order. No folder is entered twice, and none of `others`: a link to one of
    these is added to `skipped`."""
    visited = {_identity(folder)}
    waiting = [iter(_entries(folder))]  # of each folder on the way down; recursion would limit the depth
    while waiting:
        entry = next(waiting[-1], None)
        if entry is None:
            waiting.pop()
        elif not _is_dir(entry):
            if _is_image(entry.name):
                yield entry.path
        elif (identity := _identity(entry.path)) in others:
            skipped.append({"path": entry.path, "reason": "is a link to another class or to a folder above"})
        elif identity not in visited:
            visited.add(identity)
            waiting.append(iter(_entries(entry.path)))


def _common_classes(root: Path, listings: dict[str, _Listing]) -> list[str]:
    """The class names of the first split. Raises DataError unless all splits have the same."""
    first, *others = listings
    names = listings[first].classes
    for split in others:
        for name in listings[split].classes:
            if name not in names:
                hint = did_you_mean(name, names)
                raise DataError(f"{root / split} has the class {name!r}, which {first}/ does not have{hint}")
        for name in names:
            if name not in listings[split].classes:
                raise DataError(f"{root / split} lacks the class {name!r}, which {first}/ has")
    return names


def _check_each_class(root: Path, listing: _Listing, scan: Scan) -> None:
    """Decode images of each class until one succeeds; those that fail are left out. Raises if a class has none."""

    def fails(sample: Sample) -> bool:
        try:
            decode(sample.name)
        except BadImage as bad:
            scan.skip(sample.name, bad.reason)
            return True
        return False

    by_class = groupby(scan.samples, lambda sample: sample.label)
    usable = {label: [*dropwhile(fails, of_class)] for label, of_class in by_class}
    for name in listing.classes:
        if not usable.get(name):
            tried = {path for path, label in listing.files if label == name}
            why = next(
                (f": {os.path.basename(s['path'])} {s['reason']}" for s in scan.skipped if s["path"] in tried), ""
            )
            raise DataError(f"the class {name!r} in {root} has no readable image ({counted(len(tried), 'file')}{why})")
    scan.samples = [sample for of_class in usable.values() for sample in of_class]
