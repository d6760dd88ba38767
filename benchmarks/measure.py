"""How the benchmarks measure: two ways to do the same work, in turn in one process, medians and ratios.

Rounds alternate A B, B A, A B, ... so that a machine whose speed drifts does not favour either. What comes before the
rounds (imports, building, warm-up) is not counted.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Comparison:
    """Seconds of one call of each, and how many times faster the first is (median of the rounds' own ratios)."""

    name: str
    ours: str
    theirs: str
    ours_median: float
    theirs_median: float
    ratio_median: float
    ratio_min: float
    ratio_max: float
    rounds: int
    note: str = ""

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.ours} {1e3 * self.ours_median:.2f} ms, "
            f"{self.theirs} {1e3 * self.theirs_median:.2f} ms, "
            f"{self.ratio_median:.2f}x as fast ({self.ratio_min:.2f} to {self.ratio_max:.2f}, {self.rounds} rounds)"
        )


def interleave(
    name: str,
    ours: tuple[str, Callable[[], Any]],
    theirs: tuple[str, Callable[[], Any]],
    *,
    rounds: int = 15,
    calls: int = 1,
    warmup: int = 2,
    note: str = "",
) -> Comparison:
    """Time `calls` calls of each in every round, after `warmup` rounds that are not counted."""
    pairs = []
    for number in range(warmup + rounds):
        order = (ours, theirs) if number % 2 == 0 else (theirs, ours)
        took = {label: _seconds(call, calls) for label, call in order}
        if number >= warmup:
            pairs.append((took[ours[0]], took[theirs[0]]))
    ratios = [b / a for a, b in pairs]
    return Comparison(
        name=name,
        ours=ours[0],
        theirs=theirs[0],
        ours_median=statistics.median(a for a, _ in pairs),
        theirs_median=statistics.median(b for _, b in pairs),
        ratio_median=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        rounds=rounds,
        note=note,
    )


def _seconds(call: Callable[[], Any], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def synchronise(images: Any) -> None:
    """Wait until the device of the images has finished its work."""
    if images.is_cuda:
        import torch

        torch.cuda.synchronize()


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, and standard deviation over seeds (None of fewer than two)."""
    return {
        "mean": round(statistics.mean(values), 3) if values else None,
        "std": round(statistics.stdev(values), 3) if len(values) > 1 else None,
        "n": len(values),
    }


def hardware() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    from vitrail.utils.torch_compat import cpu_bf16

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bf16": cpu_bf16(),
    }


def publish(file: str, comparisons: list[Comparison], **more: Any) -> None:
    """Print the figures and write them, with the hardware and the versions, under `benchmarks/results`."""
    for comparison in comparisons:
        print(comparison, flush=True)
    results = [asdict(comparison) for comparison in comparisons]
    write(file, peers=_versions("timm", "torchvision", "transformers"), results=results, **more)


def write(file: str, command: str = "", **record: Any) -> None:
    """Write `benchmarks/results/FILE.json`: the command, by default without arguments, the hardware, and the record."""
    RESULTS.mkdir(exist_ok=True)
    record = {"command": command or f"python -m benchmarks.{file}", "hardware": hardware(), **record}
    (RESULTS / f"{file}.json").write_text(json.dumps(record, indent=2) + "\n")


def _versions(*names: str) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
