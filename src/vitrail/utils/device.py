"""Where a model runs, and in which precision."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vitrail.errors import VitrailError
from vitrail.utils.torch_compat import cpu_has_amx

_FAULT_LINES = 2  # of a compiler's error
_WIDE = 96  # vit_micro_patch8_32 and up: the digits model, which is narrower, gained a tenth and lost 0.4 points


def pick_device(name: str, number: int | None = None) -> torch.device:
    """The device of this name; "auto" is CUDA, else Apple's MPS, else the CPU. number: this process's on its machine,
    where several train together: each takes the CUDA device of its number, else the CPU.

    Raises:
        VitrailError: no such device here.
    """
    if number is not None and name in ("auto", "cuda", "mps"):
        name = f"cuda:{number}" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise VitrailError(f"there is no device {name!r}: use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cpu":
        return device
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(device.type, 0)
    if (device.index or 0) >= there:
        raise VitrailError(f"device {name!r} is not available here: use device=cpu or device=auto")
    return device


def uses_bf16(model: nn.Module, device: torch.device, amp: str) -> bool:
    """Whether this model's matrix products run in bfloat16. "auto" says yes where the hardware is made for it: GPUs
    that have it, and CPUs with Intel's AMX for a model at least _WIDE features wide (docs/machine.md has the figures).
    """
    if amp == "auto" and device.type == "cpu":
        return getattr(model, "num_features", 0) >= _WIDE and cpu_has_amx()
    if amp == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return amp == "bf16"


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed what the CPU and this device draw.

    `torch.manual_seed` also seeds, or makes a note to seed, every device that torch knows of; that takes too long here.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


@contextlib.contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Let torch use so many threads on the CPU for a while; None leaves its own number."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number is not None:
            torch.set_num_threads(before)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Around steps of a model that may be compiled: a compiler that is missing or fails is told in one line."""
    try:
        yield
    except RuntimeError as error:
        if not any(kind.__module__.startswith(("torch._dynamo", "torch._inductor")) for kind in type(error).__mro__):
            raise
        words = " ".join(line.strip() for line in str(error).splitlines()[:_FAULT_LINES] if line.strip())
        raise VitrailError(f"torch.compile does not work here ({words}): set compile=false") from error


def precision(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager[Any]:
    """The context for a forward pass."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
