"""Do two thumbnails show the same pixels? They are aligned, and compared in what is left of coarse and fine structure.

Alignment is by Gauss-Newton steps on scale and offset of both axes (Lucas and Kanade, "An iterative image registration
technique with an application to stereo vision", 1981), from coarse to fine.
Shapes: P pairs, S side of a thumbnail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data.duplicates.hashes import Candidate, apply_symmetry, map_on_threads
from vitrail.images.convert import Pixels

# Sides at which to align, steps there, and the correlation below which a pair is given up.
_STEPS = ((16, 6, 0.65), (32, 4, 0.8), (64, 4, 0.0))
_ALIKE = 0.95  # the same of pairs that are compared as they are
_BATCH = 128  # pairs at once
_NONE = (torch.zeros(0),) * 5  # the columns of Likeness, of no pair
_SMALLEST, _LARGEST = 0.7, 1.06  # scale of a window that is accepted


@dataclass(frozen=True)
class Likeness:
    """How alike P pairs are, after alignment: each P.

    coarse, fine: the correlation of the thumbnails, and of what a blur takes away from them. block: the largest
    difference of the means of two 8 x 8 blocks, in levels. residual: the root mean square difference of the fine parts,
    in levels. scale: of the window of the first image that the second shows, 1 for the whole.
    """

    coarse: Tensor
    fine: Tensor
    block: Tensor
    residual: Tensor
    scale: Tensor


def compare(thumbs: Pixels, candidates: Sequence[Candidate], *, align: bool) -> Likeness:
    """Compare candidates; without `align`, as they are."""
    parts = [candidates[start : start + _BATCH] for start in range(0, len(candidates), _BATCH)]
    found = map_on_threads(lambda part: _compare_part(thumbs, part, align), parts)
    return Likeness(*(torch.cat(columns) for columns in zip(*found, strict=True))) if found else Likeness(*_NONE)


def _compare_part(thumbs: Pixels, part: Sequence[Candidate], align: bool) -> list[Tensor]:
    """The columns of Likeness."""
    first = torch.from_numpy(thumbs[[c.first for c in part]]).float()
    second = torch.from_numpy(thumbs[[c.second for c in part]]).float()
    symmetries = torch.tensor([c.symmetry for c in part])
    for symmetry in symmetries.unique().tolist():
        second[symmetries == symmetry] = apply_symmetry(second[symmetries == symmetry], symmetry)
    place = torch.tensor([_place(c) for c in part])
    if align:
        place, kept = _align(first, second, place)
    else:
        a, b = (F.adaptive_avg_pool2d(x[:, None], _STEPS[0][0])[:, 0] for x in (first, second))
        kept = torch.nonzero(_correlation(a, b, torch.ones_like(a)) > _ALIKE)[:, 0]
        place = place[kept]
    columns = [torch.zeros(len(part)) for _ in _NONE]
    for column, values in zip(columns, _likeness(first[kept], second[kept], place, align), strict=True):
        column[kept] = values
    return columns


def _place(candidate: Candidate) -> tuple[float, float, float, float]:
    """Scale and offset of x and y, in coordinates from -1 to 1."""
    scale, y, x = candidate.window
    return scale, scale, 2 * x + scale - 1, 2 * y + scale - 1


def _sample(images: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Windows of images P S S, resampled to S S, and a mask of what lies inside of the images."""
    side = images.shape[-1]
    at = (torch.arange(side) + 0.5) / side * 2 - 1
    x = at * place[:, 0:1] + place[:, 2:3]
    y = at * place[:, 1:2] + place[:, 3:4]
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    found = F.grid_sample(images[:, None], grid, mode="bilinear", padding_mode="border", align_corners=False)[:, 0]
    inside = (grid.abs() <= 1 - 0.5 / side).all(dim=-1)
    return found, inside


