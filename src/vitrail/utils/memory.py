"""How much memory is available and how much the process uses. Sizes are in bytes."""

import os
import sys
from pathlib import Path

import torch

# The memory limit of a container, in cgroup v2 and v1.
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")
_STATUS = Path("/proc/self/status")


def available_memory(device: torch.device) -> int | None:
    """Memory that this process can use in total: what it uses already plus what is free. None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device)
    if not _MEMINFO.exists() or not _STATM.exists():
        return None
    total = _read_kb(_MEMINFO)["MemAvailable"] + resident_memory()
    return min([total, *(limit for path in _CGROUP_LIMITS if (limit := _read_limit(path)) is not None)])


def _read_kb(path: Path) -> dict[str, int]:
    """The kB values of a Linux /proc file with lines such as "VmHWM:  1024 kB", in bytes by name."""
    lines = (line.partition(":") for line in path.read_text().splitlines() if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, _, value in lines}


def _read_limit(path: Path) -> int | None:
    """The limit in a cgroup file; None if there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def resident_memory() -> int:
    """The resident set size of this process, on Linux; 0 elsewhere."""
    if not _STATM.exists():
        return 0
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory(device: torch.device) -> int | None:
    """Peak memory: on CUDA, of tensors since `reset_peak_memory`; elsewhere, of the process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # On Linux getrusage includes the memory of the process before its exec.
    if _STATUS.exists() and (peak := _read_kb(_STATUS).get("VmHWM")) is not None:
        return max(peak, resident_memory())
    try:
        import resource
    except ImportError:  # Windows
        return None
    max_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(max_rss if sys.platform == "darwin" else max_rss * 1024, resident_memory())


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak on CUDA and release cached blocks."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error means that the device or the machine has no memory left."""
    # On the CPU torch raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
