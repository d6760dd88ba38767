"""Teacher outputs on disk. A view is determined by (seed, epoch, key), and so are the teacher's logits for it.

A store is a folder `FOLDER/<digest>`, with the digest of everything that determines views and logits. It contains
`store.json` (the digested values) and files of records, one for each epoch and writer: `epoch-00003-<random>.bin`. A
record is

    tag     uint64   hash of the view's key; for mixed images, of all keys of the batch
    check   uint64   checksum of tag and logits
    logits  float32 K

A record that was written incompletely fails its check and counts as missing; missing logits are computed and appended.
Training from stored logits is bit-identical to training without a store.

Shapes: B batch, K classes.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitrail._version import __version__
from vitrail.data.dataset import ArraySplit, FileSplit, Split, file_fingerprint
from vitrail.errors import RunError
from vitrail.training.config.schema import Use, keys_for
from vitrail.training.engine.batch_augmenter import View
from vitrail.training.objectives.teacher import TeacherLogits
from vitrail.training.setup import Setup
from vitrail.utils.counter_rng import mix
from vitrail.utils.files import atomic_write_text, disk_errors, user_path

Tags = npt.NDArray[np.uint64]

_FORMAT = 1
_CHUNK = 8192  # records checked at once
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def cache_key(setup: Setup, logits: TeacherLogits) -> dict[str, Any]:
    """Everything that determines the views of a run and the teacher's logits, as JSON."""
    teacher = logits.teacher
    return {
        "format": _FORMAT,
        "version": __version__,  # another version may augment differently
        "images": _images(setup.dataset.split("train")),
        "classes": list(logits.class_names),
        "preprocess": setup.preprocess.to_dict(),
        "teacher": {
            "weights": teacher.fingerprint,
            "preprocess": teacher.preprocess and teacher.preprocess.to_dict(),
            "class_names": teacher.class_names and list(teacher.class_names),
            "bf16": logits.bf16,
        },
        "settings": {key: setup.config.flat[key] for key in keys_for(Use.VIEWS)},
        "mixes": setup.config.augment.mixes,
    }


def _images(split: Split) -> str:
    """A digest of the images: the pixels of an array; names, sizes and modification times of files."""
    digest = hashlib.blake2b(np.ascontiguousarray(split.labels).tobytes(), digest_size=16)
    if isinstance(split, ArraySplit):
        digest.update(np.ascontiguousarray(split.images).data)
    elif isinstance(split, FileSplit):
        for path in split.paths:
            name = "/".join(path.split(os.sep)[-2:])
            digest.update(f"{name}\t{file_fingerprint(path)}\n".encode(errors="surrogateescape"))
    elif hasattr(split, "fingerprints"):
        for fingerprint in split.fingerprints():
            digest.update(f"{fingerprint}\n".encode(errors="surrogateescape"))
    else:
        digest.update("\n".join(split.name(i) for i in range(len(split))).encode(errors="surrogateescape"))
    return digest.hexdigest()


