"""Maps from attention weights against timm's weights with dense matrices, and against torchcam.

The dense matrices are written out here: one N x N matrix per block over all tokens of the feature map, zero outside the
windows; patch merging is a matrix too.
"""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchcam.methods import LeGrad
from torchvision.models import VisionTransformer

from models.test_intermediates import SWINS, VITS, state, weights_of_timm
from models.test_parity import VIT, pair, randomize
from tolerance import assert_near
from vitrail.errors import ModelError
from vitrail.explanation.methods.attention import attention, attention_heads, legrad, relevance, rollout, tokens
from vitrail.explanation.methods.method import Request
from vitrail.models.attention_weights import AttentionStep, attention_model, attention_steps
from vitrail.models.base import ImageModel
from vitrail.models.build import build_model
from vitrail.models.configs import ResNetConfig, SwinConfig, ViTConfig
from vitrail.weights.formats.detect import convert_names
from vitrail.weights.tensors import Tensors

Size = tuple[int, int]
Grid = tuple[int, int]

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
    """Equations 5 and 6 of arXiv 2103.15679 with timm's weights and gradients, less what the tokens start with."""
    ours, theirs = (model.eval() for model in pair(replace(config, img_size=size)))
    images = torch.randn(2, 3, *size)
    blocks = gradients_of_timm(theirs, images)
    product = torch.eye(blocks[0][0].shape[-1])  # R of the paper, N N
    for weights, gradient in blocks:
        product = product + (gradient * weights).clamp(min=0).mean(1) @ product
    start = read_by_head(config, product.shape[-1])
    expected = patches(config, size, start @ product - start)
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
    """The map B h w of the first stage, less what its tokens start with, by dense matrices.

    blocks: the weights and gradients of every block.
    """
    grid = (-(-size[0] // config.patch_size), -(-size[1] // config.patch_size))
    grids = [grid]
    for _ in config.depths[1:]:
        grids.append((-(-grids[-1][0] // 2), -(-grids[-1][1] // 2)))
    r = start = torch.full((1, 1, grids[-1][0] * grids[-1][1]), 1 / (grids[-1][0] * grids[-1][1]))
    remaining = list(blocks)
    for stage in reversed(range(len(grids))):
        built = [-(-side // (config.patch_size * 2**stage)) for side in config.img_size]
        window = (min(built[0], config.window_size), min(built[1], config.window_size))
        for index in reversed(range(config.depths[stage])):
            weights, gradient = remaining.pop()
            r = r + r @ dense((weights * gradient).clamp(min=0).mean(1), grids[stage], window, index % 2 == 1)
        if stage:
            r, start = r @ merging(grids[stage - 1]), start @ merging(grids[stage - 1])
    assert not remaining
    return (r - start).view(-1, *grid)


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


@pytest.mark.parametrize("config", POOLED.values(), ids=POOLED)
@torch.no_grad()
def test_rollout_is_the_dense_product(config: ViTConfig) -> None:
    """Equation 1 of arXiv 2005.00928: the product of (A + I) / 2, with A the mean over heads."""
    size = (40, 24)
    ours, theirs = (model.eval() for model in pair(replace(config, img_size=size)))
    images = torch.randn(2, 3, *size)
    with weights_of_timm(theirs) as blocks:
        theirs(images)
    identity = torch.eye(blocks[0].shape[-1])
    product = identity
    for weights in blocks:
        product = (weights.mean(1) + identity) / 2 @ product
    expected = patches(config, size, read_by_head(config, len(identity)) @ product)
    assert_near(rollout(request(ours, images)), expected)


def test_legrad_is_torchcams() -> None:
    theirs = VisionTransformer(32, 8, 3, 3, 48, 192, num_classes=11).eval()
    randomize(theirs)
    ours = build_model(ViTConfig(img_size=(32, 32), **VIT)).eval()
    converted, _ = convert_names(Tensors(theirs.state_dict()))
    ours.load_state_dict(converted)
    images = torch.randn(2, 3, 32, 32)
    with LeGrad(theirs, list(theirs.encoder.layers)) as method:
        scores = theirs(images)
        (expected,) = method.compute_cams([4, 7], scores, normalized=False)
    assert_near(ours(images), scores)
    found = legrad(Request(ours, images, lambda logits: logits[[0, 1], [4, 7]]))
    assert_near(found, expected, 1e-4)


@pytest.mark.parametrize("config", POOLED.values(), ids=POOLED)
def test_legrad_differentiates_each_blocks_own_score(config: ViTConfig) -> None:
    size = (40, 24)
    ours, theirs = (model.eval() for model in pair(replace(config, img_size=size)))
    images, outputs = torch.randn(2, 3, *size), list[Tensor]()
    hooks = [block.register_forward_hook(lambda _block, _inputs, out: outputs.append(out)) for block in theirs.blocks]
    with weights_of_timm(theirs) as blocks:
        theirs(images)
    for hook in hooks:
        hook.remove()
    maps = []
    for weights, output in zip(blocks, outputs, strict=True):
        read = output if config.global_pool == "avg" else output.mean(1, keepdim=True).repeat(1, 2, 1)
        score = target(theirs.forward_head(theirs.norm(read))).sum()
        (gradient,) = torch.autograd.grad(score, weights, retain_graph=True)
        maps.append(gradient.clamp(min=0).mean((1, 2)))
    assert_near(legrad(request(ours, images)), patches(config, size, torch.stack(maps).mean(0)))


@pytest.mark.parametrize("block", [None, 0, -2])
@pytest.mark.parametrize("config", POOLED.values(), ids=POOLED)
@torch.no_grad()
def test_attention_and_tokens_of_a_block_of_vit(config: ViTConfig, block: int | None) -> None:
    size = (40, 24)
    ours, theirs = (model.eval() for model in pair(replace(config, img_size=size)))
    images = torch.randn(2, 3, *size)
    with weights_of_timm(theirs) as blocks:
        theirs(images)
    weights = blocks[-1 if block is None else block]
    shares = read_by_head(config, weights.shape[-1])
    heads = torch.stack([patches(config, size, shares @ one) for one in weights.unbind(1)], dim=1)
    assert_near(attention_heads(request(ours, images, block=block)), heads)
    assert_near(attention(request(ours, images, block=block)), heads.mean(1))
    assert_near(attention(request(ours, images, block=block, head=1)), heads[:, 1])
    outputs = ours.forward_intermediates(images, intermediates_only=True)
    assert_near(tokens(request(ours, images, block=block)), outputs[-1 if block is None else block].norm(dim=1))


@pytest.mark.parametrize("block", range(7))
@torch.no_grad()
def test_attention_of_a_block_of_swin(block: int) -> None:
    """Every token holds 1/N, and hands it to the tokens of its window."""
    config, size = SWINS["swin"], (36, 20)
    model = build_model(config).eval()
    randomize(model)
    images = torch.randn(2, 3, *size)
    weights = [s.weights for s in attention_steps(attention_model(model), images) if isinstance(s, AttentionStep)]
    stage, index = next((s, block - 2 * s) for s in (0, 1, 2) if block < 2 * s + config.depths[s])
    grid, window = ((18, 10), (9, 5), (5, 3))[stage], ((4, 4), (4, 4), (4, 4))[stage]
    heads = [
        dense(one, grid, window, index % 2 == 1).mean(dim=1).unflatten(1, grid) for one in weights[block].unbind(1)
    ]
    found = attention_heads(request(model, images, block=block))
    assert_near(found, torch.stack(heads, dim=1))
    assert_near(found.sum((2, 3)), torch.ones(found.shape[:2]))
    assert tokens(request(model, images, block=block)).shape == (2, *grid)


def test_tokens_of_swin_are_norms_of_its_last_map() -> None:
    model = build_model(SWINS["swin"]).eval()
    randomize(model)
    images = torch.randn(2, 3, 36, 20)
    (last,) = model.forward_intermediates(images, 1, intermediates_only=True)
    assert_near(tokens(request(model, images)), last.norm(dim=1))


METHODS = {method.__name__: method for method in (relevance, rollout, legrad, attention, tokens)}
CONFIGS: dict[str, ViTConfig | SwinConfig] = {
    "deit": ViTConfig(img_size=(32, 32), dist_token=True, **VIT | {"patch_size": 16}),
    "swin": SWINS["swin"],
}
VIT_ONLY = ("rollout", "legrad")
CASES = [(name, family) for name in METHODS for family in CONFIGS if name not in VIT_ONLY or family != "swin"]


@pytest.fixture(scope="module")
def models() -> dict[str, ImageModel]:
    torch.manual_seed(0)
    built = {family: build_model(config).eval() for family, config in CONFIGS.items()}
    for model in built.values():
        randomize(model)
    return built


@pytest.mark.parametrize(("name", "family"), CASES)
def test_a_batch_equals_its_images(models: dict[str, ImageModel], name: str, family: str) -> None:
    images = torch.randn(8, 3, 192, 320)
    found = METHODS[name](request(models[family], images))
    expected = torch.cat([METHODS[name](request(models[family], image[None])) for image in images])
    assert_near(found, expected)
    assert not found.requires_grad
    assert found.min() >= 0


@pytest.mark.parametrize(("name", "family"), CASES)
def test_every_mode_and_frozen_parameters(models: dict[str, ImageModel], name: str, family: str) -> None:
    """Nothing of the model, of autograd's modes or of the random state changes."""
    model, compute = deepcopy(models[family]), METHODS[name]
    images = torch.randn(2, 3, 32, 32)
    expected = compute(request(model, images))
    model.train().requires_grad_(False)
    before, tensors, random = state(model), {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert torch.equal(compute(request(model, images.clone())), expected)
            assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
            assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert not images.requires_grad
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("name", "family"), CASES)
def test_a_bfloat16_model(models: dict[str, ImageModel], name: str, family: str) -> None:
    model = deepcopy(models[family]).bfloat16()
    found = METHODS[name](request(model, torch.randn(2, 3, 32, 32).bfloat16()))
    assert found.dtype is torch.float32
    assert found.isfinite().all()
    assert found.std() > 0


def test_threads(models: dict[str, ImageModel]) -> None:
    images = torch.randn(2, 3, 32, 32)
    jobs = [(METHODS[name], request(models[family], images)) for name, family in CASES] * 4
    expected = [compute(asked) for compute, asked in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: job[0](job[1]), jobs))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_what_cannot_be_drawn(models: dict[str, ImageModel]) -> None:
    images = torch.randn(1, 3, 32, 32)
    for compute in (attention, attention_heads, tokens):
        with pytest.raises(ModelError, match=r"block 3 .* 0 to 2 or -3 to -1"):
            compute(request(models["deit"], images, block=3))
        with pytest.raises(ModelError, match=r"block -8 .* 0 to 6 or -7 to -1"):
            compute(request(models["swin"], images, block=-8))
    with pytest.raises(ModelError, match=r"head 3 .* 0 to 2 or -3 to -1"):
        attention(request(models["deit"], images, head=3))
    with pytest.raises(ModelError, match=r"head 2 .* 0 to 1 or -2 to -1"):  # the first stage has two heads
        attention(request(models["swin"], images, block=0, head=2))
    for name in VIT_ONLY:
        with pytest.raises(ModelError, match=f"{name} .* SwinTransformer"):
            METHODS[name](request(models["swin"], images))
    for compute in METHODS.values():
        with pytest.raises(ModelError, match="ResNet"):
            compute(request(build_model(ResNetConfig(layers=(1, 1, 1, 1), num_classes=5)), images))
