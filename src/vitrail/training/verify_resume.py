"""`vitrail train DATA ... --verify-resume`: whether a run that is killed and resumed ends in the same weights.

Three processes train with the given settings in a temporary folder: one for some seconds without interruption; one that
is killed (SIGKILL) within an epoch, after a checkpoint; and one that resumes it and stops at the step where the first
one stopped. Then all tensors are compared bit for bit: weights, moving average, optimiser, best weights.
"""

import os
import signal
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vitrail.data.dataset import Data
from vitrail.errors import ConfigError, DistributedError, RunError
from vitrail.training.config.recipes import find_recipe
from vitrail.training.config.schema import KEYS, read_config
from vitrail.training.config.stamp import to_run_toml
from vitrail.training.config.threads import ThreadPlan
from vitrail.training.engine.state import TrainState
from vitrail.training.engine.trainer import Trainer
from vitrail.training.monitoring.progress import Reporter
from vitrail.training.resume_harness import AtCall, Job, differences, read_checkpoint, run_job

SECONDS = 12.0  # of training in the first process; the others take less
_MIN_STEPS = 4
_EPOCHS = 2.5  # after which the first process stops early: several validations, and the middle of an epoch
_AFTER_STEP = "vitrail.training.monitoring.progress:Reporter.step"


@dataclass(frozen=True)
class Verdict:
    """The result. differing: names of what differs, `part: name`; largest: the largest difference.

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
        """Whether both runs are equal bit for bit."""
        return not self.differing

    def __str__(self) -> str:
        how = f"killed after step {self.killed}, resumed at step {self.saved}, {self.steps} steps in all"
        if self.same:
            return (
                f"verified: all {self.tensors:,} tensors ({self.numbers:,} numbers) of weights, average and optimiser "
                f"are equal bit for bit; {how}; {self.seconds:.0f} s"
            )
        few = ", ".join(self.differing[:4]) + (", ..." if len(self.differing) > 4 else "")
        return (
            f"not verified: {len(self.differing):,} of {self.tensors:,} tensors and figures differ, by up to "
            f"{self.largest:.3g} ({few}); {how}: something in this setup is not deterministic"
        )


def verify_resume(
    data: Data | None = None, *, progress: bool = True, seconds: float = SECONDS, **arguments: Any
) -> Verdict:
    """Train without interruption, and killed and resumed, and compare. Takes the arguments of `train`.

    It takes about a minute, or longer if a step does, and writes nothing outside of a temporary folder.
    seconds: of training in the first process.

    Raises:
        VitrailError: this cannot be verified: several processes, a budget, a probe, a model that cannot be pickled.
    """
    objects = _check(arguments)
    log, start = Reporter(progress).log, time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vitrail-verify-") as name:
        uninterrupted, resumed = Path(name) / "uninterrupted", Path(name) / "resumed"
        writing = {"checkpoint_every": 0, "checkpoint_minutes": 0.0, "track": "none"}
        if "teacher_outputs" in _settings(arguments):
            writing["teacher_outputs"] = str(Path(name) / "teacher")
        _run(
            Job(
                data,
                {**arguments, **writing, "out": uninterrupted},
                AtCall(_AFTER_STEP, _TrainedEnough(seconds)),
                signal.SIGTERM,
            )
        )
        state = _state(uninterrupted)
        save_at, kill_at = kill_plan(state.steps, _steps_per_epoch(state) or state.steps + 1)
        log(f"{state.steps} steps without interruption; now again, killed after step {kill_at}")
        resumed.mkdir()
        config = read_config(uninterrupted / "config.toml")
        threads = str(ThreadPlan.parse(config.machine.threads).fixed)  # as in the first run, whatever the load is now
        config = config.updated({"checkpoint_every": save_at, "threads": threads})
        (resumed / "config.toml").write_text(to_run_toml(config, KEYS), encoding="utf-8")
        again = {**objects, "resume": resumed}
        _run(Job(data, again, AtCall(_AFTER_STEP, partial(_at_step, kill_at))), killed=True)
        log(f"killed; resuming from the checkpoint of step {_state(resumed).steps}")
        again["checkpoint_every"] = 0
        _run(Job(data, again, AtCall(_AFTER_STEP, partial(_at_step, state.steps)), signal.SIGTERM))
        first, second = read_checkpoint(uninterrupted), read_checkpoint(resumed)
    names, largest = differences(first, second)
    tensors = [tensor for part in first.tensors.values() for tensor in part.values()]
    numbers = sum(tensor.numel() for tensor in tensors)
    taken = time.perf_counter() - start
    return Verdict(state.steps, save_at, kill_at, len(tensors), numbers, tuple(names), largest, taken)


def kill_plan(steps: int, steps_per_epoch: int) -> tuple[int, int]:
    """After which step of a run to save, and after which to kill: both before its end, the first within an epoch.

    Raises:
        RunError: the run is too short.
    """
    if steps < _MIN_STEPS - 1:
        raise RunError(f"a run of {steps} steps is too short to be killed and resumed: use more epochs")
    saved = max(1, round(0.4 * steps))
    if saved % steps_per_epoch == 0 and steps_per_epoch > 1:
        saved -= 1 if saved > 1 else -1
    return saved, min(max(saved + 1, (saved + steps) // 2), steps - 1, 2 * saved)  # before the next checkpoint


def _check(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse what cannot be verified; returns the arguments that a config.toml does not store."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DistributedError("--verify-resume needs a single process: leave out torchrun")
    settings = _settings(arguments)
    for key in ("resume", "show_batch", "probe"):
        if arguments.get(key) or settings.get(key):
            raise ConfigError(f"--verify-resume trains a new run: leave out {key}")
    if settings.get("budget"):
        raise ConfigError("with a budget, no two runs have the same steps: use epochs instead")
    return {
        key: arguments[key] for key in ("model", "teacher") if not isinstance(arguments.get(key), str | Path | None)
    }


def _settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the recipe, if one is named, and those given."""
    recipe = find_recipe(arguments["recipe"]).settings if arguments.get("recipe") else {}
    return {**recipe, **{key: value for key, value in arguments.items() if value is not None}}


def _run(job: Job, *, killed: bool = False) -> None:
    result = run_job(job)
    if result.killed if killed else not result.failed:
        return
    lines = result.errors.strip().splitlines()
    raise RunError((lines[-1] if lines else f"status {result.statuses[0]}").removeprefix("error: "))


def _state(run: Path) -> TrainState:
    return TrainState(**read_checkpoint(run).record["state"])


def _steps_per_epoch(state: TrainState) -> int:
    """0 during the first epoch."""
    return (state.steps - state.step) // state.epoch if state.epoch else 0


def _at_step(steps: int, _: Reporter, trainer: Trainer) -> bool:
    """Whether a run has done this many steps."""
    return trainer.state.steps == steps


@dataclass
class _TrainedEnough:
    """Whether a run has taken enough seconds and steps, and is within an epoch."""

    seconds: float
    started: float = 0.0

    def __call__(self, _: Reporter, trainer: Trainer) -> bool:
        self.started = self.started or time.perf_counter()
        state, per_epoch = trainer.state, _steps_per_epoch(trainer.state)
        late = state.steps >= _MIN_STEPS and time.perf_counter() - self.started >= self.seconds
        if not per_epoch:
            return late
        return state.steps >= max(_MIN_STEPS, round(_EPOCHS * per_epoch)) or (
            late and (per_epoch == 1 or state.step < per_epoch)
        )
