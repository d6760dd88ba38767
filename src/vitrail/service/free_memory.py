"""Memory that requests took and freed is given back to the system while none are open."""

import asyncio

from vitrail.service.batching import Batcher
from vitrail.utils.memory import return_free_memory

_SECONDS = 1.0  # between looks


async def return_memory_while_idle(batcher: Batcher) -> None:
    """Until it is cancelled."""
    trimmed = 0
    while True:
        await asyncio.sleep(_SECONDS)
        if not batcher.admitted and batcher.total != trimmed:
            trimmed = batcher.total
            await asyncio.to_thread(return_free_memory)  # without the GIL
