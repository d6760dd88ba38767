"""Confident learning: labels that a classifier, on images that it was not fitted to, confidently disagrees with.

Northcutt, Jiang, Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", 2021
(https://arxiv.org/abs/1911.00068).
Shapes: N images, K classes, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitrail.data.splits import stratified
from vitrail.diagnosis.scan import Scan
from vitrail.evaluation.linear_probe import LogisticRegression

FOLDS = 5
L2 = 0.05  # strong: a probe that fits wrong labels does not contradict them
_MAX_FIT = 4_000  # images that a probe is fitted to
_MIN_AGREEMENT, _MAX_SUSPECT = 0.5, 0.2  # shares of the labels; beyond, the probe knows too little to judge any
MIN_IMAGES = 5  # of a class, with fewer of which its labels are not judged
_PROJECTIONS = 512  # random Fourier features
_MAX_CLASSES = 200  # above, fewer random features: a fit costs images x features x classes

Probabilities = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LabelErrors:
    """rows: suspect images, most suspicious first. guesses: the class that each probably has. quality: N, see
    `label_quality`; NaN where a label was not judged. agreement: share of the judged images whose label the probe
    predicts. judged: False if it predicts too few or suspects too many for a probe that knows these classes; no label
    is then suspected."""

    rows: npt.NDArray[np.int64]
    guesses: npt.NDArray[np.int64]
    quality: Probabilities
    agreement: float = 0.0
    judged: bool = False


def find_label_errors(features: Tensor, labels: Labels) -> LabelErrors:
    """Suspect labels by out-of-fold predictions of a linear probe on features N F."""
    quality = np.full(len(labels), np.nan)
    classes, counts = np.unique(labels, return_counts=True)
    classes = classes[counts >= MIN_IMAGES]
    judged = np.flatnonzero(np.isin(labels, classes))
    empty = np.zeros(0, dtype=np.int64)
    if len(classes) < 2:
        return LabelErrors(empty, empty, quality)
    own = np.searchsorted(classes, labels[judged])
    probabilities = out_of_fold(features[judged], own, len(classes))
    quality[judged] = label_quality(own, probabilities)
    agreement = float((probabilities.argmax(axis=1) == own).mean())
    suspect = np.flatnonzero(off_diagonal(own, probabilities))
    if agreement < _MIN_AGREEMENT or len(suspect) > _MAX_SUSPECT * len(judged):
        return LabelErrors(empty, empty, quality, agreement)
    order = suspect[np.argsort(quality[judged][suspect], kind="stable")]
    return LabelErrors(judged[order], classes[probabilities[order].argmax(axis=1)], quality, agreement, judged=True)


def out_of_fold(features: Tensor, labels: Labels, num_classes: int) -> Probabilities:
    """Probabilities N K of each image by a probe that was fitted to the other folds. Folds are stratified."""
    fold = np.zeros(len(labels), dtype=np.int64)
    rest = np.arange(len(labels))
    for k in range(FOLDS - 1, 0, -1):
        kept, out = stratified(labels[rest], 1 / (k + 1), 0, f"fold {k}")
        fold[rest[out]], rest = k, rest[kept]
    found = np.zeros((len(labels), num_classes))
    targets = torch.from_numpy(labels)
    for k in range(FOLDS):
        inside, outside = torch.from_numpy(_fitted_rows(labels, fold != k)), torch.from_numpy(fold == k)
        linear = LogisticRegression(features[inside], targets[inside], num_classes).fit(L2)
        logits = (features[outside] @ linear.weight.T + linear.bias).double()
        found[fold == k] = logits.softmax(dim=1).numpy()
    return found


def _fitted_rows(labels: Labels, allowed: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The allowed rows, or a stratified part of them if they are very many."""
    rows = np.flatnonzero(allowed)
    if len(rows) <= _MAX_FIT:
        return rows
    return rows[stratified(labels[rows], _MAX_FIT / len(rows), 0, "probe")[1]]


def label_quality(labels: Labels, probabilities: Probabilities) -> Probabilities:
    """The normalised margin of each label, N, 0 (certainly wrong) to 1: (p of the label - largest other p + 1) / 2."""
    rows = np.arange(len(labels))
    others = probabilities.copy()
    others[rows, labels] = -np.inf
    return np.asarray((probabilities[rows, labels] - others.max(axis=1) + 1) / 2)


