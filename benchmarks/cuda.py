"""Inference, explanations and a service on a GPU, in bfloat16.

    python -m benchmarks.cuda [--rounds 31] [--parts inference compiled explanation service]

Each part in a process of its own. inference: timm's networks beside ours, with and without the Triton kernel for
Swin's windows and CUDA graphs; uint8 images on the CPU to logits on the CPU for all, with our normalisation. timm: as
it is, under autocast; and with weights in bfloat16. compiled: the same in timm against torch.compile's
"reduce-overhead", which uses CUDA graphs. explanation: `relevance` beside one forward and backward pass in float32.
service: images a second of `vitrail serve` for 16 clients, with and without CUDA graphs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.explain_cost import relevance_cost
from benchmarks.export import random_classifier
from benchmarks.measure import RESULTS, write
from benchmarks.peers import timm_twin
from benchmarks.serve import PORTS, percentile, start, throughput, wait_ready
from vitrail.evaluation.timing import interleaved, median_ratio
from vitrail.images.preprocess import Preprocess
from vitrail.inference.torch_runtime import TorchRuntime
from vitrail.layers.window import WindowAttention
from vitrail.models.build import build_model
from vitrail.models.catalog import VARIANTS

NETWORKS = ("vit_small_patch16_224", "swin_tiny_patch4_window7_224")
BATCHES = (1, 16, 128)
REQUESTS = 1600  # of each of three rounds
Call = Callable[[Any], Any]


def runtimes(name: str) -> dict[str, Call]:
    row = VARIANTS[name]
    model = build_model(row.config).eval().cuda()
    found: dict[str, Call] = {
        **timm_runtimes(name),
        "vitrail": TorchRuntime(model, row.preprocess, "bf16", frozen=True).logits,
        "vitrail, CUDA graphs": TorchRuntime(model, row.preprocess, "bf16", cuda_graphs=True, frozen=True).logits,
    }
    if any(isinstance(module, WindowAttention) for module in model.modules()):
        found["vitrail, no kernel"] = patch.object(WindowAttention, "_kernel", lambda *_: None)(found["vitrail"])
    return found


def timm_runtimes(name: str, compiles: bool = False) -> dict[str, Call]:
    row = VARIANTS[name]
    twin, half = (timm_twin(name, row.config).eval().cuda() for _ in range(2))
    half.bfloat16()
    found: dict[str, Call] = {
        "timm": TorchRuntime(twin, row.preprocess, "bf16").logits,
        "timm, bfloat16 weights": partial(plain, half, row.preprocess),
    }
    if compiles:
        fast = torch.compile(half, mode="reduce-overhead", dynamic=False)
        found["timm, bfloat16 weights, compiled"] = partial(plain, fast, row.preprocess)
    return found


@torch.inference_mode()
def plain(model: nn.Module, preprocess: Preprocess, images: Any) -> Any:
    pixels: Tensor = torch.from_numpy(images).cuda().permute(0, 3, 1, 2).contiguous()
    return model(preprocess.normalize(pixels).bfloat16()).float().cpu().numpy()


def inference(rounds: int) -> Iterator[dict[str, Any]]:
    for name in NETWORKS:
        yield from timed(name, runtimes(name), rounds)


def compiled(rounds: int) -> Iterator[dict[str, Any]]:
    for name in NETWORKS:
        yield from timed(name, timm_runtimes(name, compiles=True), rounds)


def timed(name: str, calls: dict[str, Call], rounds: int) -> Iterator[dict[str, Any]]:
    for batch in BATCHES:
        images = np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), np.uint8)
        took = interleaved({label: partial(call, images) for label, call in calls.items()}, rounds, warmup=5)
        for label, seconds in took.items():
            over = median_ratio(took["timm"], seconds)
            print(f"{name}, batch {batch}, {label}: {1e3 * median(seconds):.2f} ms, {over:.2f}x timm", flush=True)
            yield {"model": name, "what": label, "batch": batch, "ms": 1e3 * median(seconds), "over_timm": over}


def explanation(rounds: int) -> list[dict[str, Any]]:
    found = [asdict(each) | {"times_as_long": 1 / each.ratio_median} for each in relevance_cost("cuda", rounds)]
    for each in found:
        print(f"{each['name']}, {each['ours']}: {each['times_as_long']:.2f} times as long as a forward and backward")
    return found


def service() -> Iterator[dict[str, Any]]:
    jpeg = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)).save(jpeg, "jpeg")
    image = jpeg.getvalue()
    for name in NETWORKS:
        for graphs in (False, True):
            with serving(name, graphs, image) as port:
                throughput(port, [image] * 64)
                done = [throughput(port, [image] * REQUESTS) for _ in range(3)]
            times = [each for _, seconds in done for each in seconds]
            rate, tail = median(rate for rate, _ in done), percentile(times, 0.99)
            print(f"{name}, CUDA graphs {graphs}: {rate:.0f} images/s, p99 {tail} ms", flush=True)
            yield {"model": name, "cuda_graphs": graphs, "images_per_second": round(rate, 1), "p99_ms": tail}


@contextmanager
def serving(name: str, graphs: bool, image: bytes) -> Iterator[int]:
    """The port of a service of the model with random weights, once it has answered the image."""
    port = PORTS["vitrail"]
    options = ["--port", str(port), "--device", "cuda", "--no-access-log", *(["--cuda-graphs"] if graphs else [])]
    with tempfile.TemporaryDirectory() as folder:
        model = random_classifier(name).save(Path(folder, "model"))
        process = start(["-m", "vitrail", "serve", str(model), *options])
        try:
            wait_ready("vitrail", image)
            yield port
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    if len(given.parts) > 1:
        for part in given.parts:
            subprocess.run(
                [sys.executable, "-m", "benchmarks.cuda", "--rounds", str(given.rounds), "--parts", part], check=True
            )
        return
    (part,) = given.parts
    file = RESULTS / "cuda.json"
    found = json.loads(file.read_text()).get("parts", {}) if file.exists() else {}
    write("cuda", parts=found | {part: list(PARTS[part](given.rounds))})


PARTS: dict[str, Callable[[int], Any]] = {
    "inference": inference,
    "compiled": compiled,
    "explanation": explanation,
    "service": lambda _: service(),
}


if __name__ == "__main__":
    main()
