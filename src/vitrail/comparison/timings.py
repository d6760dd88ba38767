"""Latency of the models and their cost in resolution, measured in turn, so that a slow moment does not favour one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import numpy as np

from vitrail.classifier import Classifier
from vitrail.evaluation.timing import interleaved
from vitrail.inference.torch_runtime import TorchRuntime
from vitrail.models.build import build_model, configure
from vitrail.models.configs import ModelConfig, SwinConfig, ViTConfig

SCALES = (1.0, 1.5, 2.0)  # of the side
BATCH = 8  # images, of the cost in resolution
_ROUNDS = 31
_SCALE_ROUNDS = 7


def time_models(classifiers: Mapping[str, Classifier]) -> dict[str, dict[str, Any]]:
    """By label: `latency_ms`, the median time of one image through the model, without decoding; and `resolution`, for
    each of SCALES the `size` (height, width) and the median `ms` an image in batches of BATCH.

    The cost in resolution is that of the architecture: models of other input sizes are built with new weights.
    """
    calls = {label: _call(classifier.engine(frozen=True).runtime, 1) for label, classifier in classifiers.items()}
    latency, resolution = interleaved(calls, _ROUNDS), time_at_scales(classifiers)
    return {
        label: {"latency_ms": 1e3 * median(latency[label]), "resolution": resolution[label]} for label in classifiers
    }


def time_at_scales(classifiers: Mapping[str, Classifier], batch: int = BATCH) -> dict[str, list[dict[str, Any]]]:
    """The `resolution` of `time_models` in batches of this size."""
    found: dict[str, list[dict[str, Any]]] = {label: [] for label in classifiers}
    for scale in SCALES:
        runtimes = {label: _at_scale(classifier, scale) for label, classifier in classifiers.items()}
        calls = {label: _call(runtime, batch) for label, runtime in runtimes.items()}
        for label, seconds in interleaved(calls, _SCALE_ROUNDS).items():
            size = list(runtimes[label].preprocess.size)
            found[label].append({"scale": scale, "size": size, "ms": 1e3 * median(seconds) / batch})
    return found


def _call(runtime: Any, batch: int) -> Callable[[], Any]:
    preprocess = runtime.preprocess
    images = np.random.default_rng(0).integers(0, 256, (batch, *preprocess.size, preprocess.channels), np.uint8)
    return lambda: runtime.logits(images)


def _at_scale(classifier: Classifier, scale: float) -> TorchRuntime:
    """The architecture at a multiple of the input size, rounded up to what it can take."""
    config, multiple = classifier.model.config, _multiple(classifier.model.config)
    height, width = (multiple * math.ceil(round(scale * side / multiple, 6)) for side in classifier.preprocess.size)
    model = build_model(configure(config, img_size=(height, width))).to(classifier.device)
    return TorchRuntime(model, classifier.preprocess.replace(size=(height, width)), classifier.precision, frozen=True)


def _multiple(config: ModelConfig) -> int:
    """Sides have to be, or without loss should be, multiples of this."""
    if isinstance(config, SwinConfig):
        return config.patch_size << (len(config.depths) - 1)
    return int(config.patch_size) if isinstance(config, ViTConfig) else 1
