"""The processes that train together: one, or as many as torchrun started.

A single process makes no collective call. Python objects and numbers are exchanged between CPUs by gloo, even if
tensors use NCCL, so that they do not wait for the device. Importing this, and a single process, import no torch.
Shapes: R processes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from vitrail.errors import DistributedError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# Rank 0 may take this long to download data while the other processes wait. A process that died is noticed at
# once: its connections break.
_TIMEOUT = timedelta(days=1)
_contexts = count()


class PeerFailedError(DistributedError):
    """Another process failed and reports it; this one ends silently."""

    reported_elsewhere = True


class DistributedContext:
    """rank: this process, from 0, of `world_size`. local_rank: its number on this machine, which picks its device."""

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0) -> None:
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self.advice = ""  # added to the error when a process is lost

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def all_gather_object(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def broadcast_object(self, value: T) -> T:
        """Rank 0's value, in all processes."""
        if self.world_size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather_numbers(self, *values: float) -> list[list[float]]:
        """Every process's numbers, by rank: R lists. Much cheaper than `all_gather_object`."""
        if self.world_size == 1:
            return [list(values)]
        import torch
        import torch.distributed as dist

        mine = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(found, mine)
        return [row.tolist() for row in found]

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)

    def barrier(self) -> None:
        """Wait until all processes are here. On the CPU: dist.barrier would wait for the device with NCCL."""
        self.all_gather_numbers(0)

    def run_on_main(self, function: Callable[[], T]) -> T:
        """The result of `function`, which rank 0 alone calls, in all processes; if it raises, all end."""
        return self.broadcast_object(function() if self.is_main else None)  # type: ignore[return-value]


SINGLE_PROCESS = DistributedContext()


@contextmanager
def distributed_context() -> Iterator[DistributedContext]:
    """The processes of torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK); without it, a single one.

    If a process fails, all end: the first one to fail raises its error and the other ones PeerFailedError. If one is
    killed, one of those that are left raises DistributedError.
    """
    if (size := int(os.environ.get("WORLD_SIZE", "1"))) == 1:
        yield SINGLE_PROCESS
        return
    import torch
    import torch.distributed as dist

    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise DistributedError(
            f"WORLD_SIZE is {size}, but {missing[0]} is not set: start with torchrun, or unset WORLD_SIZE"
        )
    distributed = DistributedContext(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    store: Any = None
    if not dist.is_initialized():  # else by the caller
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(distributed.local_rank % torch.cuda.device_count())
        common, _, _ = next(rendezvous("env://", timeout=_TIMEOUT))
        # A new prefix each time: a second `train` in the same processes must not read the first one's keys.
        store = PrefixStore(f"vitrail-{next(_contexts)}", common)
        dist.init_process_group(backend, store=store, rank=distributed.rank, world_size=size, timeout=_TIMEOUT)
    try:
        yield distributed
    except Exception as error:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would cut off the error message
        raised = _error_to_raise(error, store, distributed)
        if raised is error:
            raise
        raise raised from error
    finally:
        if store is not None:
            # A thread of gloo's may still use the last tensors, and aborts if Python exits before it is done.
            time.sleep(0.2)
            dist.destroy_process_group()


def _error_to_raise(error: Exception, store: Any, distributed: DistributedContext) -> Exception:
    """This error if this process is the first one to fail, else PeerFailedError with the first one's message."""
    import torch.distributed as dist

    # When a peer has ended, NCCL raises a DistError and gloo (torch 2.13) a bare RuntimeError, from our collectives or
    # from those in DDP's and FSDP's passes. A user's mistake is a VitrailError and out of memory a subclass.
    if isinstance(error, dist.DistError) or type(error) is RuntimeError:
        reason = str(error).partition("\n")[0]
        error = DistributedError(f"a process of this run was lost or failed: {reason}{distributed.advice}")
    mine = f"{distributed.rank} {str(error) or type(error).__name__}"
    try:
        first = store.compare_set("first_error", "", mine).decode() if store is not None else mine
    except RuntimeError:  # the process with the store has ended
        first = mine
    return error if first == mine else PeerFailedError(first.partition(" ")[2])
