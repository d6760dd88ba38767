"""How far a map tells what the model uses: the image is changed in the order of the map, and the output is watched.

Deletion and insertion: Petsiuk et al., "RISE: Randomized Input Sampling for Explanation of Black-box Models", 2018
(https://arxiv.org/abs/1806.07421), over patches instead of pixels, beside random orders of the same patches.

Shapes: B batch, J changed copies of an image, I channels, H W height and width of the image, h w height and width of a
grid of cells, K classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitrail.errors import ConfigError, did_you_mean
from vitrail.explanation.targets import Target

# Points of a curve, between the whole image and none of it. After a tenth, evidence in a few cells is gone if the map
# found it, and seldom in a random order; after a half, so is evidence that is spread.
FRACTIONS = (0.1, 0.5)
RANDOM = 20  # random orders: 10 and their reverses
FORWARDS = 2 + (2 + RANDOM) * len(FRACTIONS)  # images that the model sees for one score: 46
FINEST, POOLED = 28, 14  # cells along the longer side: a grid of more than 28 is pooled to at most 14
BLUR = 1 / 20  # standard deviation of the blur, of the longer side: 11 pixels of 224

SURE = 99.0  # percentile from which a map is called better than a random one

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Faithfulness:
    """How the output follows the map of one image, in units of `Target.measure` (a probability, or a difference of
    logits).

    deletion: mean output while cells are deleted, the most relevant first; a good map makes it small. insertion: while
    they are inserted, the most relevant first; a good map makes it large. score: insertion - deletion. Inserting the
    most relevant first passes through the images of deleting the least relevant first, so the score is also the area
    between these two deletion curves. random_mean, random_std: of the scores of 20 random orders; the mean is 0, since
    a reversed order has the negative score. percentile: share of them below the score, 0 to 100.
    """

    score: float
    deletion: float
    insertion: float
    random_mean: float
    random_std: float
    percentile: float

    @property
    def beats_random(self) -> bool:
        """Whether the score is at or above the 99th percentile of random orders."""
        return self.percentile >= SURE

    @property
    def z(self) -> float:
        """How many standard deviations of random orders the score is above their mean. 0 or infinite if all have the
        same score."""
        above = self.score - self.random_mean
        if self.random_std == 0:
            return math.copysign(math.inf, above) if above else 0.0
        return above / self.random_std


def measure(
    logits_fn: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    target: Target,
    baseline: str = "mean",
    fractions: Sequence[float] = FRACTIONS,
    batch_size: int = 16,
) -> list[Faithfulness]:
    """The faithfulness of each map. The same image and map give the same numbers, in any batch; no random state of the
    process is read or changed.

    Args:
        logits_fn: normalised images to logits, N I H W to N K. It is called with at most `batch_size` images, and with
            `FORWARDS` images in total for one score.
        images: normalised, B I H W.
        maps: B h w, the larger the more relevant; cells of ceil(H / h) pixels. More than 28 cells along a side are
            averaged to at most 14.
        target: of the unchanged image; the class of each is kept for its copies.
        baseline: what replaces a deleted cell: "mean" for the mean colour (zero), "blur" for the blurred image.
        fractions: of the cells that are deleted at the points of a curve, increasing, without the ends 0 and 1.

    Raises:
        ConfigError: unknown baseline.
    """
    replace = choose_baseline(baseline)
    results = []
    with torch.no_grad():
        for image, cells in zip(images, maps, strict=True):
            values, side = grid_of(cells, image.shape[1])
            counts = [0, *(max(1, round(part * values.numel())) for part in fractions), values.numel()]
            deleted = torch.from_numpy(_deleted_cells(values.flatten().cpu().double().numpy(), counts))
            masks = deleted.unflatten(1, values.shape).to(image.device)
            blank = replace(image)
            logits = [
                logits_fn(torch.where(_in_pixels(part, side, image), blank, image)).float()
                for part in masks.split(batch_size)
            ]
            outputs = torch.cat(logits)
            measured = target.fixed(outputs[:1]).measure(outputs)
            results.append(_summary(measured.double().cpu(), torch.tensor(counts) / values.numel()))
    return results


def grid_of(cells: Tensor, height: int) -> tuple[Tensor, int]:
    """A map h w of an image of this height to the cells that are deleted as a whole, and the side of one in pixels."""
    side, longer = -(-height // cells.shape[0]), max(cells.shape)
    if longer <= FINEST:
        return cells, side
    factor = -(-longer // POOLED)
    return F.avg_pool2d(cells[None], factor, ceil_mode=True, count_include_pad=False)[0], side * factor


def _deleted_cells(values: Array, counts: list[int]) -> NDArray[np.bool_]:
    """Which cells are deleted in each copy, J (h w): none, all, and at the points of the curves of `_orders`.

    counts: how many cells are deleted at the points, the ends included.
    """
    ranks = np.argsort(_orders(values), axis=1)  # when each cell is deleted
    curves = (ranks[:, None] < np.array(counts[1:-1])[:, None]).reshape(-1, len(values))
    return np.concatenate([np.zeros((1, len(values)), bool), np.ones((1, len(values)), bool), curves])


def _orders(values: Array) -> NDArray[np.int64]:
    """Orders of deletion, in pairs of an order and its reverse: of the map, the most relevant first, and random ones.

    Equal values, such as the zeros of a map, are in random order, so that no place in the image is preferred.
    """
    generator = np.random.default_rng(0)
    ties, *shuffled = (generator.permutation(len(values)) for _ in range(1 + RANDOM // 2))
    orders = [np.lexsort((ties, -values)), *shuffled]
    return np.stack([each for order in orders for each in (order, order[::-1])])


def _in_pixels(masks: Tensor, side: int, image: Tensor) -> Tensor:
    """J h w -> J 1 H W."""
    pixels = masks.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)
    return pixels[:, None, : image.shape[1], : image.shape[2]]


def _summary(outputs: Tensor, fractions: Tensor) -> Faithfulness:
    """outputs: of the copies in the order of `_deleted_cells`. fractions: deleted at the points, the ends included."""
    whole, blank, inner = outputs[:1], outputs[1:2], outputs[2:].unflatten(0, (2 + RANDOM, -1))
    curves = torch.cat([whole.expand(len(inner), 1), inner, blank.expand(len(inner), 1)], dim=1)
    first, last = torch.trapezoid(curves, fractions.double()).unflatten(0, (-1, 2)).unbind(1)
    scores = last - first  # of the map, and of one order of each random pair; the reversed order has the negative
    random = torch.cat([scores[1:], -scores[1:]])
    return Faithfulness(
        score=scores[0].item(),
        deletion=first[0].item(),
        insertion=last[0].item(),
        random_mean=random.mean().item(),
        random_std=random.std(correction=0).item(),
        percentile=100 * (random < scores[0]).double().mean().item(),
    )


def _blurred(image: Tensor) -> Tensor:
    from scipy.ndimage import gaussian_filter  # type: ignore[import-untyped,unused-ignore]

    sigma = BLUR * max(image.shape[1:])
    pixels = gaussian_filter(image.float().cpu().numpy(), (0, sigma, sigma), mode="nearest")
    return torch.from_numpy(pixels).to(image)


BASELINES: dict[str, Callable[[Tensor], Tensor]] = {"mean": torch.zeros_like, "blur": _blurred}


def choose_baseline(name: str) -> Callable[[Tensor], Tensor]:
    """From an image I H W to what replaces its deleted cells. Raises ConfigError for an unknown name."""
    if name not in BASELINES:
        raise ConfigError(f"baseline {name!r}{did_you_mean(name, BASELINES)}: use {' or '.join(BASELINES)}")
    return BASELINES[name]
