"""How a run was started: the command, environment and data, stored with the run."""

import hashlib
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitrail._version import __version__
from vitrail.data.dataset import Dataset


def session_record(command: str, step: int, device: torch.device) -> dict[str, Any]:
    """A line of sessions.jsonl. began: UTC. step: steps done before. command: as typed, or the call in Python."""
    began = datetime.now(UTC).isoformat(timespec="seconds")
    return {"began": began, "step": step, "command": command, "environment": environment(device)}


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, on which results depend besides the config."""
    found = {
        "vitrail": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def python_call(arguments: Mapping[str, Any]) -> str:
    """The call of `vitrail.train` with these arguments, without those that are None."""
    parts = [
        _value(value) if name == "data" else f"{name}={_value(value)}"
        for name, value in arguments.items()
        if value is not None
    ]
    return f"vitrail.train({', '.join(parts)})"


def _value(value: object) -> str:
    """Its repr if it is plain data; else its type."""
    if isinstance(value, Path):
        return repr(str(value))
    if isinstance(value, str | int | float | tuple | list | dict):
        return repr(value)
    name = getattr(value, "name", None)
    return f"<{type(value).__name__} {name}>" if isinstance(name, str) else f"<{type(value).__name__}>"


def dataset_fingerprint(dataset: Dataset) -> str:
    """A hash that changes when the training or validation images, their order or their labels do.

    Images are identified by the last two parts of their paths, so that a folder may move.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name in ("train", "val"):
        split = dataset.splits.get(name)
        if split is not None:
            digest.update(np.ascontiguousarray(split.labels).tobytes())
            names = ("/".join(split.name(i).split(os.sep)[-2:]) for i in range(len(split)))
            digest.update("\n".join(names).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
