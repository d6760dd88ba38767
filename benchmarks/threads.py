"""`vitrail train` while a process is busy on every core: the automatic number of threads against the best by hand.

Each number is tried by hand once; then the best of them and the automatic choice take turns. Each run is a process of
its own, and its time is that of the command: start, trial steps, training and evaluation.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measure import write

SPIN = "while True: pass"


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """One program that computes on each of so many cores."""
    started = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(processes)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def seconds(arguments: Sequence[str], threads: str) -> tuple[float, str]:
    """The time of a run with this setting, and the threads in its config."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "run"
        command = [sys.executable, "-m", "vitrail", "train", *arguments, "--out", str(out), f"threads={threads}"]
        start = time.perf_counter()
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        took = time.perf_counter() - start
        line = next(line for line in (out / "config.toml").read_text().splitlines() if line.startswith("threads"))
        return took, json.loads(line.partition("=")[2].partition("#")[0])


def measured(work: Sequence[str], setting: str, cores: int) -> tuple[float, str]:
    """The seconds of a run beside busy processes, and its threads."""
    with busy(cores):
        took, used = seconds(work, setting)
    print(f"threads={setting}: {took:.1f} s, {used}", flush=True)
    return round(took, 2), used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=20)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    work = ["digits", "--epochs", f"{arguments.epochs:g}"]
    once = {str(number): measured(work, str(number), cores)[0] for number in range(1, cores + 1)}
    best = min(once, key=lambda setting: once[setting])
    pairs, chosen = [], []
    for number in range(arguments.rounds):
        order = (best, "auto") if number % 2 else ("auto", best)
        took = {setting: measured(work, setting, cores) for setting in order}
        pairs.append((took["auto"][0], took[best][0]))
        chosen.append(took["auto"][1])
    ratios = [auto / by_hand for auto, by_hand in pairs]
    print(f"auto / threads={best}: {statistics.median(ratios):.3f}")
    write(
        "threads",
        " ".join(["python -m benchmarks.threads", *sys.argv[1:]]),
        work=f"vitrail train {' '.join(work)}",
        busy=f"{cores} other processes that compute without end",
        seconds_by_hand=once,
        best_by_hand=best,
        seconds_auto_and_best=pairs,
        chosen=chosen,
        ratio_median=round(statistics.median(ratios), 3),
        ratio_min=round(min(ratios), 3),
        ratio_max=round(max(ratios), 3),
    )


if __name__ == "__main__":
    main()
