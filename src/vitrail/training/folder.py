"""A run's folder: what stands in it, who may write to it, and what is refused.

config.toml     everything that decides the run
metrics.jsonl   a line an epoch
summary.json    the figures; where this stands, the run is finished
checkpoint/     to go on from
model/          the best model, as a model folder
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vitrail.errors import VitrailError
from vitrail.files import atomic_write_text, disk_errors, exclusive, remove_leftovers

RUNS = Path("runs")  # where runs go that nobody placed


class RunFolder:
    """The names in a run's folder, and the writing of its small files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.checkpoint = path / "checkpoint"
        self.model = path / "model"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder against other runs, and clear away what a killed one left half-written.

        Raises:
            VitrailError: another run is writing to it.
        """
        with exclusive(
            self.path / ".lock", f"another run is writing to {self.path}: wait for it, or choose another --out"
        ):
            remove_leftovers(self.path)
            remove_leftovers(self.checkpoint)
            yield

    def write_metrics(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """All epochs' lines, in place of what stood there."""
        atomic_write_text(self.metrics, "".join(_line(line) for line in lines))

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        """One more epoch's line. Not synced to the disk: a resumed run writes all of them again."""
        with disk_errors(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(_line(line))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """The last thing that a run writes."""
        atomic_write_text(self.summary, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def new_run(out: str | Path | None, data: str, model: str) -> RunFolder:
    """An empty folder for a run: `out`, or runs/<data>-<model> with a number where that is taken.

    Raises:
        VitrailError: `out` has something in it already, or cannot be made.
    """
    if out is None:
        return _first_free(f"{_slug(Path(data).name or 'data')}-{_slug(model)}")
    folder = RunFolder(Path(out).expanduser())
    check_free(folder)
    with disk_errors(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
    return folder


def check_free(folder: RunFolder) -> None:
    """Raise VitrailError unless a new run may be written here."""
    path = folder.path
    if path.exists() and not path.is_dir():
        raise VitrailError(f"{path} is a file: choose a folder for --out")
    if not path.exists() or all(_counts_for_nothing(entry.name) for entry in path.iterdir()):
        return
    if folder.summary.exists():
        raise VitrailError(f"{path} holds a finished run: choose another --out, or remove it first")
    if folder.config.exists():
        raise VitrailError(
            f"{path} holds a run that is not finished: go on with --resume {path}, or choose another --out"
        )
    raise VitrailError(f"{path} is not empty and holds no run: choose another --out")


def _counts_for_nothing(name: str) -> bool:
    """Whether this is what a run leaves that was killed before it had written anything whole."""
    return name == ".lock" or (name.startswith(".") and name.endswith(".tmp"))


def _first_free(name: str) -> RunFolder:
    number = 1
    while True:
        folder = RunFolder(RUNS / (name if number == 1 else f"{name}-{number}"))
        with disk_errors(folder.path):
            try:
                folder.path.mkdir(parents=True)
            except FileExistsError:
                number += 1
            else:
                return folder


def old_run(path: str | Path) -> RunFolder:
    """The folder of a run that is not finished.

    Raises:
        VitrailError: there is none, or it is finished.
    """
    folder = RunFolder(Path(path).expanduser())
    if not folder.config.is_file():
        raise VitrailError(f"{folder.path} holds no run to go on with: {folder.config.name} is not there")
    if folder.summary.exists():
        raise VitrailError(f"the run in {folder.path} is finished: its model is in {folder.model}")
    return folder


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "run"
