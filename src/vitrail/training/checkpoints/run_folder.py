"""A run's folder: what stands in it, who may write to it, and what is refused.

config.toml     everything that decides the run
metrics.jsonl   a line an epoch
summary.json    the figures; where this stands, the run is finished
checkpoint/     to go on from
model/          the best model, as a model folder
sessions.jsonl  a line each time the run was begun or taken up again: its command, when, where
details.json    of single images, for the report
report.html     all of this for people, in one file
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vitrail.errors import RunError, VitrailError
from vitrail.utils.files import atomic_write_text, disk_errors, lock_or_raise, remove_leftovers

RUNS = Path("runs")  # where runs go that nobody placed


class RunFolder:
    """The names in a run's folder, and the writing of its small files.

    writes: False in all processes of a run but the first: nothing is held or written then.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.checkpoint = path / "checkpoint"
        self.model = path / "model"
        self.sessions = path / "sessions.jsonl"
        self.details = path / "details.json"
        self.report = path / "report.html"
        self.trackers = path / "trackers.json"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder against other runs, and clear away what a killed one left half-written.

        Raises:
            VitrailError: another run is writing to it.
        """
        if not self.writes:
            yield
            return
        busy = RunError(f"another run is writing to {self.path}: wait for it, or choose another --out")
        with lock_or_raise(self.path / ".lock", busy):
            remove_leftovers(self.path)
            remove_leftovers(self.checkpoint)
            yield

    def write_config(self, text: str) -> None:
        """What decides the run, as TOML."""
        if self.writes:
            atomic_write_text(self.config, text)

    def write_metrics(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """All epochs' lines, in place of what stood there."""
        if self.writes:
            atomic_write_text(self.metrics, "".join(_line(line) for line in lines))

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        """One more epoch's line. Not synced to the disk: a resumed run writes all of them again."""
        if self.writes:
            _append(self.metrics, line)

    def add_session(self, line: Mapping[str, Any]) -> None:
        """One more session's line."""
        if self.writes:
            _append(self.sessions, line)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """With this the run is finished; only the report comes after it."""
        atomic_write_text(self.summary, _json(summary, indent=2) + "\n")

    def write_details(self, details: Mapping[str, Any]) -> None:
        """What the report tells beside the summary."""
        atomic_write_text(self.details, _json(details) + "\n")


def _append(path: Path, values: Mapping[str, Any]) -> None:
    with disk_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(_line(values))


def _line(values: Mapping[str, Any]) -> str:
    return _json(values) + "\n"


def _json(values: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON. A file's name need not be text: what is none of it is written as JSON's own escape, and reads back as it
    was."""
    return json.dumps(values, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


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
