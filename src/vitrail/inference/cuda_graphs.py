"""Forward passes that are recorded once and replayed as a CUDA graph.

A pass of a small batch is a few hundred kernels of microseconds each, and starting them from Python takes longer than
computing them. A replay starts all of them at once.

Shapes: B batch, C channels, H W height and width.
"""

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.layers.window import cached_plans
from vitrail.utils.text import one_line

Forward = Callable[[Tensor], Tensor]
_WARMUP = 3  # passes before a recording, in which kernels are compiled and workspaces allocated
LIMIT = 32  # shapes that are recorded; others are computed without a graph

_recording = threading.Lock()  # CUDA records one graph of a process at a time


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
    Hooks of the model run in recordings alone. Where a pass cannot be recorded, a warning says so, once, and passes are
    computed without graphs from then on. While one is recorded, no other thread may wait for the whole device or draw
    random numbers on it: so do not train there meanwhile.
    """

    def __init__(
        self,
        forward: Forward,
        model: nn.Module,
        recorder: Callable[[], Callable[[Forward, Tensor], Recording]] | None = None,
    ) -> None:
        self._forward = forward
        self._tensors: list[dict[str, Any]] = []  # by name; the dicts of the modules, in which others may be put
        for module in model.modules():
            self._tensors += [module._parameters, module._buffers]
        self._recorder = recorder or Recorder
        self._record = self._recorder()
        self._recordings: dict[Any, Recording] = {}
        self._seen: set[Any] = set()
        self._places: list[int] = []
        self._possible = True
        self._last: Any = None  # the end of the last replay, which the next one waits for, on whatever stream
        self._lock = threading.Lock()

    def __call__(self, images: Tensor) -> Tensor:
        with self._lock:
            recording = self._recording_of(images) if self._possible else None
            if recording is None:
                return self._forward(images)
            stream = torch.cuda.current_stream(images.device) if images.is_cuda else None
            if stream is not None and self._last is not None:
                stream.wait_event(self._last)
            recording.images.copy_(images)
            recording.replay()
            output = recording.output.clone()
            if stream is not None:
                self._last = stream.record_event()
            return output

    def _recording_of(self, images: Tensor) -> Recording | None:
        """That of this shape; None if it comes the first time, or is one too many, or cannot be recorded."""
        self._forget_if_moved()
        key = (images.shape, images.dtype)
        if key in self._recordings:
            return self._recordings[key]
        if key not in self._seen or len(self._recordings) >= LIMIT:
            self._seen.add(key)
            return None
        try:
            with _recording:
                self._recordings[key] = self._record(self._forward, images)
        except Exception as error:  # of CUDA, of a compiler, of a model that reads values: no common class
            self._possible = False
            self._recordings.clear()
            warnings.warn(f"the model is computed without CUDA graphs: {one_line(error)}", stacklevel=4)
            return None
        return self._recordings[key]

    def _forget_if_moved(self) -> None:
        places = [0 if each is None else each.data_ptr() for group in self._tensors for each in group.values()]
        if places != self._places:
            self._places = places
            self._recordings.clear()
            self._record = self._recorder()  # with a pool of its own: one whose graphs are gone cannot be used again


class Recorder:
    """Records passes as CUDA graphs that share one pool of memory: outputs are copied before the next replay."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None  # of recordings
        self._warm_up: Any = None  # of the passes before them

    def __call__(self, forward: Forward, images: Tensor) -> Recording:
        with torch.cuda.device(images.device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
                self._stream, self._warm_up = torch.cuda.Stream(), torch.cuda.Stream()
            static = images.clone()
            self._warm_up.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._warm_up):
                for _ in range(_WARMUP):
                    forward(static)
            plans = cached_plans()
            graph = torch.cuda.CUDAGraph()
            # On a stream of its own, shared by all recordings: cuBLAS has a workspace for each stream, which is then in
            # the pool of the graphs that use it, and is not given to others when torch.compile clears all workspaces.
            # The end of a graph clears that of its stream (https://github.com/pytorch/pytorch/issues/193402), which is
            # why recordings are dropped together.
            # Other threads may allocate memory meanwhile, which the default mode forbids.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                output = forward(static)
            torch.cuda.current_stream().wait_stream(self._stream)
        return Recording(static, output, graph.replay, (graph, plans, cached_plans()))
