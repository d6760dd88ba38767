"""Inference on a GPU: timm's networks beside ours, with and without the Triton kernel for Swin's windows and CUDA
graphs, in bfloat16.

    python -m benchmarks.cuda [--rounds 31]

Uint8 images on the CPU to logits on the CPU for all, with our normalisation; in turn, after warm-up. It needs a CUDA
device, and has not been run yet.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.measure import write
from benchmarks.peers import timm_twin
from vitrail.evaluation.timing import interleaved, median_ratio
from vitrail.inference.torch_runtime import TorchRuntime
from vitrail.layers.window import WindowAttention
from vitrail.models.build import build_model
from vitrail.models.catalog import VARIANTS

NETWORKS = ("vit_small_patch16_224", "swin_tiny_patch4_window7_224")
BATCHES = (1, 16, 128)


def runtimes(name: str) -> dict[str, Callable[[Any], Any]]:
    row = VARIANTS[name]
    model = build_model(row.config).eval()
    twin = timm_twin(name, row.config).eval()
    twin.load_state_dict(model.state_dict(), strict=False)
    kinds = {
        "timm": (twin.cuda(), {}),
        "vitrail": (model.cuda(), {}),
        "vitrail, CUDA graphs": (model, {"cuda_graphs": True}),
    }
    found: dict[str, Callable[[Any], Any]] = {
        label: TorchRuntime(network, row.preprocess, "bf16", **more).logits for label, (network, more) in kinds.items()
    }
    if any(isinstance(module, WindowAttention) for module in model.modules()):
        found["vitrail, no kernel"] = patch.object(WindowAttention, "_kernel", lambda *_: None)(found["vitrail"])
    return found


def speed(name: str, rounds: int) -> list[dict[str, Any]]:
    calls = runtimes(name)
    rows = []
    for batch in BATCHES:
        images = np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), np.uint8)
        took = interleaved({label: partial(call, images) for label, call in calls.items()}, rounds, warmup=5)
        for label, seconds in took.items():
            over = median_ratio(took["timm"], seconds)
            rows.append({"model": name, "what": label, "batch": batch, "ms": 1e3 * median(seconds), "over_timm": over})
            print(f"{name}, batch {batch}, {label}: {1e3 * median(seconds):.2f} ms, {over:.2f}x timm", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    write("cuda", results=[row for name in NETWORKS for row in speed(name, given.rounds)])


if __name__ == "__main__":
    main()
