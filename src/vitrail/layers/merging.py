"""Token merging: Bolya et al., "Token Merging: Your ViT But Faster", 2022 (https://arxiv.org/abs/2210.09461).

Between attention and MLP of a block, the patch tokens are split in two sets by turns; every token of the first set is
matched with the token of the second set whose key is nearest; the `r` best pairs become one token each, their mean
weighted by the number of patches that they stand for (their size). Attention counts a token of size s as s tokens, by
log s added to its scores. Prefix tokens are never merged. Tokens keep their order, so that neighbours stay in different
sets.

Only operations with fixed shapes are used, which every runtime has: sort, gather and matrix products.

Shapes: B batch, H heads, N tokens (prefix, then patches), r merged tokens, M = N - r, D width of a head, C width,
P patches of the image.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """Tokens of the first set, by rising distance to their partners in the second. Indices of tokens are int64."""

    distance: Tensor  # B n, half the squared distance of their keys
    token: Tensor  # B n
    partner: Tensor  # B n


class Groups(NamedTuple):
    """What the tokens of a block stand for.

    size: B N, the number of patches, 1 for prefix tokens. None: 1 for all.
    part_of: B (prefix + P), for every token of the first block the one that it is part of now. None if not needed.
    """

    size: Tensor | None = None
    part_of: Tensor | None = None


def find_pairs(keys: Tensor, prefix: int) -> Pairs:
    """Bipartite soft matching of the patch tokens by their keys B H N D: n = (N - prefix) / 2, rounded up.

    The distance is that of the mean keys over heads. The paper takes the cosine; distances keep the logits closer
    (docs/merging.md), and they are the same for keys without their bias, which changes no attention weight and is
    dropped for deployment. Of equal distances the first is taken. At least two patch tokens are needed.
    """
    batch, heads, tokens, width = keys.shape
    # By a product, since runtimes keep the layout of the keys for it: 6 % of OpenVINO's time in bfloat16.
    average = torch.eye(width, dtype=keys.dtype, device=keys.device).repeat(heads, 1) / heads
    mean = keys.detach().transpose(1, 2).flatten(2) @ average
    mean = (mean - mean.mean(dim=1, keepdim=True))[:, prefix:]  # rounding grows with the length, which a bias adds to
    half = (mean * mean).sum(dim=2) / 2
    a, b = mean[:, 0::2], mean[:, 1::2]
    # a^2 / 2 + b^2 / 2 - a b is half the squared distance
    nearest, partner = (half[:, None, 1::2] - a @ b.transpose(1, 2)).min(dim=2)
    distance, order = _sort(half[:, 0::2] + nearest)
    places = torch.arange(prefix, tokens, device=keys.device).expand(batch, -1)
    return Pairs(distance, places[:, 0::2].gather(1, order), places[:, 1::2].gather(1, partner.gather(1, order)))


def _sort(values: Tensor) -> tuple[Tensor, Tensor]:
    """Each row ascending, and the indices; equal values keep their order. Without the option that says so in a graph
    for export, as torch has no translation of it: the sort of ONNX always keeps the order."""
    exporting = torch.compiler.is_exporting()
    return torch.sort(values, dim=1) if exporting else torch.sort(values, dim=1, stable=True)


def merge(x: Tensor, groups: Groups, pairs: Pairs, r: int, prefix: int) -> tuple[Tensor, Groups]:
    """Merge the first r pairs of tokens B N C to their means weighted by size: B M C, and what the tokens stand for.

    The identity for r = 0.

    Raises:
        ValueError: there are fewer than r pairs.
    """
    if r == 0:
        return x, groups
    batch, tokens = x.shape[:2]
    if r > (tokens - prefix) // 2:
        raise ValueError(f"merge={r} of {tokens - prefix} patch tokens: at most half can go")
    places = torch.arange(tokens, device=x.device).expand(batch, -1)
    merged, into = pairs.token[:, :r], pairs.partner[:, :r]
    kept = torch.cat([places[:, :prefix], pairs.token[:, r:], places[:, prefix + 1 :: 2]], dim=1).sort(dim=1).values
    order = torch.cat([kept, merged], dim=1)
    size = torch.ones_like(x[..., 0]) if groups.size is None else groups.size
    own, gone = size.gather(1, order).split([tokens - r, r], dim=1)
    added = (kept[:, :, None] == into[:, None, :]).to(x.dtype) * gone[:, None, :]  # B M r
    total = own + added.sum(dim=2)
    x, partners = take(x, order).split([tokens - r, r], dim=1)
    x = x * (own / total)[..., None] + (added / total[..., None]) @ partners
    if groups.part_of is None:
        return x, Groups(total)
    new = places.scatter(1, kept, places[:, : tokens - r])  # for each of N tokens its index after the merging
    new = new.scatter(1, merged, new.gather(1, into))
    return x, Groups(total, new.gather(1, groups.part_of))


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each item: x B N C, index B M to B M C. By one index over all rows, which runtimes copy row by row."""
    batch, tokens = x.shape[:2]
    offsets = torch.arange(batch, device=x.device)[:, None] * tokens
    rows = x.flatten(0, 1).index_select(0, (index + offsets).flatten())
    return rows.view(batch, index.shape[1], x.shape[2])


def first_groups(x: Tensor) -> Groups:
    """What the tokens B N C of the first block stand for, themselves, with the index of each."""
    return Groups(part_of=torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1))


def spread(x: Tensor, groups: Groups) -> Tensor:
    """Tokens B M C to those that the first block had, B N C, each with the value of the one that it is part of now.

    Their mean is the mean weighted by size. The identity if `groups` has no `part_of`.
    """
    return x if groups.part_of is None else take(x, groups.part_of)


def score_bias(groups: Groups) -> Tensor | None:
    """log size, which is added to the attention scores of the keys: B 1 1 N; None where all sizes are 1."""
    return None if groups.size is None else groups.size.log()[:, None, None]
