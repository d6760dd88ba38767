"""`vitrail train` while another process is busy on every core: the automatic number of threads against each by hand.

Each run is a process of its own, and those of a round come one after the other. Its time is that of the command: start,
trial steps, training and evaluation.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=20)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    work = ["digits", "--epochs", f"{arguments.epochs:g}"]
    found: dict[str, list[float]] = {str(number): [] for number in range(1, cores + 1)} | {"auto": []}
    chosen = []
    for _ in range(arguments.rounds):
        for setting, times in found.items():
            with busy(cores):
                took, used = seconds(work, setting)
            times.append(round(took, 2))
            print(f"threads={setting}: {took:.1f} s, {used}", flush=True)
            chosen += [used] if setting == "auto" else []
    medians = {setting: statistics.median(times) for setting, times in found.items()}
    ratio = medians["auto"] / min(value for setting, value in medians.items() if setting != "auto")
    print(f"auto / best by hand: {ratio:.3f}")
    write(
        "threads",
        " ".join(["python -m benchmarks.threads", *sys.argv[1:]]),
        work=f"vitrail train {' '.join(work)}",
        busy=f"{cores} other processes that compute without end",
        seconds=found,
        median_seconds=medians,
        chosen=chosen,
        auto_over_best_by_hand=round(ratio, 3),
    )


if __name__ == "__main__":
    main()
