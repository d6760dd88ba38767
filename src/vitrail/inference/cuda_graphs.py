"""Forward passes that are recorded once and replayed as a CUDA graph.

A pass of a small batch is a few hundred kernels of microseconds each, and starting them from Python takes longer than
computing them. A replay starts all of them at once.

Shapes: B batch, C channels, H W height and width.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.layers.window import cached_plans

_WARMUP = 3  # passes before a recording, in which kernels are compiled and workspaces allocated
LIMIT = 32  # shapes that are kept


@dataclass(frozen=True)
class Recording:
    """A pass of one shape. images: what `replay` reads. output: what it writes. keep: tensors that it reads besides,
    and that must not be freed."""

    images: Tensor
    output: Tensor
    replay: Callable[[], None]
    keep: Any = None


class CudaGraphs:
    """A function of images B C H W that is computed by graphs, one for each shape; several threads may call it.

    forward: the function; the tensors that it reads are those of `model`, and constants. A shape is recorded when it
    comes the second time, and anew after parameters or buffers have moved in memory; their values may change freely.
    The oldest of more than LIMIT shapes is forgotten.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        model: nn.Module,
        record: Callable[[Callable[[Tensor], Tensor], Tensor], Recording] | None = None,
    ) -> None:
        self._forward = forward
        self._model = model
        self._record = record or Recorder()
        self._recordings: dict[Any, Recording] = {}
        self._seen: set[Any] = set()
        self._places: tuple[int, ...] = ()
        self._lock = threading.Lock()

    def __call__(self, images: Tensor) -> Tensor:
        key = (images.shape, images.dtype)
        with self._lock:
            self._forget_if_moved()
            if key not in self._seen:
                self._seen.add(key)
                return self._forward(images)
            recording = self._recordings.pop(key, None) or self._record(self._forward, images)
            self._recordings[key] = recording  # the last one, as the most recently used
            if len(self._recordings) > LIMIT:
                del self._recordings[next(iter(self._recordings))]
            recording.images.copy_(images)
            recording.replay()
            return recording.output.clone()

    def _forget_if_moved(self) -> None:
        tensors = (*self._model.parameters(), *self._model.buffers())
        places = tuple(tensor.data_ptr() for tensor in tensors)
        if places != self._places:
            self._places = places
            self._recordings.clear()


class Recorder:
    """Records passes as CUDA graphs that share one pool of memory: outputs are copied before the next replay."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, forward: Callable[[Tensor], Tensor], images: Tensor) -> Recording:
        with torch.cuda.device(images.device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            static = images.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARMUP):
                    forward(static)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate memory meanwhile, which the default mode forbids.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = forward(static)
        return Recording(static, output, graph.replay, (graph, cached_plans()))
