"""Memory that requests took and freed is given back to the system while none are open."""

import asyncio
import ctypes
from contextlib import suppress

from vitrail.service.batching import Batcher

_SECONDS = 1.0  # between looks


async def return_free_memory(batcher: Batcher) -> None:
    """Until it is cancelled. glibc's malloc has an arena for each thread and keeps the memory that its largest image
    took; other C libraries have no `malloc_trim`, and nothing is done."""
    with suppress(OSError, AttributeError, TypeError):
        trim = ctypes.CDLL(None).malloc_trim
        trimmed = 0
        while True:
            await asyncio.sleep(_SECONDS)
            if not batcher.admitted and batcher.total != trimmed:
                trimmed = batcher.total
                await asyncio.to_thread(trim, 0)  # without the GIL
