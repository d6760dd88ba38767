"""The processes that train together: one, or as many as torchrun started.

A world of one asks nobody and costs nothing. What the processes tell one another (counts, clocks, words) travels
between CPUs by gloo, also beside NCCL, so that asking does not wait for the device.
Shapes: R processes.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vitrail.errors import VitrailError

T = TypeVar("T")

# As long as the first process may take to fetch data while the others wait. A dead process is not waited for: its
# connections break at once.
_PATIENCE = timedelta(days=1)
_LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "connection refused", "gloo")
_LOST_TEXT = "another process of this run is gone (killed, or its machine)"
_joined = count()


class EndedByOtherProcess(VitrailError):
    """What another process has told already: this one leaves without a word of its own."""

    told = True


class DistributedContext:
    """rank: this process, from 0, of `world_size`. local_rank: its number on this machine, which picks its device."""

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0) -> None:
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self.advice = ""  # what to do when a process is lost, once there is something to go on with

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def all_gather_object(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def broadcast_object(self, value: T) -> T:
        """The first process's value, for all."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather_numbers(self, *values: float) -> list[list[float]]:
        """Every process's numbers, by rank: R lists. Much cheaper than `gather`."""
        if self.world_size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(found, mine)
        return [row.tolist() for row in found]

    def all_reduce(self, tensor: Tensor) -> None:
        """The sum of all processes' tensors, in place of each."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, for all; others pass one of its shape and type, which is filled."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def run_on_main(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process; where it fails, all end."""
        return self.broadcast_object(work() if self.is_main else None)  # type: ignore[return-value]

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The first process goes through the block before all others do, so that they find what it has fetched."""
        if not self.is_main:
            self.all_gather_numbers(0)
        yield
        if self.is_main:
            self.all_gather_numbers(0)


SINGLE_PROCESS = DistributedContext()


@contextmanager
def distributed_context() -> Iterator[DistributedContext]:
    """The world that torchrun's environment tells of (RANK, WORLD_SIZE, LOCAL_RANK); without it, a world of one.

    Where a process fails, all end: it tells what happened, and the others raise EndedByOtherProcess. Where one
    is killed, one of those that are left tells so.
    """
    if (size := int(os.environ.get("WORLD_SIZE", "1"))) == 1:
        yield SINGLE_PROCESS
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise VitrailError(
            f"WORLD_SIZE is {size} and {missing[0]} is not set: start with torchrun, or unset WORLD_SIZE"
        )
    distributed = DistributedContext(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    store: Any = None
    if not dist.is_initialized():  # else the caller has done so
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(distributed.local_rank % torch.cuda.device_count())
        common, _, _ = next(rendezvous("env://", timeout=_PATIENCE))
        # A name of its own each time: a second `train` in the same processes must not meet the first one's words.
        store = PrefixStore(f"vitrail-{next(_joined)}", common)
        dist.init_process_group(backend, store=store, rank=distributed.rank, world_size=size, timeout=_PATIENCE)
    try:
        yield distributed
    except Exception as error:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would cut off the last words
        last = _account(error, store, distributed)
        if last is error:
            raise
        raise last from error
    finally:
        if store is not None:
            # A thread of gloo's may still hold the last tensors, and aborts if Python ends before it lets go of them.
            time.sleep(0.2)
            dist.destroy_process_group()


def _account(error: Exception, store: Any, distributed: DistributedContext) -> Exception:
    """The error to raise here: this one where it is the first, else EndedByOtherProcess with the first one's words."""
    lost = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _LOST)
    words = f"{_LOST_TEXT}{distributed.advice}" if lost else str(error) or type(error).__name__
    mine = f"{distributed.rank} {words}"
    try:
        told = store.compare_set("told", "", mine).decode() if store is not None else mine
    except RuntimeError:  # the store is gone with the process that held it
        told = mine
    if told != mine:
        return EndedByOtherProcess(told.partition(" ")[2])
    return VitrailError(words) if lost else error
