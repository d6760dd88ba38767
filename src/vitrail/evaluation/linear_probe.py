"""Classifiers on frozen features: logistic regression and k nearest neighbours.

Shapes: N images, C features, K classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS, TEMPERATURE = 20, 0.07  # as in DINO

_MAX_FLOAT64 = 2**27  # elements: larger features are fitted in float32
_CHUNK = 2**24  # elements of logits or similarities that are computed at once
_ITERATIONS = 300


@dataclass(frozen=True)
class Linear:
    """Logits are features @ weight.T + bias: weight float32 K C, bias float32 K."""

    weight: Tensor
    bias: Tensor


class LogisticRegression:
    """Multinomial logistic regression on features N C with classes N, by L-BFGS on full batches.

    Minimises the mean cross-entropy plus l2 / 2 times the sum of squared weights, on standardised features; the bias is
    not penalised. scikit-learn's `C` is 1 / (N l2). Each fit starts at the previous solution, so fit decreasing l2.
    sample_weights: of each image in the mean, N with a mean of 1; None: all 1.
    """

    def __init__(
        self, features: Tensor, labels: Tensor, num_classes: int, sample_weights: Tensor | None = None
    ) -> None:
        dtype = torch.float64 if features.numel() <= _MAX_FLOAT64 else torch.float32
        features = features.to(dtype)
        self._mean = features.mean(dim=0)
        std = features.std(dim=0, correction=0)
        # Features that are nearly constant get weight 0: scaled to a std of 1 they would be rounding noise.
        self._scale = torch.where(std > 1e-6 * std.max().clamp_min(1e-30), std, torch.inf)
        self._features = (features - self._mean) / self._scale
        self._labels = labels
        self._sample_weights = None if sample_weights is None else sample_weights.to(features)
        self._weight = torch.zeros(num_classes, features.shape[1], dtype=dtype, device=features.device)
        self._bias = torch.zeros(num_classes, dtype=dtype, device=features.device)

    def fit(self, l2: float) -> Linear:
        """The solution for this l2, for features that are not standardised: the scaling is part of the weights."""
        optimizer = torch.optim.LBFGS(
            [self._weight, self._bias],
            max_iter=_ITERATIONS,
            tolerance_grad=1e-7,
            tolerance_change=1e-10,
            history_size=20,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(lambda: self._objective(l2))
        weight = self._weight.double() / self._scale
        bias = self._bias.double() - weight @ self._mean.double()
        return Linear(weight.float(), bias.float())

    def _objective(self, l2: float) -> Tensor:
        """The objective; sets the gradients of weight and bias."""
        count, rows = len(self._labels), max(1, _CHUNK // len(self._bias))
        value = self._weight.square().sum() * (l2 / 2)
        self._weight.grad, self._bias.grad = self._weight * l2, torch.zeros_like(self._bias)
        for start in range(0, count, rows):
            features, labels = self._features[start : start + rows], self._labels[start : start + rows]
            logits = torch.addmm(self._bias, features, self._weight.T)
            losses = F.cross_entropy(logits, labels, reduction="none")
            gradient = logits.softmax(dim=1)  # with respect to the logits, N K: softmax - one-hot labels
            gradient[torch.arange(len(labels), device=labels.device), labels] -= 1
            if self._sample_weights is not None:
                weights = self._sample_weights[start : start + rows]
                losses, gradient = losses * weights, gradient * weights[:, None]
            value += losses.sum() / count
            self._weight.grad += gradient.T @ features / count
            self._bias.grad += gradient.sum(dim=0) / count
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
    """Predicted classes M of queries M C by their nearest `features` N C with classes `labels` N.

    Neighbours by cosine similarity, weighted by exp(similarity / temperature). Caron et al.,
    "Emerging Properties in Self-Supervised Vision Transformers", 2021 (https://arxiv.org/abs/2104.14294).
    """
    bank, queries = F.normalize(features, dim=1), F.normalize(queries, dim=1)
    neighbours = min(neighbours, len(bank))
    predicted = []
    for part in queries.split(max(1, _CHUNK // len(bank))):
        cosine, nearest = (part @ bank.T).topk(neighbours, dim=1)
        weights = ((cosine - cosine[:, :1]) / temperature).exp()  # relative to the nearest: exp cannot overflow
        votes = torch.zeros(len(part), num_classes, dtype=weights.dtype, device=weights.device)
        predicted.append(votes.scatter_add_(1, labels[nearest], weights).argmax(dim=1))
    return torch.cat(predicted) if predicted else labels[:0]
