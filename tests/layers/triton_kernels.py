"""Kernels in Triton for tests: on the GPU, else in Triton's interpreter."""

import importlib
from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_kernel(module: str, name: str) -> Any:
    """The function `name` of vitrail.layers.`module`; the test is skipped without triton."""
    pytest.importorskip("triton", reason="needs triton, which PyTorch's builds for CUDA bring")
    return getattr(importlib.import_module(f"vitrail.layers.{module}"), name)
