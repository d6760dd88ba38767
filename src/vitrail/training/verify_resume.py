"""`vitrail train DATA ... --verify-resume`: does a run that is killed and taken up again end in the same weights, here?

Three processes train what was asked for, in a temporary folder: one for some seconds without a stop; one that is killed
(SIGKILL) in the middle of an epoch, after a checkpoint; and one that goes on from there to the step where the first one
ended. Then every tensor is compared, bit for bit: weights, average, optimiser, best weights.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.data.dataset import Dataset
from vitrail.errors import VitrailError
from vitrail.training.checkpoints.checkpoint import Checkpoint, load_checkpoint
from vitrail.training.checkpoints.run_folder import RunFolder
from vitrail.training.config.schema import read_config, to_toml
from vitrail.training.engine.interrupt import Stopped
from vitrail.training.engine.state import TrainState
from vitrail.training.engine.trainer import Trainer
from vitrail.training.monitoring.progress import Reporter
from vitrail.training.run import Ask, fresh_setup, make_ask, make_session
from vitrail.training.setup import Setup, reopen
from vitrail.utils.device import cpu_threads, pick_device
from vitrail.utils.distributed import SINGLE_PROCESS

SECONDS = 12.0  # of training in the first process; the others have less to do
_FEWEST = 4  # steps in which a run can be stopped, and go on
_EPOCHS = 2.5  # that are enough: several validations, and the middle of an epoch
_CLOCKS = ("seconds", "images_per_second", "waiting_for_data")  # how the names of the clock's figures end


@dataclass(frozen=True)
class HeadDecision:
    """What came out. differing: names of what is not the same, `part: name`; largest: the largest difference there.

    steps: of the run; killed: steps that the killed process had done; saved: steps at its last checkpoint.
    """

    steps: int
    saved: int
    killed: int
    tensors: int
    numbers: int
    differing: tuple[str, ...]
    largest: float
    seconds: float

    @property
    def same(self) -> bool:
        """Whether the promise holds."""
        return not self.differing

    def __str__(self) -> str:
        how = f"killed after step {self.killed}, taken up at step {self.saved}, {self.steps} steps in all"
        if self.same:
            return (
                f"verified: all {self.tensors:,} tensors ({self.numbers:,} numbers) of weights, average and optimiser "
                f"are the same bit for bit; {how}; {self.seconds:.0f} s"
            )
        few = ", ".join(self.differing[:4]) + (", ..." if len(self.differing) > 4 else "")
        return (
            f"not verified: {len(self.differing):,} of {self.tensors:,} tensors and figures differ, by up to "
            f"{self.largest:.3g} ({few}); {how}: something in this setup draws or computes anew each time"
        )


def verify_resume(
    data: str | Path | Dataset | None = None, *, progress: bool = True, seconds: float = SECONDS, **asked: Any
) -> HeadDecision:
    """Train without a stop, and killed and taken up again, and compare. Takes the arguments of `train`.

    It takes about a minute, or longer where a step does. Nothing is written to the run's own place.
    seconds: of training in the first process.

    Raises:
        VitrailError: it cannot be tried: several processes, a budget, a probe, a model that cannot be passed on.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise VitrailError("--verify-resume starts processes of its own: leave out torchrun")
    ask, say = make_ask(data, **asked), Reporter(progress).say
    if ask.resume is not None or ask.show_batch is not None or ask.given.model.probe:
        raise VitrailError("--verify-resume tries a new run: leave out --resume, --show-batch and --probe")
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vitrail-verify-") as name:
        folder = Path(name)
        _write_job(ask, folder)
        _child(folder, "whole", f"{seconds:g}")
        state = _place(folder / "whole")
        saved, killed = kill_plan(state.steps, _steps_per_epoch(folder))
        say(f"{state.steps} steps without a stop; now once more, killed after step {killed}")
        _child(folder, "killed", f"{saved}", f"{killed}", dies=True)
        say(f"killed; going on from the checkpoint of step {_place(folder / 'killed').steps}")
        _child(folder, "resumed", f"{state.steps}")
        whole, resumed = _checkpoint(folder / "whole"), _checkpoint(folder / "killed")
    names, largest = differences(whole, resumed)
    tensors = [tensor for part in whole.tensors.values() for tensor in part.values()]
    numbers = sum(tensor.numel() for tensor in tensors)
    taken = time.perf_counter() - begin
    return HeadDecision(state.steps, saved, killed, len(tensors), numbers, tuple(names), largest, taken)