class StoredLogits:
    """Teacher logits from the store; missing ones are computed, and stored after `start_writing`.

    Raises:
        RunError: the folder is a file, or contains another store under this name.
    """

    def __init__(self, folder: str | Path, logits: TeacherLogits, key: Mapping[str, Any]) -> None:
        self._key = json.dumps(key, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
        digest = hashlib.blake2b(self._key.encode(errors="surrogateescape"), digest_size=8).hexdigest()
        self.logits = logits
        self.mixes = bool(key["mixes"])
        self.record = np.dtype([("tag", "<u8"), ("check", "<u8"), ("logits", "<f4", (len(logits.class_names),))])
        self.folder = user_path(folder) / digest
        self._about = self.folder / "store.json"
        if self.folder.parent.is_file():
            raise RunError(f"{self.folder.parent} is a file: choose a folder for teacher_outputs")
        if self._about.exists() and self._about.read_text(encoding="utf-8") != self._key:
            raise RunError(f"{self._about} is of other settings: choose another folder for teacher_outputs")
        self._writes = False
        self._open_epoch(-1)

    @property
    def line(self) -> str:
        """The folder and the number of stored outputs."""
        size = self.record.itemsize
        count = sum(path.stat().st_size // size for path in self.folder.glob("epoch-*.bin"))
        return f"outputs {self.folder}: {count:,} stored"

    def start_writing(self) -> None:
        """Store what is computed from now on; not in trial steps, whose images may not be those of the run.

        Raises:
            RunError: the folder cannot be written.
        """
        if not self._about.exists():
            atomic_write_text(self._about, self._key)
        self._writes = True
        self._open_epoch(-1)

    def __call__(self, view: View) -> Tensor:
        if view.epoch != self._epoch:
            self._open_epoch(view.epoch)
        tags = self._tags_of(view)
        places = np.searchsorted(self._tags, tags).clip(max=len(self._tags) - 1)
        found = self._tags[places] == tags
        if found.all():
            return torch.from_numpy(self._stored(places)).to(view.images.device)
        computed = self.logits(view)
        logits = computed.cpu().numpy()
        if self._writes:
            self._append(tags[~found], logits[~found])
        if not found.any():
            return computed
        # Stored logits take precedence, as this device may round differently.
        logits = np.where(found[:, None], self._stored(places), logits)
        return torch.from_numpy(logits).to(computed.device)

    def _tags_of(self, view: View) -> Tags:
        """A tag for each view. A mixed image depends on its batch."""
        tags = mix(view.keys.numpy().astype(np.uint64) + _GOLDEN)
        if self.mixes:
            tags = mix(tags + (tags * _weights(len(tags))).sum(dtype=np.uint64))
        return np.maximum(tags, np.uint64(1))  # 0: none

    def _open_epoch(self, epoch: int) -> None:
        """Index the records of an epoch: sorted tags, and for each its file and row."""
        self._epoch = epoch
        self._path: Path | None = None  # to which records of this epoch are appended
        paths = sorted(self.folder.glob(f"epoch-{epoch:05d}-*.bin"))
        counts = [path.stat().st_size // self.record.itemsize for path in paths]  # of complete records
        self._parts: list[Any] = [
            np.memmap(path, self.record, "r", shape=(count,))
            for path, count in zip(paths, counts, strict=True)
            if count
        ]
        tags, where = [np.zeros(1, np.uint64)], [np.zeros((1, 2), np.int64)]
        for number, part in enumerate(self._parts):
            chunks = (part[i : i + _CHUNK] for i in range(0, len(part), _CHUNK))
            intact = [chunk["check"] == _checks(chunk["tag"], chunk["logits"]) for chunk in chunks]
            rows = np.flatnonzero(np.concatenate(intact))
            tags.append(part["tag"][rows])
            where.append(np.stack([np.full(len(rows), number), rows], axis=1))
        self._tags, first = np.unique(np.concatenate(tags), return_index=True)
        self._where = np.concatenate(where)[first]

    def _stored(self, places: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
        """Logits B K of the tags at these places; zeros for the tag 0."""
        logits = np.zeros((len(places), *self.record["logits"].shape), np.float32)
        known = self._tags[places] != 0
        for number, part in enumerate(self._parts):
            in_part = known & (self._where[places, 0] == number)
            logits[in_part] = part["logits"][self._where[places[in_part], 1]]
        return logits

    def _append(self, tags: Tags, logits: npt.NDArray[np.float32]) -> None:
        records = np.empty(len(tags), self.record)
        records["tag"], records["logits"], records["check"] = tags, logits, _checks(tags, logits)
        path = self._path or self.folder / f"epoch-{self._epoch:05d}-{secrets.token_hex(4)}.bin"
        self._path = None  # if this fails, the file may end in half a record: continue in another file
        with disk_errors(path), FileIO(path, "a") as file:
            rest = memoryview(records.tobytes())
            while rest:
                rest = rest[file.write(rest) :]
        self._path = path


def _weights(count: int) -> Tags:
    """Odd factors that make a sum depend on the order."""
    return mix(np.arange(1, count + 1, dtype=np.uint64)) | np.uint64(1)


def _checks(tags: Tags, logits: npt.NDArray[np.float32]) -> Tags:
    """The checksum of each record."""
    bits = np.ascontiguousarray(logits, np.float32).view(np.uint32).astype(np.uint64)
    return mix(mix(tags + _GOLDEN) + (bits * _weights(bits.shape[1])).sum(axis=1, dtype=np.uint64))
