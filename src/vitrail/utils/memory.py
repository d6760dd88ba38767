"""How much memory is available and how much the process uses. Sizes are in bytes. Importing this imports no torch."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import re
import sys
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# The memory limit of a container, in cgroup v2 and v1.
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")
_STATUS = Path("/proc/self/status")
_MAPS = Path("/proc/self/maps")
_CLEAR_REFS = Path("/proc/self/clear_refs")  # "5" sets the peak of the resident set to its present size
_DONT_NEED = 4  # MADV_DONTNEED of Linux
_ARENA_MAX = -8  # M_ARENA_MAX of glibc's mallopt
# What is said where memory does not suffice: by torch, its devices and C++; by Python for a thread's stack; by the
# system for a library; by oneDNN, whose messages about operations that it lacks go on with "descriptor for".
_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|can(not|'t) allocate memory|std::bad_alloc|can't start new thread"
    r"|failed to map segment|^could not (create a memory object|(create|execute) a primitive)$",
    re.IGNORECASE,
)


def available_memory(device: torch.device) -> int | None:
    """Memory that this process can use in total: what it uses already plus what is free. None if unknown."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device)
    return _host_memory()


def free_host_memory() -> int | None:
    """Memory of the machine that this process can use beside what it uses already. None if unknown."""
    total = _host_memory()
    return None if total is None else total - resident_memory()


def _host_memory() -> int | None:
    """Memory that this process can use in total, within the limits of its container and its address space."""
    if not _MEMINFO.exists() or not _STATM.exists():
        return None
    total = _read_kb(_MEMINFO)["MemAvailable"] + resident_memory()
    limits = (_address_space(), *map(_read_limit, _CGROUP_LIMITS))
    return min([total, *(limit for limit in limits if limit is not None)])


def has_address_limit() -> bool:
    """Whether the address space of this process is limited (RLIMIT_AS, `ulimit -v`)."""
    return _STATM.exists() and _address_space() is not None


def _address_space() -> int | None:
    """What this process can use within the limit of its address space (RLIMIT_AS, `ulimit -v`); None without a limit.

    Addresses that are reserved but not used, such as of libraries and of threads' stacks, count towards the limit.
    """
    import resource  # not on Windows, where there is no /proc either

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    return resident_memory() + max(0, limit - _pages(0))


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
    return _pages(1) if _STATM.exists() else 0


def _pages(column: int) -> int:
    """A column of /proc/self/statm: 0 is the size of the address space, 1 the resident set."""
    return int(_STATM.read_text().split()[column]) * os.sysconf("SC_PAGE_SIZE")


def share_malloc_arena() -> None:
    """Let all threads of glibc's malloc use one arena, of which freed memory can be given back to the system.

    An arena for each thread, the default, reserves 64 MiB of addresses and keeps up to so much freed memory. To be
    called before threads are started; other C libraries have no `mallopt`, and nothing is done.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)


def return_free_memory() -> None:
    """Give memory that was freed back to the system. glibc's malloc has an arena for each thread and keeps in it what
    its largest use took; other C libraries have no `malloc_trim`, and nothing is done."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(device: torch.device) -> int | None:
    """Peak memory: on CUDA, of tensors since `reset_peak_memory`; elsewhere, of the process, on Linux since
    `reset_peak_memory` and on other systems since its start."""
    if device.type == "cuda":
        import torch

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
    """Start the peak anew at the memory in use now, where the system can. What was freed is given back to it before."""
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    gc.collect()
    return_free_memory()
    with suppress(OSError):
        _CLEAR_REFS.write_text("5")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, means that the device or the machine has no memory left."""
    while error is not None:
        # On the CPU torch raises a plain RuntimeError.
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if isinstance(error, RuntimeError | OSError | ImportError) and _NO_MEMORY.search(str(error)):
            return True
        error = error.__cause__
    return False


def mapped_spans(path: Path) -> set[tuple[int, int]]:
    """Start and end (exclusive) of each range of this process's addresses to which a file is mapped read-only. Linux
    only; elsewhere there are none."""
    found = set()
    with suppress(OSError):
        name = str(path.resolve())
        for line in _MAPS.read_text(errors="surrogateescape").splitlines():
            span, mode, *_, mapped = line.split(maxsplit=5)  # "7f00-7f80 r--s 00000000 fe:00 5964456   /path"
            if mapped == name and "w" not in mode:
                start, end = (int(address, 16) for address in span.split("-"))
                found.add((start, end))
    return found


def release_pages(spans: Iterable[tuple[int, int]]) -> None:
    """Take the pages of a mapped file out of this process's memory. They are read from the file again when they are
    touched. spans: of `mapped_spans`, of mappings that the caller keeps: what else came to be there would be lost."""
    with suppress(OSError, AttributeError, TypeError):
        advise = ctypes.CDLL(None).madvise
        for start, end in spans:
            advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONT_NEED)


@contextmanager
def releasing_pages(spans: Collection[tuple[int, int]], interval: float = 0.03) -> Iterator[None]:
    """`release_pages` every `interval` seconds and at the end, so that pages that are read once, and copied, do not all
    count at the same time."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(interval):
            release_pages(spans)

    thread = threading.Thread(target=repeat, name="release pages", daemon=True)
    if spans:
        with suppress(RuntimeError):  # no memory for a thread: then at the end only
            thread.start()
    try:
        yield
    finally:
        done.set()
        if thread.is_alive():
            thread.join()
        release_pages(spans)
