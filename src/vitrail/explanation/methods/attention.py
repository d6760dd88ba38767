"""Maps from attention weights: relevance, rollout, LeGrad, single blocks and heads, and norms of tokens.

The weights are those of `models.attention_weights`, computed explicitly in a forward pass of their own. What follows
many blocks is carried from the head backwards as one number per token, so no product of two N x N matrices is needed.

Shapes: B batch, A heads, N tokens (prefix and patches), M windows of an image, n tokens of a window, h w height and
width of the grid of patches or of a feature map, K classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vitrail.explanation.methods.method import Request
from vitrail.models.attention_weights import (
    AttentionModel,
    AttentionStep,
    MergeStep,
    attention_model,
    attention_steps,
)
from vitrail.models.vit import VisionTransformer

# Stages of Swin, from 0, whose attention `relevance` leaves out. Their patch mergings still count.
STAGES_LEFT_OUT: frozenset[int] = frozenset()


def relevance(request: Request) -> Tensor:
    """Gradient-weighted attention: B h w, at least 0. For ViT and Swin; specific to the target.

    Chefer et al., "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder Transformers",
    2021 (https://arxiv.org/abs/2103.15679): from the last block to the first, r <- r + r mean over heads of
    relu(gradient of the target * weights). r starts with the tokens that the head reads: 1 at the class token, 1/2 at
    the class and the distillation token, 1/N at each of N tokens where the head reads their mean.

    Swin: r follows every token through partition and shift of the windows; a patch merging hands a quarter to each
    of its four sources. h w is the first stage's feature map.
    """
    model = attention_model(request.model)
    with _gradients(request.images) as images:
        steps = list(attention_steps(model, images))
        blocks = [step for step in steps if isinstance(step, AttentionStep)]
        score = request.target(model.forward_head(model.norm(blocks[-1].output))).sum()
        used = [block for block in blocks if block.windows is None or block.stage not in STAGES_LEFT_OUT]
        gradients = torch.autograd.grad(score, [block.weights for block in used])
    with torch.no_grad():
        gradient_of = dict(zip(used, gradients, strict=True))
        r = _read_by_head(model, blocks[-1])
        for step in reversed(steps):
            if isinstance(step, MergeStep):
                r = _unmerge(r, step)
            elif step in gradient_of:
                weighted = (gradient_of[step].float() * step.weights.float()).relu()
                r = r + _to_keys(r, step, weighted).mean(dim=1)
        return _patches(model, images, r)


@contextmanager
def _gradients(images: Tensor) -> Iterator[Tensor]:
    """Record gradients, whatever mode the caller is in; gives a copy of the images that needs a gradient, so that the
    weights have one where all parameters are frozen."""
    with torch.inference_mode(False), torch.enable_grad():
        yield images.clone().detach().requires_grad_()


def _read_by_head(model: AttentionModel, last: AttentionStep) -> Tensor:
    """The share that each token has in what the head reads: B N, or B h w for Swin; the sum is 1."""
    shares = torch.ones(last.output.shape[:-1], device=last.output.device)
    if isinstance(model, VisionTransformer) and model.read_tokens is None:
        shares[:, : model.num_prefix_tokens] = 0
    elif isinstance(model, VisionTransformer):
        shares[:, model.read_tokens :] = 0
    shares /= shares[:1].sum()
    return shares


def _to_keys(r: Tensor, step: AttentionStep, matrices: Tensor) -> Tensor:
    """r times one matrix per head: what the queries hold, handed to their keys.

    r: B N, or B h w for Swin. matrices: shaped as `step.weights`, 0 from tokens to padding and from padding to tokens.

    Returns:
        B A N, or B A h w.
    """
    if step.windows is None:
        return torch.einsum("bq,baqk->bak", r, matrices)
    cut = step.windows.partition(r[..., None])[..., 0]  # (B M) n
    keys = torch.einsum("bq,baqk->bka", cut, matrices)
    return step.windows.reverse(keys, len(r)).permute(0, 3, 1, 2)


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
    return tokens[..., model.num_prefix_tokens :].unflatten(-1, grid)
