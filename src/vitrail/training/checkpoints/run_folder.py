"""A run folder: its files, the lock on it, and which folders a run may use.

config.toml     the resolved config
metrics.jsonl   a line per epoch
summary.json    the final metrics; it exists if and only if the run is finished
checkpoint/     the state to resume from
model/          the best model, as a model folder
sessions.jsonl  a line each time the run was started or resumed: command, time, environment
details.json    per-image results, for the report
report.html     the report
plots/          its plots as PNG files, if matplotlib is installed
SHA256SUMS      checksums of the files above that the report and `vitrail.load` read
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vitrail.errors import RunError
from vitrail.utils.files import (
    SUMS,
    atomic_write_text,
    disk_errors,
    lock_or_raise,
    mismatches,
    remove_leftovers,
    user_path,
    write_checksums,
)

RUNS = Path("runs")  # of runs without --out
_MAX_LINE = 1 << 20  # characters of a line of sessions.jsonl


class RunFolder:
    """The paths in a run folder, and the writing of its small files.

    writes: whether this process locks and writes the folder, which only the main process does.
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
    def lock(self) -> Iterator[None]:
        """Lock the folder, and remove temporary files of a run that was killed.

        Raises:
            RunError: another run is writing to it.
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
        """Write the config, as TOML."""
        if self.writes:
            atomic_write_text(self.config, text)

    def write_json(self, path: Path, values: Mapping[str, Any], indent: int | None = None) -> None:
        """Write the summary, which marks the run as finished, or the details."""
        if self.writes:
            atomic_write_text(path, _json(values, indent) + "\n")

    def reopen(self) -> bool:
        """Make a finished run an unfinished one: its model and checkpoints stay. Returns whether it was finished."""
        if not self.summary.exists():
            return False
        for path in (self.summary, self.path / SUMS, self.details, self.report):  # the mark of a finished run first
            path.unlink(missing_ok=True)
        return True

    def write_metrics(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Replace the metrics of all epochs."""
        if self.writes:
            atomic_write_text(self.metrics, "".join(_json(line) + "\n" for line in lines))

    def write_checksums(self) -> None:
        """List the checksums of a finished run's files."""
        if self.writes:
            write_checksums(self.path, [path.name for path in self._listed() if path.is_file()])

    def check(self) -> None:
        """Raise RunError if a file of a finished run is not as it was written. A run without a list is not checked."""
        if not (self.path / SUMS).is_file():
            return
        names = [path.name for path in self._listed() if path.is_file()]
        if wrong := mismatches(self.path, names):
            raise RunError(f"{self.path / wrong[0]} was changed after the run, or is damaged: its checksum differs")

    def _listed(self) -> tuple[Path, ...]:
        return self.config, self.metrics, self.summary, self.sessions, self.details

    def started_with(self) -> str | None:
        """The version of vitrail that started the run; None if unknown."""
        try:
            with self.sessions.open(encoding="utf-8") as file:
                return str(json.loads(file.readline(_MAX_LINE))["environment"]["vitrail"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None

    def append(self, path: Path, values: Mapping[str, Any]) -> None:
        """Append a line of JSON, to the metrics or sessions. Not synced to the disk."""
        if self.writes:
            with disk_errors(path), path.open("a", encoding="utf-8") as file:
                file.write(_json(values) + "\n")


def _json(values: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON; the bytes of a file name that are not UTF-8 are escaped, and are the same when read back."""
    return json.dumps(values, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def create_run_folder(out: str | Path | None, data: str, model: str) -> RunFolder:
    """Create a folder for a run: `out`, or runs/<data>-<model>, with a number if that exists.

    Raises:
        RunError: `out` is not empty, or is a file.
    """
    if out is None:
        return _create_numbered(f"{_slug(Path(data).name or 'data')}-{_slug(model)}")
    folder = RunFolder(user_path(out))
    check_empty(folder)
    with disk_errors(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
    return folder


def check_empty(folder: RunFolder) -> None:
    """Raise RunError unless a new run may be written here."""
    path = folder.path
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file: choose a folder for --out")
    if not path.exists() or all(_is_temporary(entry.name) for entry in path.iterdir()):
        return
    if folder.summary.exists():
        raise RunError(f"{path} contains a finished run: choose another --out, or remove it first")
    if folder.config.exists():
        raise RunError(f"{path} contains an unfinished run: resume it with --resume {path}, or choose another --out")
    raise RunError(f"{path} is not empty and contains no run: choose another --out")


def _is_temporary(name: str) -> bool:
    """Whether a file may be left by a run that was killed before it wrote its config."""
    return name == ".lock" or (name.startswith(".") and name.endswith(".tmp"))


def _create_numbered(name: str) -> RunFolder:
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


def run_to_resume(path: str | Path, extend: bool = False) -> RunFolder:
    """The folder of a run that can be resumed; with `extend`, also of a finished one.

    Raises:
        RunError: there is no run, or it is finished.
    """
    folder = RunFolder(user_path(path))
    if not folder.config.is_file():
        raise RunError(f"{folder.path} contains no run to resume: it has no {folder.config.name}")
    if folder.summary.exists() and not extend:
        raise RunError(f"the run in {folder.path} is finished: its model is in {folder.model}; more --epochs extend it")
    return folder


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "run"
