"""Memory of files that a library has mapped."""

import ctypes
from contextlib import suppress
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_DONT_NEED = 4  # MADV_DONTNEED of Linux


def release_pages(path: Path) -> None:
    """Take the pages of a file that this process has mapped read-only out of its memory.

    They are read from the file again when they are touched, so only memory is saved. Linux only; elsewhere nothing is
    done.
    """
    name = str(path.resolve())
    with suppress(OSError, AttributeError, TypeError):
        advise = ctypes.CDLL(None).madvise
        for line in _MAPS.read_text(errors="surrogateescape").splitlines():
            span, mode, *_, mapped = line.split(maxsplit=5)  # "7f00-7f80 r--s 00000000 fe:00 5964456   /path"
            if mapped == name and "w" not in mode:
                start, end = (int(address, 16) for address in span.split("-"))
                advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONT_NEED)
