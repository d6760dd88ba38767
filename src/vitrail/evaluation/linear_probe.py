"""What frozen features are worth: a linear classifier fitted to them, and their nearest neighbours.

Shapes: N images, C features, K classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS, TEMPERATURE = 20, 0.07  # as in DINO

_EXACT = 2**27  # numbers up to which features are computed with in float64
_CHUNK = 2**24  # numbers in a chunk of logits or similarities
_ITERATIONS = 300


@dataclass(frozen=True)
class Linear:
    """Logits are features @ weight.T + bias: weight float32 K C, bias float32 K."""

    weight: Tensor
    bias: Tensor


class LogisticRegression:
    """Multinomial logistic regression on features N C with classes N, by full batches and L-BFGS.

    Minimises the mean cross-entropy plus l2 / 2 times the squared weights, the features being standardised and the bias
    free. It is convex, so nothing is random and no rate is to be chosen. scikit-learn's `C` is 1 / (N l2). A fit starts
    where the last one ended: go from strong to weak.
    """

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        kind = torch.float64 if features.numel() <= _EXACT else torch.float32
        whole = features.to(kind)
        self._mean = whole.mean(dim=0)
        deviation = whole.std(dim=0, correction=0)
        # What hardly varies carries nothing; blown up to a deviation of 1 it would be noise.
        floor = 1e-6 * deviation.max().clamp_min(1e-30)
        self._scale = torch.where(deviation > floor, deviation, torch.inf)
        self._features = (whole - self._mean) / self._scale
        self._labels = labels
        self._weight = torch.zeros(num_classes, features.shape[1], dtype=kind, device=features.device)
        self._bias = torch.zeros(num_classes, dtype=kind, device=features.device)

    def fit(self, l2: float) -> Linear:
        """The best weights for this l2, for features as they come: the standardisation is folded in."""
        parameters = [self._weight, self._bias]
        optimiser = torch.optim.LBFGS(
            parameters,
            max_iter=_ITERATIONS,
            tolerance_grad=1e-7,
            tolerance_change=1e-10,
            history_size=20,
            line_search_fn="strong_wolfe",
        )
        optimiser.step(lambda: self._objective(l2))
        weight = self._weight.double() / self._scale
        bias = self._bias.double() - weight @ self._mean.double()
        return Linear(weight.float(), bias.float())

    def _objective(self, l2: float) -> Tensor:
        """The value at the current weights, whose gradients are written beside them."""
        count, rows = len(self._labels), max(1, _CHUNK // len(self._bias))
        value = self._weight.square().sum() * (l2 / 2)
        self._weight.grad, self._bias.grad = self._weight * l2, torch.zeros_like(self._bias)
        for start in range(0, count, rows):
            features, labels = self._features[start : start + rows], self._labels[start : start + rows]
            logits = torch.addmm(self._bias, features, self._weight.T)
            value += F.cross_entropy(logits, labels, reduction="sum") / count
            slope = logits.softmax(dim=1)  # of the loss by the logits, N K, once the truth is taken off
            slope[torch.arange(len(labels), device=labels.device), labels] -= 1
            self._weight.grad += slope.T @ features / count
            self._bias.grad += slope.sum(dim=0) / count
        return value


def nearest_neighbours(
    queries: Tensor,
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """The class of each query M C by its nearest among `features` N C, whose classes are `labels` N; M class numbers.

    Nearest by cosine; each of the neighbours has exp(cosine / temperature) votes for its class. Caron et al.,
    "Emerging Properties in Self-Supervised Vision Transformers", 2021 (https://arxiv.org/abs/2104.14294).
    """
    bank, queries = F.normalize(features, dim=1), F.normalize(queries, dim=1)
    neighbours = min(neighbours, len(bank))
    predicted = []
    for part in queries.split(max(1, _CHUNK // len(bank))):
        cosine, nearest = (part @ bank.T).topk(neighbours, dim=1)
        # Less the largest: a constant factor for each query, which keeps exp from overflowing when it is cold.
        votes = ((cosine - cosine[:, :1]) / temperature).exp()
        tally = torch.zeros(len(part), num_classes, dtype=votes.dtype, device=votes.device)
        predicted.append(tally.scatter_add_(1, labels[nearest], votes).argmax(dim=1))
    return torch.cat(predicted) if predicted else labels[:0]
