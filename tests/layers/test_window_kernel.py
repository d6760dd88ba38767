"""The Triton kernel for window attention: against the explicit path, in Triton's interpreter where there is no GPU; and
what decides whether it is used."""

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from layers.triton_kernels import DEVICE, load_kernel
from tolerance import assert_near
from vitrail.layers import window as window_module
from vitrail.layers.window import Kernel, WindowAttention, kernel_error, plan_windows, window_kernel
from vitrail.models.build import build_model
from vitrail.models.configs import SwinConfig

# Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
# size of the feature map, window, shifted: whole windows, padding, a map smaller than the window, one row, many tokens
CASES = [
    ((8, 8), (4, 4), False),
    ((9, 6), (4, 4), True),
    ((3, 9), (4, 4), True),
    ((1, 9), (4, 4), True),
    ((14, 14), (7, 7), True),
    ((9, 16), (8, 8), True),
]


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    found: Kernel = load_kernel("window_kernel", "attend_in_windows")
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "window", "shifted"), CASES)
@torch.no_grad()
def test_kernel_is_the_explicit_path(
    size: tuple[int, int], window: tuple[int, int], shifted: bool, dtype: torch.dtype, kernel: Kernel
) -> None:
    attention = WindowAttention(96, 3, window).to(DEVICE)
    torch.nn.init.normal_(attention.relative_position_bias_table)
    plan = plan_windows(size, window, shifted, DEVICE)
    x = torch.randn(2, *size, 96, device=DEVICE)
    qkv = attention.qkv(x).to(dtype)
    read = kernel(qkv, attention.bias(plan), plan.gather, plan.inverse)
    assert read.dtype is dtype
    assert read.shape == x.shape
    expected = plan.reverse(attention.forward_with_weights(plan.partition(x), plan)[0], 2)
    found = attention.proj(read.float())
    if dtype is torch.float32:
        assert_near(found, expected)
    else:
        assert (found - expected).norm() < 0.02 * expected.norm()


_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vitrail.layers.window_kernel import _attend
names = ("qkv", "bias", "gather", "inverse", "out", "scale", "tokens", "heads", "n", "bias_windows")
constants = {"BLOCK": 64, "D": 32}
for dtype, precision in (("bf16", "ieee"), ("fp32", "tf32"), ("fp32", "ieee")):
    types = (f"*{dtype}", "*fp32", "*i64", "*i64", f"*{dtype}", "fp32", *["i32"] * 4)
    signature = {**dict(zip(names, types, strict=True)), **dict.fromkeys([*constants, "PRECISION"], "constexpr")}
    source = ASTSource(fn=_attend, signature=signature, constexprs={**constants, "PRECISION": precision})
    for capability in (80, 90):
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"] and compiled.metadata.shared <= 48 << 10
"""


@pytest.mark.slow
@pytest.mark.usefixtures("kernel")
def test_kernel_compiles_for_gpus_that_are_not_here() -> None:
    """Triton's own compiler, to the machine code of an A100 and an H100."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_a_swin_with_the_kernel_has_the_same_logits(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SwinConfig(
        img_size=(56, 56), patch_size=4, embed_dim=32, depths=(2, 2), num_heads=(1, 2), window_size=7, num_classes=5
    )
    model = build_model(config).eval().to(DEVICE)
    images = torch.randn(2, 3, 56, 60, device=DEVICE)
    monkeypatch.setattr(WindowAttention, "_kernel", lambda *_: None)
    expected, calls = model(images), []

    def counted(*tensors: Tensor) -> Tensor:
        calls.append(tensors)
        return kernel(*tensors)

    monkeypatch.setattr(WindowAttention, "_kernel", lambda *_: counted)
    assert_near(model(images), expected)
    assert len(calls) == 4


def test_kernel_is_compared_with_the_explicit_path_before_it_is_used(kernel: Kernel) -> None:
    for dtype in DTYPES:
        assert kernel_error(kernel, DEVICE, dtype, 32) < 1e-2


def wrong(qkv: Tensor, *_: Tensor) -> Tensor:
    return qkv[..., : qkv.shape[-1] // 3]


def broken(*_: Tensor) -> Tensor:
    raise RuntimeError("Failed to find C compiler")


@pytest.mark.parametrize(("fake", "reason"), [(wrong, "wrong by"), (broken, "C compiler")])
@pytest.mark.usefixtures("no_choice")
def test_a_kernel_that_fails_is_not_used(fake: Kernel, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vitrail.layers.window_kernel", SimpleNamespace(attend_in_windows=fake))
    with pytest.warns(UserWarning, match=reason):
        assert window_kernel(DEVICE, torch.float32, 32) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        assert window_kernel(DEVICE, torch.float32, 32) is None


@pytest.mark.usefixtures("no_choice")
def test_without_triton_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vitrail.layers.window_kernel", None)
    assert window_kernel(DEVICE, torch.float32, 32) is None


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("dim", "window"), [(64, (7, 7)), (64, (12, 12)), (48, (7, 7))])
def test_kernel_is_for_inference_on_cuda_with_small_windows(
    dim: int, window: tuple[int, int], grad: bool, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Widths of a head: 32 and 24."""
    monkeypatch.setattr(window_module, "window_kernel", lambda *_: wrong)
    attention = WindowAttention(dim, 2, window).train(training)
    plan, x = plan_windows((24, 24), window, True, torch.device("cpu")), torch.zeros(1, 24, 24, dim)
    with torch.set_grad_enabled(grad):
        assert attention._kernel(x, plan) is None
        monkeypatch.setattr(window_module, "on_cuda", lambda _x: True)
        found = attention._kernel(x, plan)
        assert (found is not None) == (not grad and not training and dim == 64 and window == (7, 7))
        assert attention._kernel(x.double(), plan) is None


@torch.no_grad()
def test_kernel_is_chosen_for_the_precision_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(window_module, "window_kernel", lambda *what: asked.append(what[1:]))
    monkeypatch.setattr(window_module, "on_cuda", lambda _x: True)
    attention = WindowAttention(64, 2, (7, 7)).eval()
    plan, x = plan_windows((24, 24), (7, 7), True, torch.device("cpu")), torch.zeros(1, 24, 24, 64)
    attention._kernel(x, plan)
    with torch.autocast("cpu", torch.bfloat16):
        attention._kernel(x, plan)
    assert asked == [(torch.float32, 32), (torch.bfloat16, 32)]