def _standard(images: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 under the mask, 0 elsewhere."""
    count = mask.sum(dim=(1, 2), keepdim=True).clamp_min(1)
    centred = (images - (images * mask).sum(dim=(1, 2), keepdim=True) / count) * mask
    return centred / (centred.square().sum(dim=(1, 2), keepdim=True) / count).sqrt().clamp_min(1e-3)


def _align(first: Tensor, second: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """The places Q 4 at which `first` fits `second` best, of the Q pairs that may be alike, and their rows Q."""
    kept = torch.arange(len(first))
    for side, steps, least in _STEPS:
        a, b = (F.adaptive_avg_pool2d(x[kept, None], side)[:, 0] for x in (first, second))
        for _ in range(steps):
            place = _gauss_newton(a, b, place)
        view, inside = _sample(a, place)
        promising = _correlation(view, b, inside.float()) >= least
        kept, place = kept[promising], place[promising]
        if not len(kept):
            break
    return place, kept


def _gauss_newton(a: Tensor, b: Tensor, place: Tensor) -> Tensor:
    """One step towards the place at which `a` fits `b`."""
    side = a.shape[-1]
    at = (torch.arange(side) + 0.5) / side * 2 - 1
    view, inside = _sample(a, place)
    weight = inside.float()
    view, target = _standard(view, weight), _standard(b, weight)
    # Derivatives by output coordinates, from -1 to 1; divided by scale they are those by place.
    dx, dy = torch.zeros_like(view), torch.zeros_like(view)
    dx[:, :, 1:-1] = (view[:, :, 2:] - view[:, :, :-2]) * (side / 4) / place[:, 0, None, None]
    dy[:, 1:-1] = (view[:, 2:] - view[:, :-2]) * (side / 4) / place[:, 1, None, None]
    dx, dy = dx * weight, dy * weight
    jacobian = torch.stack([dx * at, dy * at[:, None], dx, dy], dim=1).flatten(2)
    error = ((target - view) * weight).flatten(1)
    normal = jacobian @ jacobian.mT
    damping = 1e-3 * normal.diagonal(dim1=1, dim2=2).mean(dim=1) + 1e-6
    change = torch.linalg.solve(normal + damping[:, None, None] * torch.eye(4), jacobian @ error[..., None])[..., 0]
    place = place + change.clamp(-0.1, 0.1)
    return torch.cat([place[:, :2].clamp(0.6, 1.2), place[:, 2:].clamp(-0.6, 0.6)], dim=1)


def _correlation(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Of images P S S under a mask: P."""
    return (_standard(a, mask) * _standard(b, mask)).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp_min(1)


def _likeness(first: Tensor, second: Tensor, place: Tensor, aligned: bool) -> tuple[Tensor, ...]:
    if aligned:
        view, inside = _sample(first, place)
        mask = inside.float()
    else:
        view, mask = first, torch.ones_like(first)
    share = mask.mean(dim=(1, 2))
    coarse = _correlation(view, second, mask)
    high = [x - F.avg_pool2d(x[:, None], 5, 1, 2, count_include_pad=False)[:, 0] for x in (view, second)]
    fine = _correlation(high[0], high[1], mask)
    residual = (((high[0] - high[1]).square() * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp_min(1)).sqrt()
    count = F.avg_pool2d(mask[:, None], 8)[:, 0]
    blocks = F.avg_pool2d(((view - second) * mask)[:, None], 8)[:, 0] / count.clamp_min(1e-3)
    block = (blocks.abs() * (count > 0.5)).amax(dim=(1, 2))
    sizes = place[:, :2]
    bad = (sizes.amin(dim=1) < _SMALLEST) | (sizes.amax(dim=1) > _LARGEST) | (share < 0.85)
    bad |= (sizes[:, 0] / sizes[:, 1] - 1).abs() > 0.12
    if aligned:
        coarse = torch.where(bad, -1.0, coarse)
    return coarse, fine, block, residual, sizes.mean(dim=1)
