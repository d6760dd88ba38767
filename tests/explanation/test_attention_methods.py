"""Maps from attention weights against timm's weights with dense matrices, and against torchcam.

The dense matrices are written out here: one N x N matrix per block over all tokens of the feature map, zero outside the
windows; patch merging is a matrix too.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.test_intermediates import SWINS, VITS, weights_of_timm
from models.test_parity import VIT, pair, randomize
from tolerance import assert_near
from vitrail.explanation.methods.attention import relevance
from vitrail.explanation.methods.method import Request
from vitrail.models.attention_weights import AttentionStep, attention_model, attention_steps
from vitrail.models.build import build_model
from vitrail.models.configs import SwinConfig, ViTConfig

Size = tuple[int, int]
Grid = tuple[int, int]

LARGE = (192, 320)
POOLED: dict[str, ViTConfig] = {
    **VITS,
    "class token and average pooling": ViTConfig(img_size=(32, 32), global_pool="avg", **VIT),
}


def target(logits: Tensor) -> Tensor:
    """One class minus another."""
    return logits[:, 1] - logits[:, 4]


def request(model: nn.Module, images: Tensor, **options: Any) -> Request:
    return Request(model, images, target, **options)


def gradients_of_timm(model: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The weights of every block, and the target's gradient with respect to them."""
    with weights_of_timm(model) as weights:
        score = target(model(images)).sum()
    return [(one.detach(), grad) for one, grad in zip(weights, torch.autograd.grad(score, weights), strict=True)]


def read_by_head(config: ViTConfig, tokens: int) -> Tensor:
    shares, prefix = torch.zeros(tokens), config.num_prefix_tokens
    if config.global_pool == "avg":
        shares[prefix:] = 1 / (tokens - prefix)
    else:
        shares[: 2 if config.dist_token else 1] = 0.5 if config.dist_token else 1
    return shares


def patches(config: ViTConfig, size: Size, tokens: Tensor) -> Tensor:
    grid = (size[0] // config.patch_size, size[1] // config.patch_size)
    return tokens[:, config.num_prefix_tokens :].unflatten(1, grid)


@pytest.mark.parametrize("size", [(32, 32), (40, 24)], ids=str)
@pytest.mark.parametrize("config", POOLED.values(), ids=POOLED)
def test_relevance_of_vit_is_the_dense_product(config: ViTConfig, size: Size) -> None:
    """Equations 5 and 6 of arXiv 2103.15679, with the weights and gradients of timm."""
    ours, theirs = (model.eval() for model in pair(replace(config, img_size=size)))
    images = torch.randn(2, 3, *size)
    blocks = gradients_of_timm(theirs, images)
    product = torch.eye(blocks[0][0].shape[-1])  # R of the paper, N N
    for weights, gradient in blocks:
        product = product + (gradient * weights).clamp(min=0).mean(1) @ product
    expected = patches(config, size, read_by_head(config, product.shape[-1]) @ product)
    assert_near(relevance(request(ours, images)), expected)


def dense(weights: Tensor, size: Grid, window: Grid, shifted: bool) -> Tensor:
    """Matrices (B M) n n in windows as B (h w) (h w): the map is padded to whole windows and then rolled."""
    window = (min(window[0], size[0]), min(window[1], size[1]))
    token = torch.full([-(-side // length) * length for side, length in zip(size, window, strict=True)], -1)
    token[: size[0], : size[1]] = torch.arange(size[0] * size[1]).view(size)
    if shifted:
        roll = [-(length // 2) if side > length else 0 for side, length in zip(size, window, strict=True)]
        token = token.roll(roll, (0, 1))
    token = token.view(token.shape[0] // window[0], window[0], -1, window[1]).transpose(1, 2).flatten(2).flatten(0, 1)
    matrices = torch.zeros(len(weights) // len(token), size[0] * size[1] + 1, size[0] * size[1] + 1)
    index = token.repeat(len(matrices), 1)
    image = torch.arange(len(matrices)).repeat_interleave(len(token))
    matrices[image[:, None, None], index[:, :, None], index[:, None, :]] = weights  # padding: the last row and column
    return matrices[:, :-1, :-1]


def merging(size: Grid) -> Tensor:
    """(h/2 w/2) (h w): 1/4 at the sources of each merged token."""
    matrix = torch.zeros(-(-size[0] // 2), -(-size[1] // 2), *size)
    for row in range(size[0]):
        for column in range(size[1]):
            matrix[row // 2, column // 2, row, column] = 0.25
    return matrix.flatten(2).flatten(0, 1)


def dense_swin(config: SwinConfig, size: Size, blocks: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The map B h w of the first stage from the weights and gradients of every block, by dense matrices."""
    grid = (-(-size[0] // config.patch_size), -(-size[1] // config.patch_size))
    grids = [grid]
    for _ in config.depths[1:]:
        grids.append((-(-grids[-1][0] // 2), -(-grids[-1][1] // 2)))
    r = torch.full((1, 1, grids[-1][0] * grids[-1][1]), 1 / (grids[-1][0] * grids[-1][1]))
    remaining = list(blocks)
    for stage in reversed(range(len(grids))):
        built = [-(-side // (config.patch_size * 2**stage)) for side in config.img_size]
        window = (min(built[0], config.window_size), min(built[1], config.window_size))
        for index in reversed(range(config.depths[stage])):
            weights, gradient = remaining.pop()
            r = r + r @ dense((weights * gradient).clamp(min=0).mean(1), grids[stage], window, index % 2 == 1)
        if stage:
            r = r @ merging(grids[stage - 1])
    assert not remaining
    return r.view(-1, *grid)


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (8, 16)], ids=str)
def test_relevance_of_swin_is_dense_with_timms_weights(size: Size) -> None:
    config = replace(SWINS["swin"], img_size=size)
    ours, theirs = (model.eval() for model in pair(config))
    images = torch.randn(2, 3, *size)
    expected = dense_swin(config, size, gradients_of_timm(theirs, images))
    assert_near(relevance(request(ours, images)), expected)


PUBLISHED: dict[str, Any] = {"patch_size": 4, "embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)}


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (SWINS["swin"], (36, 20)),
        (SWINS["swin"], (18, 50)),
        (SwinConfig(img_size=(224, 224), num_classes=5, **PUBLISHED), (250, 250)),
    ],
    ids=["36x20", "18x50", "250x250"],
)
def test_relevance_of_a_padded_swin_is_dense(config: SwinConfig, size: Size) -> None:
    """Odd sides in partition and merging. timm pads otherwise: the weights, tested elsewhere, are ours."""
    model = build_model(config).eval()
    randomize(model)
    images = torch.randn(1, 3, *size)
    steps = [s for s in attention_steps(attention_model(model), images) if isinstance(s, AttentionStep)]
    score = target(model.forward_head(model.norm(steps[-1].output))).sum()
    assert_near(target(model(images)).sum()[None], score[None])
    weights = [step.weights for step in steps]
    blocks = [(one.detach(), grad) for one, grad in zip(weights, torch.autograd.grad(score, weights), strict=True)]
    assert_near(relevance(request(model, images)), dense_swin(config, size, blocks))
