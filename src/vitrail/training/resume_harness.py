"""Training runs in separate processes, stopped or killed at a chosen moment, and the comparison of their results.

Used by `--verify-resume` (verify_resume.py) and scripts/kill_and_resume.py. Run as a module it is one of the processes:
it reads a pickled `Job` from the folder that its argument names.
"""

import contextlib
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vitrail.data.dataset import Data
from vitrail.errors import RunError, VitrailError
from vitrail.training.checkpoints.checkpoint import Checkpoint, load_checkpoint
from vitrail.training.checkpoints.run_folder import RunFolder
from vitrail.training.engine.interrupt import Stopped
from vitrail.training.run import train

_TIMINGS = ("seconds", "images_per_second", "waiting_for_data")  # endings of the names of timings


class Trigger(Protocol):
    """When a process sends itself a signal. It is pickled."""

    def install(self, send: Callable[[], None]) -> None:
        """Arrange in this process that `send` is called."""


@dataclass
class AtCall:
    """When a function, "module:Class.name", is called and `due(*args)` is true."""

    function: str
    due: Callable[..., bool]

    def install(self, send: Callable[[], None]) -> None:
        module, _, path = self.function.partition(":")
        *parents, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for parent in parents:
            owner = getattr(owner, parent)
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.due(*args):
                send()
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)


@dataclass(frozen=True)
class Job:
    """Arguments of `train`, and when the process of a rank sends itself a signal."""

    data: Data | None
    arguments: Mapping[str, Any]
    trigger: Trigger | None = None
    signal: int = signal.SIGKILL
    rank: int = 0


@dataclass(frozen=True)
class JobResult:
    """Exit statuses of the processes, negative for a signal; their stderr; seconds that rank 0 trained."""

    statuses: list[int]
    errors: str
    seconds: float

    @property
    def killed(self) -> bool:
        """Whether one of them was killed by SIGKILL."""
        return -signal.SIGKILL in self.statuses

    @property
    def failed(self) -> bool:
        """Whether one of them ended with an error."""
        return any(self.statuses)


def run_job(job: Job, processes: int = 1) -> JobResult:
    """Train in new processes; several are one group, as under torchrun.

    Raises:
        RunError: the arguments cannot be passed to another process.
    """
    with tempfile.TemporaryDirectory(prefix="vitrail-job-") as name, socket.socket() as free:
        folder = Path(name)
        try:
            (folder / "job").write_bytes(pickle.dumps(job))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise RunError(f"this model or data cannot be passed to another process: {error}") from None
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        start = time.perf_counter()
        started = [_start(folder, rank, processes, port) for rank in range(processes)]
        statuses = [process.wait() for process in started]
        seconds = time.perf_counter() - start
        if (folder / "seconds").exists():
            seconds = float((folder / "seconds").read_text())
        return JobResult(statuses, (folder / "errors").read_text(errors="replace"), seconds)


def _start(folder: Path, rank: int, processes: int, port: int) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    if processes > 1:
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        environment |= {name: str(value) for name, value in {**group, "MASTER_PORT": port}.items()}
    command = [sys.executable, "-m", "vitrail.training.resume_harness", str(folder)]
    with (folder / "errors").open("ab") as errors:
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)


def _run_process(folder: Path) -> None:
    """What one of the processes does."""
    job: Job = pickle.loads((folder / "job").read_bytes())
    rank = int(os.environ.get("RANK", "0"))
    if job.trigger and rank == job.rank:
        job.trigger.install(lambda: os.kill(os.getpid(), job.signal))
    start = time.perf_counter()
    with contextlib.suppress(Stopped):
        train(job.data, progress=False, **job.arguments)
    if rank == 0:
        (folder / "seconds").write_text(str(time.perf_counter() - start))


# --- comparison


def read_checkpoint(run: Path) -> Checkpoint:
    """The last checkpoint of a run."""
    found = load_checkpoint(RunFolder(run).checkpoint)
    if found is None:
        raise RunError(f"{run} has no checkpoint")
    return found


def differences(one: Checkpoint, two: Checkpoint) -> tuple[list[str], float]:
    """Names of what differs between two checkpoints, apart from timings, and the largest difference."""
    names, largest = [], 0.0
    for part in sorted(one.tensors.keys() | two.tensors.keys()):
        first, second = one.tensors.get(part, {}), two.tensors.get(part, {})
        for name in sorted(first.keys() | second.keys()):
            if name in first and name in second and _identical(first[name], second[name]):
                continue
            names.append(f"{part}: {name}")
            if name in first and name in second and first[name].shape == second[name].shape:
                largest = max(largest, float((first[name].double() - second[name].double()).abs().max()))
    keys = {key for key in one.record if without_timings(one.record[key]) != without_timings(two.record.get(key))}
    return names + [f"figures: {key}" for key in sorted(keys)], largest


def without_timings(value: Any) -> Any:
    """JSON values without timings."""
    if isinstance(value, Mapping):
        return {key: without_timings(inner) for key, inner in value.items() if not key.endswith(_TIMINGS)}
    return [without_timings(inner) for inner in value] if isinstance(value, list) else value


def _identical(one: Tensor, two: Tensor) -> bool:
    """Equal in every bit: -0.0 differs from 0.0, and NaN equals itself."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, two)))


if __name__ == "__main__":
    try:
        _run_process(Path(sys.argv[1]))
    except VitrailError as fault:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
