"""Each private PyTorch function gives what its public fallback gives."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vitrail
from vitrail.layers import attention
from vitrail.layers.attention import attend
from vitrail.utils import torch_compat

PRIVATE = re.compile(r"\btorch(\.[a-z_]+)*\._[a-z]|\bnn\.modules\.|\baten\._|\b_(NormBase|BatchNorm)\b")


def test_no_other_file_calls_private_functions() -> None:
    for path in Path(vitrail.__file__).parent.rglob("*.py"):
        if path.name != "torch_compat.py":
            lines = [line for line in path.read_text().splitlines() if '"torch._' not in line]  # names of modules
            assert not PRIVATE.findall("\n".join(lines).replace("torch.__version__", "")), path


@pytest.mark.parametrize("weight", [0.1, 0.9, torch.tensor(0.25), torch.tensor(0.0)])
def test_lerp(weight: float | torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    averages, values = ([torch.randn(3, 4), torch.randn(5)] for _ in range(2))
    expected = [average + weight * (value - average) for average, value in zip(averages, values, strict=True)]
    fallback = [average.clone() for average in averages]
    torch_compat.lerp_(averages, values, weight)
    monkeypatch.setattr(torch_compat, "_HAS_FOREACH", False)
    torch_compat.lerp_(fallback, values, weight)
    for one, other, third in zip(averages, fallback, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, third)


def test_softmax_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(2, 3, 7, requires_grad=True)
    output, grad = scores.softmax(-1), torch.randn(2, 3, 7)
    (expected,) = torch.autograd.grad(output, scores, grad)
    torch.testing.assert_close(torch_compat.softmax_backward(grad, output.detach()), expected)
    monkeypatch.setattr(torch_compat, "_SOFTMAX_BACKWARD", None)
    torch.testing.assert_close(torch_compat.softmax_backward(grad, output.detach()), expected)


def test_attention_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, results = (2, 3, 17, 32), []
    tensors, grad = [torch.randn(shape) for _ in range(3)], torch.randn(shape)
    for flash in (True, False):
        if not flash:
            monkeypatch.setattr(attention, "flash_attention_cpu", None)
        qkv = [tensor.bfloat16().requires_grad_() for tensor in tensors]
        out = attend(*qkv)
        out.backward(grad.bfloat16())
        results.append([out, *(tensor.grad for tensor in qkv)])
    qkv = [tensor.bfloat16().float().requires_grad_() for tensor in tensors]
    out = F.scaled_dot_product_attention(*qkv)
    out.backward(grad.bfloat16().float())
    for one, other, expected in zip(*results, [out, *(tensor.grad for tensor in qkv)], strict=True):
        for found in (one, other):
            assert found is not None
            assert expected is not None
            assert (found.float() - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(9, 13), (40, 31)])
def test_resize(mode: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.randint(0, 256, (1, 3, 20, 24), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    fast, fallback = (torch.empty(1, 3, *size, dtype=torch.uint8) for _ in range(2))
    torch_compat.resize_into(image, mode, fast)
    monkeypatch.setitem(torch_compat._RESIZE, mode, None)
    torch_compat.resize_into(image, mode, fallback)
    assert torch.equal(fast, fallback)


@pytest.mark.parametrize(
    ("amx", "avx512", "expected"),
    [(True, True, "AMX"), (False, True, "AVX512_BF16"), (False, False, None)],
)
def test_bf16_instructions_of_the_cpu(
    amx: bool, avx512: bool, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From PyTorch's own query, and without it from the flags that Linux lists."""
    capabilities = {"avx512_bf16": avx512, "amx_bf16": amx}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert torch_compat.cpu_bf16() == expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    flags = "fpu sse" + " avx512_bf16" * avx512 + " amx_bf16" * amx
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags}\n")
    monkeypatch.setattr(torch_compat, "_CPUINFO", tmp_path / "cpuinfo")
    assert torch_compat.cpu_bf16() == expected
    monkeypatch.setattr(torch_compat, "_CPUINFO", tmp_path / "missing")
    assert torch_compat.cpu_bf16() is None
