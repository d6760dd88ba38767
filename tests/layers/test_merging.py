"""Token merging against a literal reading of the paper, and against what merging equal tokens must give."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tolerance import assert_near
from vitrail.layers.attention import Attention
from vitrail.layers.merging import Groups, find_pairs, first_groups, merge, score_bias, spread


def literal(x: Tensor, keys: Tensor, size: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, list[list[int]]]:
    """One image, token by token: x N C, keys H N D, size N to the merged tokens, their sizes and their members."""
    tokens, metric = x.double().numpy(), keys.double().mean(0).numpy()
    first, second = range(prefix, len(tokens), 2), range(prefix + 1, len(tokens), 2)
    edges = []
    for a in first:
        distances = [np.sum((metric[a] - metric[b]) ** 2) for b in second]
        edges.append((min(distances), a, second[int(np.argmin(distances))]))
    members = {token: [token] for token in range(len(tokens))}
    for _, a, b in sorted(edges)[:r]:
        members[b] += members.pop(a)
    groups = [members[token] for token in sorted(members)]
    sizes = [sum(float(size[token]) for token in group) for group in groups]
    means = [sum(float(size[t]) * tokens[t] for t in group) / total for group, total in zip(groups, sizes, strict=True)]
    return torch.tensor(np.array(means)), torch.tensor(sizes), groups


@pytest.mark.parametrize(("tokens", "prefix", "r"), [(17, 1, 8), (17, 1, 1), (18, 1, 8), (20, 4, 5), (12, 0, 6)])
def test_merging_is_what_the_paper_says(tokens: int, prefix: int, r: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, keys = torch.randn(3, tokens, 6, generator=generator), torch.randn(3, 2, tokens, 4, generator=generator)
    size = torch.randint(1, 5, (3, tokens), generator=generator).float()
    index = torch.arange(tokens).expand(3, -1)
    merged, groups = merge(x, Groups(size, index), find_pairs(keys, prefix), r, prefix)
    assert groups.size is not None
    assert groups.part_of is not None
    for i in range(3):
        means, sizes, members = literal(x[i], keys[i], size[i], r, prefix)
        assert_near(merged[i], means.float())
        assert torch.equal(groups.size[i], sizes.float())
        assert [[t for t in range(tokens) if groups.part_of[i, t] == g] for g in range(tokens - r)] == [
            sorted(group) for group in members
        ]


def test_merging_nothing_is_the_identity() -> None:
    x, groups = torch.randn(2, 9, 4), Groups()
    same, after = merge(x, groups, find_pairs(torch.randn(2, 1, 9, 4), 1), 0, 1)
    assert same is x
    assert after is groups


def test_more_than_half_is_refused() -> None:
    pairs = find_pairs(torch.randn(1, 1, 10, 4), 1)
    with pytest.raises(ValueError, match="merge=5 of 9 patch tokens"):
        merge(torch.randn(1, 10, 4), Groups(), pairs, 5, 1)


def test_of_equal_distances_the_first_is_taken() -> None:
    pairs = find_pairs(torch.ones(1, 2, 41, 4), 1)
    assert pairs.token.tolist() == [list(range(1, 41, 2))]
    assert pairs.partner.tolist() == [[2] * 20]


def test_a_bias_of_the_keys_changes_no_pair() -> None:
    keys = torch.randn(4, 3, 65, 16)
    for one, other in zip(find_pairs(keys, 1), find_pairs(keys + 5 * torch.randn(3, 1, 16), 1), strict=True):
        assert torch.allclose(one.float(), other.float(), atol=1e-4)


def test_a_token_of_size_s_is_attended_to_as_s_tokens() -> None:
    attention = Attention(12, 3).double()
    x = torch.randn(2, 5, 12, dtype=torch.double)
    counts = torch.tensor([1, 4, 2, 1, 3])
    groups = Groups(counts.double().expand(2, -1))
    merged, _ = attention.forward_with_keys(x, bias=score_bias(groups))
    each = attention(x.repeat_interleave(counts, dim=1))
    torch.testing.assert_close(merged, each[:, counts.cumsum(0) - 1])


def test_the_mean_of_spread_tokens_is_weighted_by_size() -> None:
    x = torch.randn(2, 16, 5)
    merged, groups = merge(x, first_groups(x), find_pairs(x[:, None], 0), 6, 0)
    assert groups.size is not None
    assert merged.shape == (2, 10, 5)
    assert spread(merged, groups).shape == x.shape
    assert_near(spread(merged, groups).mean(dim=1), x.mean(dim=1))
    assert_near((merged * groups.size[..., None]).sum(dim=1) / 16, x.mean(dim=1))


def test_gradients_are_those_of_the_means() -> None:
    keys = torch.randn(2, 2, 9, 4, dtype=torch.double)
    x = torch.randn(2, 9, 3, dtype=torch.double, requires_grad=True)
    pairs = find_pairs(keys, 1)
    size = torch.randint(1, 4, (2, 9)).double()
    assert torch.autograd.gradcheck(lambda x: merge(x, Groups(size), pairs, 3, 1)[0], x)
    assert not find_pairs(keys.requires_grad_(), 1).distance.requires_grad
