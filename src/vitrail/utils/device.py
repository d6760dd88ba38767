"""Where a model runs, and in which precision."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vitrail.errors import DeviceError
from vitrail.utils.torch_compat import cpu_bf16

_ERROR_LINES = 2  # of a compiler's error message that are shown
# The smallest `num_features` for which amp=auto chooses bfloat16 on a CPU with instructions for it (docs/machine.md).
# Narrower models gain little: the digits model became a tenth faster, with AMX, and lost 0.4 points of accuracy.
_BF16_MIN_FEATURES = 96


def pick_device(name: str, number: int | None = None) -> torch.device:
    """The device of this name; "auto" is CUDA, else Apple's MPS, else the CPU.

    number: the local rank in distributed training: the process uses the CUDA device of this number, else the CPU.

    Raises:
        DeviceError: no such device is available.
    """
    if number is not None and name in ("auto", "cuda", "mps"):
        name = f"cuda:{number}" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"unknown device {name!r}: use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cpu":
        return device
    available = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(device.type, 0)
    if (device.index or 0) >= available:
        raise DeviceError(f"device {name!r} is not available: use device=cpu or device=auto")
    return device


def uses_bf16(model: nn.Module, device: torch.device, amp: str) -> bool:
    """Whether the model's matrix products run in bfloat16: amp "bf16" always, "off" never, "auto" on GPUs that support
    it and on CPUs with instructions for it, there for models with at least _BF16_MIN_FEATURES features.
    """
    if amp == "auto" and device.type == "cpu":
        return cpu_bf16() is not None and getattr(model, "num_features", 0) >= _BF16_MIN_FEATURES
    if amp == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return amp == "bf16"


def describe_precision(device: torch.device, bf16: bool) -> str:
    """For the plan of a run: the precision, and the CPU's instructions for it."""
    if not bf16:
        return "float32"
    return f"bfloat16 ({cpu_bf16() or 'emulated'})" if device.type == "cpu" else "bfloat16"


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed the random number generators of the CPU and of this device.

    `torch.manual_seed` also seeds every other device that torch knows of, which takes too long for every step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


@contextlib.contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Set torch's number of CPU threads within the context, None for the present one; afterwards it is as before."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Around steps of a model that may be compiled: turns an error of torch.compile into a DeviceError of one line."""
    try:
        yield
    except RuntimeError as error:
        if not any(kind.__module__.startswith(("torch._dynamo", "torch._inductor")) for kind in type(error).__mro__):
            raise
        message = " ".join(line.strip() for line in str(error).splitlines()[:_ERROR_LINES] if line.strip())
        raise DeviceError(f"torch.compile failed ({message}): set compile=false") from error


def precision(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager[Any]:
    """The autocast context for a forward pass."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
