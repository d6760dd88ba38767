"""Kill a run with SIGKILL at some moments, take it up again each time, and compare the end with the run nobody killed.

    python scripts/kill_and_resume.py 20
    python scripts/kill_and_resume.py 20 --processes 2
    python scripts/kill_and_resume.py 8 --processes 2 --resume-with 1 drop=0

The moments come in turn: any (after a random time), within a step, in a validation, and in the writing of a checkpoint
(at an fsync, a rename, or the removal of an older one). What is compared, bit for bit: the tensors of the last
checkpoint (weights, average, optimiser, best weights), the model's file, and metrics.jsonl and summary.json without the
clock's figures. Other settings are given as key=value. It takes some seconds a moment.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vitrail.data.catalog import open_dataset
from vitrail.evaluation.metrics import Recorder
from vitrail.training.checkpoints.checkpoint import load_checkpoint
from vitrail.training.config.schema import parse_overrides
from vitrail.training.engine.trainer import Trainer
from vitrail.training.run import train
from vitrail.training.verify_resume import differences, timeless

KEYS = {
    "epochs": 1.5,
    "batch_size": 64,
    "ema": 0.9,
    "mixup": 0.2,
    "drop": 0.1,
    "erase": 0.2,
    "checkpoint_every": 5,
    "eval_batch_size": 48,
    "amp": "off",
}
MOMENTS = ("any", "step", "validation", "checkpoint")
PLACES: dict[str, list[tuple[Any, str]]] = {
    "step": [(Trainer, "_optimizer_step"), (Trainer, "_accumulate_gradients")],
    "validation": [(Recorder, "add")],
    "checkpoint": [(os, "fsync"), (Path, "rename"), (shutil, "rmtree")],
}


def kill_in_call(owner: Any, name: str, number: int) -> None:
    """Have this process killed as it enters the given call, from 1, of a function."""
    original, calls = getattr(owner, name), []

    def deadly(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, deadly)


def start(work: Callable[[], Any], processes: int, folder: Path) -> list[int]:
    """Fork so many processes, which know of one another as under torchrun; what they print goes to a file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        if child := os.fork():
            started.append(child)
            continue
        distributed = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in {**distributed, "MASTER_PORT": port}.items()})
        with (folder / "said.txt").open("a") as said:
            os.dup2(said.fileno(), 2)
        status = 1
        try:
            work()
            status = 0
        except Exception:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)
    return started


def wait(started: list[int]) -> list[int]:
    """How each process ended: its status, or minus a signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in started]


def one_moment(kind: str, draw: random.Random, whole: float, folder: Path, run: Callable[[], Any], ranks: int) -> str:
    """Start a run that is killed at a moment of this kind; where that was."""
    if kind == "any":
        started, delay = start(run, ranks, folder), draw.uniform(0.05, 0.95) * whole
        time.sleep(delay)
        where = f"after {delay:.2f} s"
    else:
        (owner, name), number = (
            draw.choice(PLACES[kind]),
            draw.randint(1, {"step": 25, "validation": 6, "checkpoint": 12}[kind]),
        )

        def doomed() -> None:
            if os.environ["RANK"] == "0":
                kill_in_call(owner, name, number)
            run()

        started = start(doomed, ranks, folder)
        where = f"in call {number} of {getattr(owner, '__name__', owner)}.{name}"
    if kind == "any":
        os.kill(draw.choice(started), signal.SIGKILL)
    ended = wait(started)
    return where if -signal.SIGKILL in ended else ""


def compare(one: Path, two: Path) -> tuple[list[str], float]:
    """Names of what differs between two finished runs, and by how much at most."""
    first, second = load_checkpoint(one / "checkpoint"), load_checkpoint(two / "checkpoint")
    assert first is not None
    assert second is not None
    names, largest = differences(first, second)
    for name in ("metrics.jsonl", "summary.json"):
        values = [timeless(_read(folder / name)) for folder in (one, two)]
        names += [name] if values[0] != values[1] else []
    model = [(folder / "model" / "model.safetensors").read_bytes() for folder in (one, two)]
    return names + (["model"] if model[0] != model[1] else []), largest


def _read(path: Path) -> Any:
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("moments", type=int, nargs="?", default=20)
    parser.add_argument("settings", nargs="*", help="key=value")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--resume-with", type=int, help="processes that take the run up again; by default as many")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    open_dataset("digits")  # what every process would import anew
    keys = {**KEYS, "device": "cpu", **parse_overrides(asked.settings)}
    ranks, again = asked.processes, asked.resume_with or asked.processes
    draw, same, largest = random.Random(asked.seed), 0, 0.0
    with tempfile.TemporaryDirectory(prefix="vitrail-kill-") as name:
        folder = Path(name)
        begin = time.perf_counter()
        if any(wait(start(lambda: train("digits", out=folder / "whole", progress=False, **keys), ranks, folder))):
            sys.exit((folder / "said.txt").read_text())
        whole = time.perf_counter() - begin
        for number in range(1, asked.moments + 1):
            kind, out, where = MOMENTS[(number - 1) % len(MOMENTS)], folder / f"run-{number}", ""
            while not where or (out / "summary.json").exists():  # it may have ended before its moment came
                shutil.rmtree(out, ignore_errors=True)
                where = one_moment(
                    kind, draw, whole, folder, lambda out=out: train("digits", out=out, progress=False, **keys), ranks
                )
            found = load_checkpoint(out / "checkpoint") if (out / "config.toml").exists() else None
            goes_on = {"resume": out} if (out / "config.toml").exists() else {"out": out, **keys}
            data = None if "resume" in goes_on else "digits"
            ended = wait(start(lambda data=data, how=goes_on: train(data, progress=False, **how), again, folder))
            if any(ended):
                sys.exit((folder / "said.txt").read_text())
            names, by = compare(folder / "whole", out)
            same, largest = same + (not names), max(largest, by)
            step = found.record["state"]["steps"] if found else 0
            verdict = "the same" if not names else f"{len(names)} differ, by up to {by:.2g}: {', '.join(names[:3])}"
            print(f"{number:3}  {kind:10}  killed {where}, taken up at step {step}: {verdict}", flush=True)
    print(f"{same} of {asked.moments} bit-identical" + (f", largest difference {largest:.2g}" if largest else ""))
    sys.exit(same != asked.moments and again == ranks)


if __name__ == "__main__":
    main()
