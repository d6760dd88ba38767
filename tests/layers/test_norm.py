"""Layer normalisation before linear layers: its Triton kernel, in Triton's interpreter where there is no GPU, and what
decides whether that is used."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.triton_kernels import DEVICE, load_kernel
from tolerance import assert_near
from vitrail.layers import norm as norm_module
from vitrail.layers.norm import Kernel, LayerNorm, norm_kernel


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    found: Kernel = load_kernel("norm_kernel", "normalise")
    return found


def layer(width: int) -> LayerNorm:
    found = LayerNorm(width, eps=1e-6).to(DEVICE)
    nn.init.normal_(found.weight)
    nn.init.normal_(found.bias)
    return found


@pytest.mark.parametrize("shape", [(1, 1, 96), (3, 5, 7, 96), (50, 384), (3, 1000), (2, 3072)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_kernel_is_layer_norm(shape: tuple[int, ...], dtype: torch.dtype, kernel: Kernel) -> None:
    norm, x = layer(shape[-1]), 3 * torch.randn(shape, device=DEVICE).to(dtype) + 1
    expected = F.layer_norm(x.float(), shape[-1:], norm.weight, norm.bias, 1e-6)
    assert_near(kernel(x, norm.weight, norm.bias, 1e-6, torch.float32), expected)
    # Not rounded as bfloat16, which Triton's interpreter truncates.
    assert_near(kernel(x, norm.weight, norm.bias, 1e-6, torch.float16).float(), expected, tolerance=1e-3)
    transposed = x.transpose(0, -2)
    assert_near(kernel(transposed, norm.weight, norm.bias, 1e-6, torch.float32), expected.transpose(0, -2).contiguous())


def identity(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


@pytest.mark.usefixtures("no_choice")
def test_a_wrong_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vitrail.layers.norm_kernel", SimpleNamespace(normalise=identity))
    with pytest.warns(UserWarning, match=r"layer normalisation .* wrong by"):
        assert norm_kernel(DEVICE, torch.float32, torch.bfloat16) is None


def test_kernel_is_for_inference_in_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[torch.dtype, ...]] = []
    monkeypatch.setattr(norm_module, "norm_kernel", lambda _device, *types: asked.append(types))
    monkeypatch.setattr(norm_module, "_KERNEL_ELEMENTS", 1 << 20)
    norm, x = LayerNorm(512), torch.randn(64, 32, 512)
    mixed = torch.autocast("cpu", torch.bfloat16)
    with mixed, torch.no_grad():
        norm(x)
    assert not asked  # not on CUDA
    monkeypatch.setattr(norm_module, "on_cuda", lambda _x: True)
    with mixed:
        norm(x)
    with torch.no_grad():
        norm(x)
        with mixed:
            norm(x[:3])  # few
            norm(x.bfloat16())
            LayerNorm(512, bias=False)(x)
            assert not asked
            norm(x)
    assert asked == [(torch.float32, torch.bfloat16)]


@pytest.mark.gpu
@pytest.mark.usefixtures("no_choice")
def test_what_linear_layers_read_on_a_gpu() -> None:
    norm, linear, x = layer(96), nn.Linear(96, 96).cuda(), torch.randn(64, 56, 56, 96, device="cuda")
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        found, expected = linear(norm(x)), linear(nn.LayerNorm.forward(norm, x))
        assert norm(x).dtype is torch.bfloat16
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()
