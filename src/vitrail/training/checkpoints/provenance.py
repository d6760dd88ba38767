"""How a run was started: the command, environment and data, stored with the run."""

import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from vitrail._version import __version__


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
