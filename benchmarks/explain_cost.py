"""What an explanation costs: `relevance` beside a training step, the command in a cold process, and forward passes.

Part of `python -m benchmarks.explain`; by itself: `python -m benchmarks.explain --cost`.
"""

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import vitrail
from benchmarks.measure import Comparison, interleave, synchronise
from vitrail.classifier import Classifier
from vitrail.explanation.explain import compute_maps
from vitrail.explanation.methods.table import METHODS
from vitrail.explanation.targets import parse_target
from vitrail.images.preprocess import Preprocess
from vitrail.models.build import build_model
from vitrail.models.catalog import VARIANTS


def cost() -> dict[str, Any]:
    times = [{**asdict(each), "times_as_long": round(1 / each.ratio_median, 3)} for each in relevance_cost("cpu")]
    return {"relevance": times, "cold": [cold(), cold("--score")], "forwards": count_forwards()}


def relevance_cost(device: str, rounds: int = 7) -> list[Comparison]:
    """The time of `relevance` beside one forward and backward pass for all parameters, as in training."""
    comparisons = []
    for name in ("vit_small_patch16_224", "swin_tiny_patch4_window7_224"):
        model = build_model(VARIANTS[name].config).eval().to(device)
        for batch in (1, 8):
            images = torch.rand(batch, 3, 224, 224, device=device)
            target = parse_target(0, [str(number) for number in range(1000)])
            steps = [
                partial(_finished, compute_maps, model, images, METHODS["relevance"], target),
                partial(_finished, forward_and_backward, model, images),
            ]
            labels = (f"relevance, batch {batch}", "one forward and backward")
            comparisons.append(interleave(name, *zip(labels, steps, strict=True), rounds=rounds))
    return comparisons


def _finished(call: Callable[..., Any], model: nn.Module, images: Tensor, *rest: Any) -> None:
    call(model, images, *rest)
    synchronise(images)


def forward_and_backward(model: nn.Module, images: Tensor) -> None:
    """A training step without its update."""
    model.zero_grad()
    targets = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    F.cross_entropy(model(images), targets).backward()


def cold(*options: str, runs: int = 3) -> dict[str, Any]:
    """Seconds of `vitrail explain` of one image in a process of its own: a ViT-S/16 with random weights."""
    with TemporaryDirectory() as folder:
        model = build_model(VARIANTS["vit_small_patch16_224"].config)
        Classifier(model, Preprocess(size=(224, 224)), [f"class {number}" for number in range(1000)]).save(
            f"{folder}/model"
        )
        Image.fromarray(skimage.data.coffee()).save(f"{folder}/coffee.jpg")
        command = ["explain", "model", "coffee.jpg", *options, "--out", "pictures"]
        seconds, used = [], []
        for _ in range(runs):
            begin, before = time.perf_counter(), cpu_seconds_of_children()
            subprocess.run([sys.executable, "-m", "vitrail", *command], cwd=folder, check=True, capture_output=True)
            seconds.append(round(time.perf_counter() - begin, 2))
            used.append(round(cpu_seconds_of_children() - before, 2))
    return {"command": f"vitrail {' '.join(command)}", "seconds": sorted(seconds), "cpu_seconds": sorted(used)}


def cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def count_forwards() -> dict[str, int]:
    """Passes of one image through ViT-S/16 with and without the score, and calls of the model for them."""
    model = build_model(VARIANTS["vit_small_patch16_224"].config).eval()
    clf = Classifier(model, Preprocess(size=(224, 224)), [f"class {number}" for number in range(1000)])
    sizes: list[int] = []
    model.blocks[0].norm1.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    counts = {}
    for name, score in (("without_score", False), ("with_score", True)):
        sizes.clear()
        vitrail.explain(clf, skimage.data.coffee(), score=score)
        counts |= {f"images_{name}": sum(sizes), f"calls_{name}": len(sizes)}
    return counts
