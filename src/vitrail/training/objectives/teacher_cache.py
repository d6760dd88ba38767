"""A teacher's outputs, stored once and read again: views are determined by (seed, epoch, key), and so are its answers.

A store is a folder `FOLDER/<word>`, where the word is a digest of everything that decides views and answers; other
settings have another word, and stand beside it. It holds `store.json` (what was digested) and files of records, one for
each epoch and each writer: `epoch-00003-<random>.bin`. A record is

    tag     uint64   of the view's key, and where images are mixed of the keys of all the batch
    check   uint64   of tag and logits
    logits  float32 K

A record that a killed writer, a full disk or a lost cable left half-written fails its check, and counts as missing;
what is missing is asked of the teacher and appended. float32 keeps the answers as they are: a run that reads them is,
bit for bit, the run that wrote them, and the run without a store.

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
from vitrail.errors import VitrailError
from vitrail.training.config.schema import Use, keys_for
from vitrail.training.engine.batch_augmenter import View
from vitrail.training.objectives.teacher import TeacherLogits
from vitrail.training.setup import Setup
from vitrail.utils.counter_rng import mix
from vitrail.utils.files import atomic_write_text, disk_errors

Words = npt.NDArray[np.uint64]

_FORMAT = 1
_CHUNK = 8192  # records that are checked at once
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def deciding(setup: Setup, answers: TeacherLogits) -> dict[str, Any]:
    """Everything that decides the views of a run, and the teacher's answers to them, as JSON."""
    teacher = answers.teacher
    return {
        "format": _FORMAT,
        "version": __version__,  # another may augment otherwise
        "images": _images(setup.dataset.split("train")),
        "classes": list(answers.class_names),
        "preprocess": setup.preprocess.to_dict(),
        "teacher": {
            "weights": teacher.identity,
            "preprocess": teacher.preprocess and teacher.preprocess.to_dict(),
            "class_names": teacher.class_names and list(teacher.class_names),
            "bf16": answers.bf16,
        },
        "settings": {key: setup.config.flat[key] for key in keys_for(Use.VIEWS)},
        "mixes": setup.config.augment.mixes,
    }


def _images(split: Split) -> str:
    """A word that changes with the images: the pixels of an array; of files the names, lengths and times of change."""
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


