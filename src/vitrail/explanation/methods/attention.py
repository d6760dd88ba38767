"""Maps from attention weights: relevance, rollout, LeGrad, single blocks and heads, and norms of tokens.

The weights are those of `models.attention_weights`, computed explicitly in a forward pass of their own. What follows
many blocks is carried from the head backwards as one number per token, so no product of two N x N matrices is needed.

Shapes: B batch, A heads, N tokens (prefix and patches), M windows of an image, n tokens of a window, h w height and
width of the grid of patches or of a feature map, K classes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from vitrail.errors import ModelError
from vitrail.explanation.methods.gradients import gradients_enabled
from vitrail.explanation.methods.method import Request
from vitrail.layers.window import Windows
from vitrail.models.attention_weights import (
    AttentionModel,
    AttentionStep,
    MergeStep,
    attention_model,
    attention_steps,
)
from vitrail.models.vit import VisionTransformer


def positive_products(gradient: Tensor, weights: Tensor) -> Tensor:
    """relu(gradient * weights)."""
    return (gradient * weights).relu()


def relevance(request: Request, products: Callable[[Tensor, Tensor], Tensor] = positive_products) -> Tensor:
    """Gradient-weighted attention: B h w, at least 0. For ViT and Swin; specific to the target.

    Chefer et al., "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder Transformers",
    2021 (https://arxiv.org/abs/2103.15679): from the last block to the first, r <- r + r mean over heads of
    relu(gradient of the target * weights). r starts with the tokens that the head reads: 1 at the class token, 1/2 at
    the class and the distillation token, 1/N at each of N tokens where the head reads their mean. The map is what the
    blocks add to this start: the 1/N, equal everywhere, tells patches from each other no more than a constant.

    Swin: r follows every token through partition and shift of the windows; a patch merging hands a quarter to each
    of its four sources. h w is the first stage's feature map.

    products: of the gradient and the weights of a block, another one for comparison only (benchmarks/explain.py).
    """
    model = attention_model(request.model)
    with _gradients(request.images) as images:
        steps = list(attention_steps(model, images))
        blocks = [step for step in steps if isinstance(step, AttentionStep)]
        output = blocks[-1].output
        score = request.target(model.forward_head(model.norm(output))).sum()
        gradients = torch.autograd.grad(score, [block.weights for block in blocks])
    with torch.no_grad():
        gradient_of = dict(zip(blocks, gradients, strict=True))
        start = _read_by_head(model, output)
        added = torch.zeros_like(start)  # r is start + added
        for step in reversed(steps):
            if isinstance(step, MergeStep):
                start, added = _unmerge(start, step), _unmerge(added, step)
            else:
                weighted = products(gradient_of[step].float(), step.weights.float())
                added = added + _to_keys(start + added, weighted, step.windows).mean(dim=1)
        return _patches(model, images, added)


def rollout(request: Request) -> Tensor:
    """Attention rollout: B h w, at least 0. For ViT; the same for every target.

    Abnar & Zuidema, "Quantifying Attention Flow in Transformers", 2020 (https://arxiv.org/abs/2005.00928): from the
    last block to the first, r <- r (A + I) / 2, with A the mean over heads of the weights. r starts as in `relevance`.
    """
    model = _vit(request.model, "rollout")
    with torch.no_grad():
        means = []
        for step in _blocks(model, request.images):
            means.append(step.weights.float().mean(dim=1, keepdim=True))
            output = step.output
        r = _read_by_head(model, output)
        for mean in reversed(means):
            r = (r + _to_keys(r, mean, None)[:, 0]) / 2
        return _patches(model, request.images, r)


def legrad(request: Request) -> Tensor:
    """LeGrad: B h w, at least 0. For ViT; specific to the target.

    Bousselham et al., "LeGrad: An Explainability Method for Vision Transformers via Feature Formation Sensitivity",
    2024 (https://arxiv.org/abs/2404.03214): the target of every block's own tokens is differentiated with respect to
    this block's weights; the positive part, averaged over heads, queries and blocks. The logits of a block's tokens
    are those of the head for their mean: of all tokens where the head reads the class token, as published, and of
    those that it averages otherwise. The target must name its class: blocks may predict different ones.
    """
    model = _vit(request.model, "legrad")
    maps = []
    with _gradients(request.images) as images:
        for step in _blocks(model, images):
            tokens = step.output
            if model.read_tokens is not None:
                tokens = tokens.mean(dim=1, keepdim=True).expand(-1, model.read_tokens, -1)
            score = request.target(model.forward_head(model.norm(tokens))).sum()
            (gradient,) = torch.autograd.grad(score, step.weights)  # through one block
            maps.append(gradient.float().relu().mean(dim=(1, 2)))
    return _patches(model, request.images, torch.stack(maps).mean(dim=0))


def attention(request: Request) -> Tensor:
    """The attention of one block, by default the last, and one head, by default their mean: B h w, 0 to 1. For ViT and
    Swin; the same for every target. Takes `block` and `head`; see `attention_heads`.

    Raises:
        ModelError: no such block or head.
    """
    heads = attention_heads(request)
    if request.head is None:
        return heads.mean(dim=1)
    return heads[:, _position(request.head, heads.shape[1], "head")]


def attention_heads(request: Request) -> Tensor:
    """The attention of each head of one block (`block`, by default the last): B A h w.

    ViT: the weights of the patches for the token that the head reads (Dosovitskiy et al., 2020), the mean of both for
    a distilled DeiT, and of all patches with average pooling. Swin: the mean weight that a token receives in its
    window, h w being the feature map of the block.

    Raises:
        ModelError: no such block.
    """
    model = attention_model(request.model)
    with torch.no_grad():
        step = _chosen_block(model, request)
        received = _to_keys(_read_by_head(model, step.output), step.weights.float(), step.windows)
        return _patches(model, request.images, received)


def tokens(request: Request) -> Tensor:
    """The norm of every patch's token after one block (`block`, by default the last): B h w, at least 0. For ViT and
    Swin; the same for every target.

    A few patches of much larger norm, in uniform background, hold what the model stores there for the whole image:
    Darcet et al., "Vision Transformers Need Registers", 2023 (https://arxiv.org/abs/2309.16588).

    Raises:
        ModelError: no such block.
    """
    model = attention_model(request.model)
    with torch.no_grad():
        norms = _chosen_block(model, request).output.float().norm(dim=-1)
        return _patches(model, request.images, norms)


def _vit(model: nn.Module, method: str) -> VisionTransformer:
    """`model` in evaluation mode, which must be a ViT."""
    view = attention_model(model)
    if not isinstance(view, VisionTransformer):
        raise ModelError(f"{method} needs the attention of all tokens to all, which {type(model).__name__} has not")
    return view


def _blocks(model: AttentionModel, images: Tensor) -> Iterator[AttentionStep]:
    return (step for step in attention_steps(model, images) if isinstance(step, AttentionStep))


def _chosen_block(model: AttentionModel, request: Request) -> AttentionStep:
    """The step of `request.block`, by default the last; nothing after it is computed."""
    count = model.config.depth if isinstance(model, VisionTransformer) else sum(model.config.depths)
    block = _position(-1 if request.block is None else request.block, count, "block")
    return next(islice(_blocks(model, request.images), block, None))


def _position(index: int, count: int, what: str) -> int:
    """A possibly negative index as one from 0."""
    if not -count <= index < count:
        raise ModelError(f"{what} {index} is out of range: there are {count}, 0 to {count - 1} or -{count} to -1")
    return index % count


@contextmanager
def _gradients(images: Tensor) -> Iterator[Tensor]:
    """Record gradients, whatever mode the caller is in; gives a copy of the images that needs a gradient, so that the
    weights have one where all parameters are frozen."""
    with gradients_enabled():
        yield images.clone().detach().requires_grad_()


def _read_by_head(model: AttentionModel, tokens: Tensor) -> Tensor:
    """The share that each token has in what the head reads: tokens B N C to B N, or B h w C to B h w; the sum is 1."""
    shares = torch.ones(tokens.shape[:-1], device=tokens.device)
    if isinstance(model, VisionTransformer) and model.read_tokens is None:
        shares[:, : model.num_prefix_tokens] = 0
    elif isinstance(model, VisionTransformer):
        shares[:, model.read_tokens :] = 0
    shares /= shares[:1].sum()
    return shares


def _to_keys(r: Tensor, matrices: Tensor, windows: Windows | None) -> Tensor:
    """r times one matrix per head: what the queries hold, handed to their keys.

    r: B N, or B h w for Swin. matrices: shaped as `AttentionStep.weights`, 0 between tokens and padding.

    Returns:
        B A N, or B A h w.
    """
    if windows is None:
        return torch.einsum("bq,baqk->bak", r, matrices)
    cut = windows.partition(r[..., None])[..., 0]  # (B M) n
    keys = torch.einsum("bq,baqk->bka", cut, matrices)
    return windows.reverse(keys, len(r)).permute(0, 3, 1, 2)


def _unmerge(r: Tensor, step: MergeStep) -> Tensor:
    """B h/2 w/2 -> B h w: a quarter to each of the 2x2 sources. What goes to padding is dropped."""
    height, width = step.size
    sources: Tensor = r.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)[:, :height, :width] / 4
    return sources


def _patches(model: AttentionModel, images: Tensor, tokens: Tensor) -> Tensor:
    """B ... N -> B ... h w without the prefix; maps of Swin as they are."""
    if not isinstance(model, VisionTransformer):
        return tokens
    grid = (images.shape[2] // model.config.patch_size, images.shape[3] // model.config.patch_size)
    patches: Tensor = tokens[..., model.num_prefix_tokens :].unflatten(-1, grid)
    return patches
