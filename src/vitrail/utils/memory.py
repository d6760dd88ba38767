"""How much memory there is, and how much a run takes of it. Sizes are in bytes."""

import sys
from pathlib import Path

import torch

_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # of a container
_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")
_STATUS = Path("/proc/self/status")


def room(device: torch.device) -> int | None:
    """What this process may hold in all: what it holds, and what is free. None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device)
    if not _MEMINFO.exists() or not _STATM.exists():
        return None
    there = _bytes(_MEMINFO)["MemAvailable"] + held()
    return min([there, *(limit for path in _LIMITS if (limit := _limit(path)) is not None)])


def _bytes(path: Path) -> dict[str, int]:
    """What a file of Linux's with lines such as "VmHWM:  1024 kB" tells in kB, by name."""
    lines = (line.partition(":") for line in path.read_text().splitlines() if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, _, value in lines}


def _limit(path: Path) -> int | None:
    """A container's limit; None where it has none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or the word max
        return None


def held() -> int:
    """What this process holds now, on Linux; elsewhere 0."""
    if not _STATM.exists():
        return 0
    import resource

    return int(_STATM.read_text().split()[1]) * resource.getpagesize()


def peak(device: torch.device) -> int | None:
    """The most that was held: on CUDA by tensors since `reset_peak_memory`, elsewhere by the process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # On Linux getrusage also counts what the process was before it became this program.
    if _STATUS.exists() and (own := _bytes(_STATUS).get("VmHWM")) is not None:
        return max(own, held())
    try:
        import resource
    except ImportError:  # Windows
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(largest if sys.platform == "darwin" else largest * 1024, held())


def reset_peak_memory(device: torch.device) -> None:
    """Count CUDA's peak from now on, with nothing unused held back."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the machine, has no memory left. On the CPU, torch says so in words alone."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def gib(size: float) -> str:
    """As 0.4 GiB; three digits where that is less."""
    value = size / 2**30
    return f"{value:.1f} GiB" if value >= 0.1 else f"{value:.3f} GiB"