def kill_plan(steps: int, steps_per_epoch: int) -> tuple[int, int]:
    """After which step of a run to save, and after which to kill: both before its end, the first within an epoch.

    Raises:
        VitrailError: the run is too short for it.
    """
    if steps < _FEWEST - 1:
        raise VitrailError(f"a run of {steps} steps is too short to be stopped and go on: ask for more epochs")
    saved = max(1, round(0.4 * steps))
    if saved % steps_per_epoch == 0 and steps_per_epoch > 1:
        saved -= 1 if saved > 1 else -1
    return saved, min(max(saved + 1, (saved + steps) // 2), steps - 1, 2 * saved)  # before the next checkpoint


def differences(one: Checkpoint, two: Checkpoint) -> tuple[list[str], float]:
    """Names of what differs between two checkpoints, and by how much at most; the clock's figures do not count."""
    names, largest = [], 0.0
    for part in sorted(one.tensors.keys() | two.tensors.keys()):
        mine, theirs = one.tensors.get(part, {}), two.tensors.get(part, {})
        for name in sorted(mine.keys() | theirs.keys()):
            if name in mine and name in theirs and _identical(mine[name], theirs[name]):
                continue
            names.append(f"{part}: {name}")
            if name in mine and name in theirs and mine[name].shape == theirs[name].shape:
                largest = max(largest, float((mine[name].double() - theirs[name].double()).abs().max()))
    figures = {key for key in one.record if timeless(one.record[key]) != timeless(two.record.get(key))}
    return names + [f"figures: {key}" for key in sorted(figures)], largest


def _identical(one: Tensor, two: Tensor) -> bool:
    """Equal in every bit; so minus zero is not zero, and what is not a number may be itself."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, two)))


def timeless(value: Any) -> Any:
    """Plain JSON without what the clock says."""
    if isinstance(value, Mapping):
        return {key: timeless(inner) for key, inner in value.items() if not key.endswith(_CLOCKS)}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def _write_job(ask: Ask, folder: Path) -> None:
    try:
        (folder / "job").write_bytes(pickle.dumps(replace(ask, out=None, command="")))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise VitrailError(f"this model or data cannot be passed to another process: {error}") from None


def _child(folder: Path, kind: str, *numbers: str, dies: bool = False) -> None:
    paths = [path for path in sys.path if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "vitrail.training.verify_resume", str(folder), kind, *numbers]
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    if done.returncode != (-signal.SIGKILL if dies else 0):
        words = done.stderr.decode(errors="replace").strip().splitlines()
        raise VitrailError((words[-1] if words else f"status {done.returncode}").removeprefix("error: "))


def _checkpoint(folder: Path) -> Checkpoint:
    found = load_checkpoint(RunFolder(folder).checkpoint)
    if found is None:
        raise VitrailError("no checkpoint was written")
    return found


def _place(folder: Path) -> TrainState:
    return TrainState(**_checkpoint(folder).record["state"])


def _steps_per_epoch(folder: Path) -> int:
    return int((folder / "steps_per_epoch").read_text())


# --- in the processes that train


class _Stopper(Reporter):
    """Says nothing, and after some step sends its own process a signal."""

    def __init__(self, when: Callable[[Trainer], bool], number: int) -> None:
        super().__init__(False)
        self._when, self._number = when, number

    def step(self, trainer: Trainer) -> None:
        if self._when(trainer):
            os.kill(os.getpid(), self._number)


def _run_child(folder: Path, kind: str, numbers: list[float]) -> None:
    ask: Ask = pickle.loads((folder / "job").read_bytes())
    with torch.random.fork_rng(devices=[]):
        if kind == "whole":
            setup = fresh_setup(ask)
        else:
            setup = reopen(read_config(folder / "whole" / "config.toml"), ask.data, ask.guest)
        setup.teacher = ask.teacher
        if setup.config.schedule.budget is not None:
            raise VitrailError("a budget goes by the clock, so no two such runs are the same: name epochs instead")
        if setup.config.model.probe:
            raise VitrailError("--verify-resume tries training, and not a probe")
        _train(setup, folder, kind, numbers)


def _train(setup: Setup, folder: Path, kind: str, numbers: list[float]) -> None:
    every = int(numbers[0]) if kind == "killed" else 0
    changes: dict[str, Any] = {"checkpoint_every": every, "checkpoint_minutes": 0.0, "track": "none"}
    if setup.config.distill.teacher_outputs is not None:
        changes["teacher_outputs"] = str(folder / "teacher")
    setup.config = setup.config.updated(changes)
    with cpu_threads(setup.config.machine.threads):
        session = make_session(setup, Reporter(False), pick_device(setup.config.machine.device), SINGLE_PROCESS)
        per_epoch = session.loader.steps_per_epoch
        session.reporter = {
            "whole": lambda: _Stopper(_enough(numbers[0], per_epoch), signal.SIGTERM),
            "killed": lambda: _Stopper(lambda trainer: trainer.state.steps == numbers[1], signal.SIGKILL),
            "resumed": lambda: _Stopper(lambda trainer: trainer.state.steps == numbers[0], signal.SIGTERM),
        }[kind]()
        run = RunFolder(folder / ("whole" if kind == "whole" else "killed"))
        run.path.mkdir(exist_ok=True)
        run.write_config(to_toml(session.config))
        (folder / "steps_per_epoch").write_text(str(per_epoch))
        session.enter(run)
        with contextlib.suppress(Stopped):
            session.run()


def _enough(seconds: float, per_epoch: int) -> Callable[[Trainer], bool]:
    """Whether a run has lasted long enough to tell, and stands within an epoch."""
    most = max(_FEWEST, round(_EPOCHS * per_epoch))
    began = time.perf_counter()

    def enough(trainer: Trainer) -> bool:
        state = trainer.state
        late = time.perf_counter() - began >= seconds and state.steps >= _FEWEST
        return state.steps >= most or (late and (per_epoch == 1 or state.step < per_epoch))

    return enough


if __name__ == "__main__":
    try:
        _run_child(Path(sys.argv[1]), sys.argv[2], [float(number) for number in sys.argv[3:]])
    except VitrailError as fault:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