def thresholds(labels: Labels, probabilities: Probabilities) -> Probabilities:
    """K: the mean probability of each class over the images that are labelled with it; each class has one."""
    sums = np.zeros(probabilities.shape[1])
    np.add.at(sums, labels, probabilities[np.arange(len(labels)), labels])
    return np.asarray(sums / np.bincount(labels, minlength=len(sums)))


def off_diagonal(labels: Labels, probabilities: Probabilities) -> npt.NDArray[np.bool_]:
    """N: whether an image counts off the diagonal of the confident joint: of the classes whose threshold it reaches the
    most probable is not its label. It must also be the most probable of all, more than the label is."""
    confident = probabilities >= thresholds(labels, probabilities) - 1e-6
    masked = np.where(confident, probabilities, -1.0)
    best = masked.argmax(axis=1)
    wrong = confident.any(axis=1) & (best != labels)
    return np.asarray(wrong & (probabilities.argmax(axis=1) != labels))


def simple_features(scan: Scan) -> Tensor:
    """Features N F without a network: random Fourier features of small pixels and of histograms of gradients.

    A linear probe on them is a kernel classifier (Rahimi, Recht, "Random features for large-scale kernel machines",
    2007) of shape (Dalal, Triggs, "Histograms of oriented gradients for human detection", 2005) and colour. On scanned
    digits and clothes it comes close to a small network; on photographs of objects it knows little, which shows in few
    confident predictions and so in few suspect labels.
    """
    thumbs = torch.from_numpy(scan.thumbs)
    parts = []
    for part, colour in zip(thumbs.split(256), torch.from_numpy(scan.colours).split(256), strict=True):
        grey = part.float() / 255
        small = torch.nn.functional.avg_pool2d(grey[:, None], 8).flatten(1)
        parts.append(torch.cat([_unit(gradients(grey)), _unit(small), 0.5 * _unit(colour.float().flatten(1))], dim=1))
    values = torch.cat(parts)
    classes = len(np.unique(scan.labels))
    count = _PROJECTIONS if classes <= _MAX_CLASSES else _PROJECTIONS // 4
    draw = torch.Generator().manual_seed(0)
    sample = values[torch.randperm(len(values), generator=draw)[:500]]
    # The median distance: the usual width of a kernel whose scale is not known.
    width = torch.cdist(sample, sample).flatten().median().clamp_min(1e-3)
    directions = torch.randn(values.shape[1], count, generator=draw) * (1.5 / width)
    phases = 2 * torch.pi * torch.rand(count, generator=draw)
    return torch.cat([torch.cos(part @ directions + phases) for part in values.split(4096)])


def _unit(values: Tensor) -> Tensor:
    """Rows centred on the mean row of the part, of length 1."""
    return torch.nn.functional.normalize(values, dim=1)


def gradients(grey: Tensor) -> Tensor:
    """Histograms of oriented gradients: 8 x 8 cells of 9 orientations, P 576, of images P 64 64."""
    dx, dy = torch.zeros_like(grey), torch.zeros_like(grey)
    dx[:, :, 1:-1] = grey[:, :, 2:] - grey[:, :, :-2]
    dy[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
    strength = (dx.square() + dy.square()).sqrt()
    angle = torch.atan2(dy, dx).remainder(torch.pi) * (9 / torch.pi)
    low = angle.floor().clamp(0, 8)
    share = angle - low
    maps = torch.zeros(len(grey), 9, *grey.shape[1:])
    maps.scatter_(1, low.long()[:, None], (strength * (1 - share))[:, None])
    maps.scatter_add_(1, ((low + 1) % 9).long()[:, None], (strength * share)[:, None])
    cells = torch.nn.functional.avg_pool2d(maps, 8)
    norm = torch.nn.functional.avg_pool2d(cells.square().sum(dim=1, keepdim=True), 3, 1, 1).sqrt()
    return (cells / (norm + 1e-2)).clamp_max(0.4).flatten(1)
