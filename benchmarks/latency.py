"""The latency that `vitrail recommend` states, against the forward pass of the bare model.

    python -m benchmarks.latency [--rounds 8]

Both in one process, in turn, so that a busy machine favours neither: what `recommend` measures (the median of about two
seconds of calls), and the median of as many calls of the model on a normalised float tensor, in the same precision.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch

from benchmarks.measure import write
from vitrail.inference.torch_runtime import autocast
from vitrail.models.build import build_model, configure
from vitrail.models.catalog import variant
from vitrail.recommendation.measurement import Subject, time_and_memory
from vitrail.utils.device import uses_bf16

MODELS = (("resnet20_32", 32), ("vit_tiny_patch16_224", 224), ("deit_small_patch16_224", 224),
          ("swin_tiny_patch4_window7_224", 224))  # fmt: skip
SECONDS, FEWEST = 2.0, 7


@torch.inference_mode()
def bare_ms(model: torch.nn.Module, image: torch.Tensor, bf16: bool) -> float:
    with autocast(torch.device("cpu"), bf16):
        return _median_ms(model, image)


def _median_ms(model: torch.nn.Module, image: torch.Tensor) -> float:
    times: list[float] = []
    model(image)
    while len(times) < FEWEST or sum(times) < SECONDS:
        start = time.perf_counter()
        model(image)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def compare(name: str, side: int, rounds: int) -> dict[str, Any]:
    subject = Subject(name, (side, side), 3, 10, "cpu")
    model = build_model(configure(variant(name).config, num_classes=10, img_size=(side, side), in_chans=3)).eval()
    image = torch.randn(1, 3, side, side)
    bf16 = uses_bf16(model, torch.device("cpu"), "auto")
    pairs = []
    for number in range(rounds):
        calls = {"stated": lambda: time_and_memory(subject).latency_ms, "bare": lambda: bare_ms(model, image, bf16)}
        pairs.append({key: calls[key]() for key in (("stated", "bare"), ("bare", "stated"))[number % 2]})
    ratios = sorted(pair["stated"] / pair["bare"] for pair in pairs)
    return {
        "model": name,
        "img_size": side,
        "precision": "bfloat16" if bf16 else "float32",
        "stated_ms": round(statistics.median(pair["stated"] for pair in pairs), 3),
        "bare_ms": round(statistics.median(pair["bare"] for pair in pairs), 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    results = []
    for name, side in MODELS:
        results.append(compare(name, side, options.rounds))
        print(json.dumps(results[-1]), flush=True)
    write("latency", results=results, rounds=options.rounds)


if __name__ == "__main__":
    main()