class Stored:
    """`answers`, from the store where they are there; the others are computed, and stored once the run has begun.

    Raises:
        VitrailError: the folder is none, or holds something else under the store's name.
    """

    def __init__(self, folder: str | Path, answers: TeacherLogits, facts: Mapping[str, Any]) -> None:
        self._facts = json.dumps(facts, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
        word = hashlib.blake2b(self._facts.encode(errors="surrogateescape"), digest_size=8).hexdigest()
        self.answers = answers
        self.mixes = bool(facts["mixes"])
        self.record = np.dtype([("tag", "<u8"), ("check", "<u8"), ("logits", "<f4", (len(answers.class_names),))])
        self.folder = Path(folder).expanduser() / word
        self._about = self.folder / "store.json"
        if self.folder.parent.is_file():
            raise VitrailError(f"{self.folder.parent} is a file: choose a folder for teacher_outputs")
        if self._about.exists() and self._about.read_text(encoding="utf-8") != self._facts:
            raise VitrailError(f"{self._about} is not what its name says: choose another folder for teacher_outputs")
        self.asked = self.replayed = 0  # views
        self._writes = False
        self._turn_to(-1)

    @property
    def line(self) -> str:
        """Where the outputs are, and how many there are already."""
        size = self.record.itemsize
        count = sum(path.stat().st_size // size for path in self.folder.glob("epoch-*.bin"))
        there = f"{count:,} are there, and are not computed again" if count else "none are there yet"
        return f"outputs {self.folder}: {there}"

    def begin(self) -> None:
        """Store what is computed from now on: before, a run tries out steps, whose images may be none of its own.

        Raises:
            VitrailError: the folder cannot be written.
        """
        if not self._about.exists():
            atomic_write_text(self._about, self._facts)
        self._writes = True
        self._turn_to(-1)

    def __call__(self, view: View) -> Tensor:
        if view.epoch != self._epoch:
            self._turn_to(view.epoch)
        tags = self._tags_of(view)
        places = np.searchsorted(self._tags, tags).clip(max=len(self._tags) - 1)
        found = self._tags[places] == tags
        self.replayed += int(found.sum())
        self.asked += int((~found).sum())
        if found.all():
            return torch.from_numpy(self._stored(places)).to(view.images.device)
        answer = self.answers(view)
        logits = answer.cpu().numpy()
        if self._writes:
            self._append(tags[~found], logits[~found])
        if not found.any():
            return answer
        # What is stored counts, should the device round otherwise today.
        logits = np.where(found[:, None], self._stored(places), logits)
        return torch.from_numpy(logits).to(answer.device)

    def _tags_of(self, view: View) -> Words:
        """A tag for each view. The partner of a mixed image is one of its batch."""
        tags = mix(view.keys.numpy().astype(np.uint64) + _GOLDEN)
        if self.mixes:
            tags = mix(tags + (tags * _weights(len(tags))).sum(dtype=np.uint64))
        return np.maximum(tags, np.uint64(1))  # 0 stands for none

    def _turn_to(self, epoch: int) -> None:
        """Find what is stored of an epoch: sorted tags, and for each the file and the record in it."""
        self._epoch = epoch
        self._path: Path | None = None  # where this epoch's records go
        paths = sorted(self.folder.glob(f"epoch-{epoch:05d}-*.bin"))
        self._parts: list[Any] = [part for path in paths if len(part := self._open(path))]
        tags, where = [np.zeros(1, np.uint64)], [np.zeros((1, 2), np.int64)]
        for number, part in enumerate(self._parts):
            rows = np.flatnonzero(np.concatenate([_whole(part[i : i + _CHUNK]) for i in range(0, len(part), _CHUNK)]))
            tags.append(part["tag"][rows])
            where.append(np.stack([np.full(len(rows), number), rows], axis=1))
        self._tags, first = np.unique(np.concatenate(tags), return_index=True)
        self._where = np.concatenate(where)[first]

    def _open(self, path: Path) -> Any:
        """The records of a file, mapped into memory and not read yet; the half of one at its end is left out."""
        count = path.stat().st_size // self.record.itemsize
        return np.memmap(path, self.record, "r", shape=(count,)) if count else np.empty(0, self.record)

    def _stored(self, places: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
        """Logits B K of the tags at these places; zeros where the place is none."""
        logits = np.zeros((len(places), *self.record["logits"].shape), np.float32)
        known = self._tags[places] != 0
        for number, part in enumerate(self._parts):
            mine = known & (self._where[places, 0] == number)
            logits[mine] = part["logits"][self._where[places[mine], 1]]
        return logits

    def _append(self, tags: Words, logits: npt.NDArray[np.float32]) -> None:
        records = np.empty(len(tags), self.record)
        records["tag"], records["logits"], records["check"] = tags, logits, _checks(tags, logits)
        path = self._path or self.folder / f"epoch-{self._epoch:05d}-{secrets.token_hex(4)}.bin"
        self._path = None  # should this fail, it may end in half a record: whoever goes on does so in another file
        with disk_errors(path), FileIO(path, "a") as file:
            rest = memoryview(records.tobytes())
            while rest:
                rest = rest[file.write(rest) :]
        self._path = path


def _weights(count: int) -> Words:
    """Odd factors, one a place: what is summed with them depends on the order."""
    return mix(np.arange(1, count + 1, dtype=np.uint64)) | np.uint64(1)


def _whole(records: Any) -> npt.NDArray[np.bool_]:
    """Which records are as they were written."""
    whole: npt.NDArray[np.bool_] = records["check"] == _checks(records["tag"], records["logits"])
    return whole


def _checks(tags: Words, logits: npt.NDArray[np.float32]) -> Words:
    """A check for each record: K bits of logits and the tag, mixed."""
    bits = np.ascontiguousarray(logits, np.float32).view(np.uint32).astype(np.uint64)
    return mix(mix(tags + _GOLDEN) + (bits * _weights(bits.shape[1])).sum(axis=1, dtype=np.uint64))
