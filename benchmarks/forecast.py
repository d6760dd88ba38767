"""The cost that `vitrail doctor` forecasts, against the training itself: time of an epoch and peak memory.

    python -m benchmarks.forecast --photos FOLDER [--rounds 3]

FOLDER: class folders of photographs, of which `COUNT` a class are used. Forecast and training run in turn, each in a
process of its own, so that a busy machine favours neither; seconds are compared in each round, and memory at last.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import write

COUNT = 213  # photographs of each class
EPOCHS = 2
CONFIGS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("vit_nano_patch2_8", "digits", {}),
    ("resnet20_32", "digits", {"batch_size": 128}),
    ("vit_small_patch8_64", "photographs", {"batch_size": 128}),
    ("swin_tiny_patch4_window7_224", "photographs", {"img_size": 56, "batch_size": 32}),
    ("vit_tiny_patch16_224", "photographs", {"img_size": 128, "batch_size": 64}),
)
_FORECAST = """
from vitrail.data.catalog import open_dataset
from vitrail.diagnosis.cost import forecast, plan
found = forecast(plan(open_dataset(data), settings))
result = {"seconds": found["epoch_seconds"], "peak": found["peak_bytes"]}
"""
_TRAINING = """
import tempfile
from pathlib import Path
from vitrail.training.run import train
with tempfile.TemporaryDirectory() as folder:
    report = train(data, out=Path(folder, "run"), progress=False, **settings).report
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
result = {"seconds": report["seconds"] / report["epochs"], "peak": 1024 * int(peak.split()[1])}
"""


def alone(code: str, data: str, settings: dict[str, Any]) -> dict[str, float]:
    """The result of `code` in a process of its own."""
    program = f"import json, sys\ndata, settings = json.loads(sys.argv[1])\n{code}\nprint(json.dumps(result))"
    command = [sys.executable, "-c", program, json.dumps([data, settings])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(model: str, data: str, settings: dict[str, Any], rounds: int) -> dict[str, Any]:
    settings = {**settings, "model": model, "epochs": EPOCHS, "cache": "off"}
    foreseen, real = [], []
    for number in range(rounds):
        for kept, code in ((foreseen, _FORECAST), (real, _TRAINING))[:: 1 if number % 2 == 0 else -1]:
            kept.append(alone(code, data, settings))
    ratios = sorted(a["seconds"] / b["seconds"] for a, b in zip(foreseen, real, strict=True))
    peaks = [statistics.median(each["peak"] for each in kept) for kept in (foreseen, real)]
    return {
        "epoch_seconds": [round(statistics.median(each["seconds"] for each in kept), 2) for kept in (foreseen, real)],
        "epoch_ratio": round(statistics.median(ratios), 3),
        "epoch_ratios": [round(each, 3) for each in ratios],
        "peak_mb": [round(peak / 1e6) for peak in peaks],
        "peak_ratio": round(peaks[0] / peaks[1], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for source in filter(Path.is_dir, sorted(Path(options.photos).iterdir())):
            Path(folder, source.name).mkdir()
            for path in sorted(source.glob("*.jpg"))[:COUNT]:
                Path(folder, source.name, path.name).symlink_to(path.resolve())
        for model, data, settings in CONFIGS:
            found = measure(model, folder if data == "photographs" else data, settings, options.rounds)
            results.append({"model": model, "data": data, **settings, **found})
            print(json.dumps(results[-1]), flush=True)
    write("forecast", "python -m benchmarks.forecast --photos FOLDER", results=results, rounds=options.rounds)


if __name__ == "__main__":
    main()
