"""Latency and memory of a model on this machine, measured in a process of its own and stored.

What is measured is what `predict` does with one image after decoding: a forward pass of the torch runtime. The stored
figures are of a processor, number of threads, device, precision and version of torch; weights do not matter.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vitrail
from vitrail.errors import RunError
from vitrail.images.preprocess import Preprocess
from vitrail.inference.engine import default_workers
from vitrail.inference.torch_runtime import TorchRuntime
from vitrail.models.build import build_model, configure
from vitrail.models.catalog import variant
from vitrail.utils.download import cache_dir
from vitrail.utils.files import atomic_write_text
from vitrail.utils.memory import peak_memory, reset_peak_memory
from vitrail.utils.torch_compat import cpu_bf16

_WARMUP = (2, 0.3)  # calls and seconds, at least
_CALLS = (7, 400)  # at least and at most
_SECONDS = 2.0  # of the measurement, unless the fewest calls take longer
_IDLE = 0.9  # share of the time in which a thread that computes has a core, if nothing else needs it
_TIMEOUT = 120.0  # seconds for a model, with the start of its process


@dataclass(frozen=True)
class Subject:
    """What is measured: a variant of the catalog with this input, head and device."""

    model: str
    img_size: tuple[int, int]
    in_chans: int
    num_classes: int
    device: str


@dataclass(frozen=True)
class Measurement:
    """latency_ms: median for one image, milliseconds. peak_mb: peak memory, 1e6 bytes: of the process on the CPU, with
    Python and torch; of tensors on CUDA; None if unknown. busy: other processes took the core meanwhile, so that the
    latency is not the model's own.
    """

    latency_ms: float
    peak_mb: float | None
    busy: bool = False


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on besides the model."""
    cuda = device.startswith("cuda")
    return {
        "processor": _processor(),
        "cores": default_workers(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "bf16": cpu_bf16() if device == "cpu" else None,
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "vitrail": vitrail.__version__,
    }


def stored(subject: Subject) -> Measurement | None:
    """The stored measurement of this machine; None if there is none."""
    try:
        return Measurement(**json.loads(_file(subject).read_text(encoding="utf-8"))["measurement"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def measure(subject: Subject) -> Measurement | str:
    """Measure in a new process; or the reason why it could not be measured. The result is stored, unless the machine
    was busy."""
    package = str(Path(vitrail.__file__).parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", __name__, json.dumps(asdict(subject)), str(torch.get_num_threads())]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT, env={**os.environ, "PYTHONPATH": path}
        )
    except subprocess.TimeoutExpired:
        return f"took more than {_TIMEOUT:g} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"the process ended with status {done.returncode}"
    found = Measurement(**json.loads(done.stdout))
    if found.busy:
        return found
    record = {"subject": asdict(subject), "machine": machine(subject.device), "measurement": asdict(found)}
    with suppress(OSError, RunError):  # where the cache cannot be written, the next call measures again
        _file(subject).parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(_file(subject), json.dumps(record, indent=2) + "\n")
    return found


def time_and_memory(subject: Subject) -> Measurement:
    """Measure in this process, which should do nothing else and have loaded no other model."""
    config = configure(
        variant(subject.model).config,
        num_classes=subject.num_classes,
        img_size=subject.img_size,
        in_chans=subject.in_chans,
    )
    device = torch.device(subject.device)
    preprocess = Preprocess(size=subject.img_size).with_channels(subject.in_chans)
    runtime = TorchRuntime(build_model(config).to(device), preprocess)
    image = np.random.default_rng(0).integers(0, 256, (1, *subject.img_size, subject.in_chans), dtype=np.uint8)
    reset_peak_memory(device)
    calls, start = 0, time.perf_counter()
    while calls < _WARMUP[0] or time.perf_counter() - start < _WARMUP[1]:
        runtime.logits(image)
        calls += 1
    times: list[float] = []
    fewest, most = _CALLS
    computed = time.thread_time()
    while len(times) < fewest or (sum(times) < _SECONDS and len(times) < most):
        start = time.perf_counter()
        runtime.logits(image)  # ends with a copy to the CPU, which waits for the device
        times.append(time.perf_counter() - start)
    busy = device.type == "cpu" and time.thread_time() - computed < _IDLE * sum(times)
    peak = peak_memory(device)
    return Measurement(round(1e3 * statistics.median(times), 3), None if peak is None else round(peak / 1e6, 1), busy)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _file(subject: Subject) -> Path:
    key = json.dumps([asdict(subject), machine(subject.device)], sort_keys=True)
    return cache_dir() / "measurements" / f"{blake2b(key.encode(), digest_size=12).hexdigest()}.json"


if __name__ == "__main__":
    _subject = json.loads(sys.argv[1])
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(asdict(time_and_memory(Subject(**{**_subject, "img_size": tuple(_subject["img_size"])})))))
