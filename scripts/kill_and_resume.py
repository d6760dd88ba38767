"""Kill a run with SIGKILL at some moments, resume it each time, and compare the result with an uninterrupted run.

    python scripts/kill_and_resume.py 20
    python scripts/kill_and_resume.py 20 --processes 2
    python scripts/kill_and_resume.py 8 --processes 2 --resume-with 1 drop=0

The moments alternate: any (after a random time), within a step, in a validation, and while a checkpoint is written (at
an fsync, a rename, or the removal of an older one). Compared, bit for bit: the tensors of the last checkpoint (weights,
moving average, optimiser, best weights), the model's file, and metrics.jsonl and summary.json without timings. Other
settings are given as key=value. A moment takes about ten seconds.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail.training.checkpoints.checkpoint import load_checkpoint
from vitrail.training.config.schema import parse_overrides
from vitrail.training.resume_harness import (
    AtCall,
    Job,
    JobResult,
    Trigger,
    differences,
    read_checkpoint,
    run_job,
    without_timings,
)

SETTINGS = {
    "epochs": 1.5,
    "batch_size": 64,
    "ema": 0.9,
    "mixup": 0.2,
    "drop": 0.1,
    "erase": 0.2,
    "checkpoint_every": 5,
    "eval_batch_size": 48,
    "amp": "off",
    "device": "cpu",
    "threads": 1,
}
TRAINER = "vitrail.training.engine.trainer:Trainer"
# For each kind of moment: functions, and the last of their calls that may be chosen.
CALLS: dict[str, tuple[list[str], int]] = {
    "step": ([f"{TRAINER}._optimizer_step", f"{TRAINER}._accumulate_gradients"], 25),
    "validation": (["vitrail.evaluation.metrics:Recorder.add"], 6),
    "checkpoint": (["os:fsync", "pathlib:Path.rename", "shutil:rmtree"], 12),
}
KINDS = ("any", *CALLS)


@dataclass
class NthCall:
    """Whether this is call number `number`, from 1."""

    number: int
    calls: int = 0

    def __call__(self, *_: Any) -> bool:
        self.calls += 1
        return self.calls == self.number


@dataclass
class AfterSeconds:
    """Some time after `train` was called."""

    seconds: float

    def install(self, send: Callable[[], None]) -> None:
        """Start a timer."""
        timer = threading.Timer(self.seconds, send)
        timer.daemon = True
        timer.start()


def choose(kind: str, draw: random.Random, seconds: float, ranks: int) -> tuple[str, Trigger, int]:
    """A moment of this kind: its description, itself, and the rank of the process that is killed."""
    if kind == "any":
        delay = draw.uniform(0.05, 0.95) * seconds
        return f"after {delay:.2f} s", AfterSeconds(delay), draw.randrange(ranks)
    functions, last = CALLS[kind]
    function, number = draw.choice(functions), draw.randint(1, last)
    return f"in call {number} of {function.partition(':')[2]}", AtCall(function, NthCall(number)), 0


def finish(ending: JobResult) -> JobResult:
    if ending.failed:
        sys.exit(ending.errors)
    return ending


def differences_of_runs(one: Path, two: Path) -> tuple[list[str], float]:
    """As `differences`, of the checkpoints, models, metrics and summaries of two finished runs."""
    names, largest = differences(read_checkpoint(one), read_checkpoint(two))
    for name in ("metrics.jsonl", "summary.json"):
        first, second = (without_timings(_read_json(folder / name)) for folder in (one, two))
        names += [name] if first != second else []
    first, second = ((folder / "model" / "model.safetensors").read_bytes() for folder in (one, two))
    return names + (["model"] if first != second else []), largest


def _read_json(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("moments", type=int, nargs="?", default=20)
    parser.add_argument("settings", nargs="*", help="key=value")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--resume-with", type=int, help="processes of the resumed run; by default as many")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_intermixed_args()
    settings: dict[str, Any] = {**SETTINGS, **parse_overrides(asked.settings)}
    ranks, again = asked.processes, asked.resume_with or asked.processes
    draw, same, largest = random.Random(asked.seed), 0, 0.0
    with tempfile.TemporaryDirectory(prefix="vitrail-kill-") as name:
        folder = Path(name)
        seconds = finish(run_job(Job("digits", {"out": folder / "whole", **settings}), ranks)).seconds
        for number in range(1, asked.moments + 1):
            kind, out = KINDS[(number - 1) % len(KINDS)], folder / f"run-{number}"
            while True:
                shutil.rmtree(out, ignore_errors=True)
                where, moment, rank = choose(kind, draw, seconds, ranks)
                ending = run_job(Job("digits", {"out": out, **settings}, moment, rank=rank), ranks)
                if ending.killed and not (out / "summary.json").exists():  # else it ended before the moment came
                    break
            found = load_checkpoint(out / "checkpoint") if (out / "config.toml").exists() else None
            resumes = (out / "config.toml").exists()
            job = Job(None, {"resume": out}) if resumes else Job("digits", {"out": out, **settings})
            finish(run_job(job, again))
            names, difference = differences_of_runs(folder / "whole", out)
            same, largest = same + (not names), max(largest, difference)
            step = found.record["state"]["steps"] if found else 0
            differ = f"{len(names)} differ, by up to {difference:.2g}: {', '.join(names[:3])}"
            print(
                f"{number:3}  {kind:10}  killed {where}, resumed at step {step}: {differ if names else 'the same'}",
                flush=True,
            )
    print(f"{same} of {asked.moments} bit-identical" + (f", largest difference {largest:.2g}" if largest else ""))
    sys.exit(same != asked.moments and again == ranks)


if __name__ == "__main__":
    import kill_and_resume  # so that the other processes can import the classes above

    kill_and_resume.main()
