"""What the images themselves say, without a training: nearest neighbours in a model's features, and training time.

Shapes: N images, C features.
"""

import warnings
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitrail.data.dataset import Dataset
from vitrail.evaluation.linear_probe import NEIGHBOURS, nearest_neighbours
from vitrail.inference.engine import SplitReader
from vitrail.inference.torch_runtime import TorchRuntime
from vitrail.pretrained.load import load_pretrained
from vitrail.training.config.automatic import Candidate, DatasetStats, choose
from vitrail.training.config.schema import make_config
from vitrail.training.monitoring.progress import Reporter
from vitrail.training.probe import compute_features
from vitrail.training.resources.forecast import estimate_cost
from vitrail.training.session import Session
from vitrail.training.setup import prepare

SAMPLE = (60, 300)  # images of a sample, fewest and most
_SECONDS = 15.0  # that the features of one model may take
_TRIAL_STEPS = 4  # of which the first is a warm-up


@dataclass(frozen=True)
class Probe:
    """top1: leave-one-out accuracy of nearest neighbours, percent; images: of the sample, that could be read."""

    top1: float
    images: int


def sample_size(latency_ms: float) -> int:
    """Images whose features a model with this latency computes in about `_SECONDS`."""
    return max(SAMPLE[0], min(SAMPLE[1], round(1e3 * _SECONDS / latency_ms)))


def sample_rows(labels: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """At most `count` rows, drawn without replacement with a fixed seed; a smaller sample is part of a larger one."""
    rows = np.random.default_rng(0).permutation(len(labels))[:count]
    return rows.astype(np.int64)


def probe(candidate: Candidate, dataset: Dataset, count: int, device: torch.device) -> Probe | None:
    """Nearest neighbours in the features of the published weights, on a sample of `count` training images.

    None if fewer than two images can be read.

    Raises:
        WeightsError: the weights cannot be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = load_pretrained("default", candidate.model, img_size=candidate.img_size)
    assert found.preprocess is not None  # that of the published weights
    split = dataset.split("train")
    reader = SplitReader(split.take(sample_rows(split.labels, count)), found.preprocess)
    features = compute_features(TorchRuntime(found.model.to(device), found.preprocess), reader)
    if features is None or len(features.labels) < 2:
        return None
    return Probe(leave_one_out(features.values, features.labels, dataset.num_classes), len(features.labels))


def leave_one_out(features: Tensor, labels: Tensor, num_classes: int) -> float:
    """Accuracy of nearest neighbours in percent: each image N C is classified by all others."""
    correct = 0
    for row in range(len(labels)):
        others = torch.arange(len(labels), device=labels.device) != row
        query = features[row : row + 1]
        predicted = nearest_neighbours(
            query, features[others], labels[others], num_classes, neighbours=min(NEIGHBOURS, len(labels) - 1)
        )
        correct += int(predicted[0] == labels[row])
    return 100 * correct / len(labels)


def training_seconds(candidate: Candidate, dataset: Dataset, stats: DatasetStats, device: torch.device) -> float | None:
    """Estimated time to train a candidate with its recipe, from a few real steps; None if it might exhaust the memory.

    Weights are not loaded: the time does not depend on them.
    """
    stats = replace(stats, pretrained=candidate.pretrained)
    named = {"model": candidate.model, "img_size": candidate.size}
    settings = {**choose(stats, named).values, **named, "cache": "off", "device": str(device)}
    session = Session(prepare(dataset, make_config(settings), may_use_weights=False), Reporter(False), device)
    cost, _ = estimate_cost(session.trainer, session.loader, dataset.counts(), dataset.eval_split(), _TRIAL_STEPS)
    return None if cost is None else cost.seconds
