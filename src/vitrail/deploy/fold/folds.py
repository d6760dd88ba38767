"""The folds: each moves one step of a model into the weights of another, or computes it once.

Each is a function from the form of a model (`forms.py`) to another; the two share the tensors that did not change. All
are exact but for rounding: a test compares each with the model as it was. A fold that has nothing to do in a model
returns a copy.

Shapes: C width, A heads, D = C / A.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import wraps
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vitrail.deploy.fold.attention import FoldedAttention, ReadingAttention, WindowedAttention
from vitrail.deploy.fold.forms import (
    Affine,
    ConvNeXtBody,
    ConvNeXtForm,
    Deployed,
    MeanOfHeads,
    Normalize,
    ProductHead,
    TokenBody,
)
from vitrail.deploy.fold.windows import WindowBlock, WindowBody, WindowMerge, fold_orders
from vitrail.layers.block import LayerScale
from vitrail.models.convnext import ChannelNorm
from vitrail.models.vit import Block

Product = nn.Linear | nn.Conv2d


def pure(change: Callable[[Deployed], None]) -> Callable[[Deployed], Deployed]:
    """The function that returns a changed copy of the modules. `change` sets tensors and never writes into them."""

    @wraps(change)
    def fold(model: Deployed) -> Deployed:
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        model = copy.deepcopy(model, shared)
        change(model)
        return model

    return fold


@pure
def fold_norms(model: Deployed) -> None:
    """(x w + b) W^T + c = x (W diag(w))^T + (c + W b): the weight and bias of a LayerNorm into the linear layers after
    it. Those of the final norm stay for the features, apart from the logits."""
    for norm, layers in _norms(model):
        for layer in layers:
            _scale_inputs(layer, norm.weight, norm.bias)
        _drop_affine(norm)
    final = _final_norm(model.body)
    if final is None:
        return
    model.affine = Affine(final.weight.detach(), final.bias.detach())
    heads = model.head.heads if isinstance(model.head, MeanOfHeads) else [model.head.fc]
    for head in heads:
        if isinstance(head, nn.Linear):  # the identity without classes
            _scale_inputs(head, final.weight, final.bias)
            model.head_reads_features = False
    _drop_affine(final)


def _norms(model: nn.Module) -> Iterator[tuple[nn.LayerNorm, tuple[Product, ...]]]:
    """Each LayerNorm that only linear layers or a convolution without padding read, with these."""
    for module in model.modules():
        match module:
            case Block() | WindowBlock():
                attn = module.attn
                assert isinstance(attn, FoldedAttention)
                yield module.norm1, (attn.q, attn.k, attn.v)
                yield module.norm2, (module.mlp.fc1,)
            case ConvNeXtForm():
                yield module.norm, (module.mlp.fc1,)
            case WindowMerge():
                yield module.norm, (module.reduction,)
            case nn.Sequential() if len(module) == 2 and isinstance(module[0], ChannelNorm):
                yield module[0], (module[1],)  # type: ignore[misc]  # downsampling of a ConvNeXt


def _final_norm(body: nn.Module) -> nn.LayerNorm | None:
    found: nn.Module | None = None
    if isinstance(body, TokenBody):
        found = body.model.fc_norm if isinstance(body.model.norm, nn.Identity) else body.model.norm
    elif isinstance(body, WindowBody | ConvNeXtBody):
        found = body.norm
    return found if isinstance(found, nn.LayerNorm) else None


@pure
def fold_query_scale(model: Deployed) -> None:
    """1 / sqrt(D) into the layer of the queries."""
    for attn in _attentions(model):
        _scale_outputs(attn.q, torch.full_like(attn.q.weight[:, 0], attn.scale))
        attn.scale = 1.0


@pure
def fold_key_bias(model: Deployed) -> None:
    """Dropped: it adds the same to all scores of a query, q b, which softmax does not see."""
    for attn in _attentions(model):
        attn.k.bias = None  # type: ignore[assignment]


@pure
def fold_value_bias(model: Deployed) -> None:
    """Into the bias of the projection: weights of a query sum to 1, so that it is added to every output once."""
    for attn in _attentions(model):
        if attn.v.bias is not None:
            _add_bias(attn.proj, attn.proj.weight @ attn.v.bias)
            attn.v.bias = None  # type: ignore[assignment]


def _attentions(model: nn.Module) -> list[FoldedAttention]:
    return [module for module in model.modules() if isinstance(module, FoldedAttention)]


@pure
def fold_layer_scale(model: Deployed) -> None:
    """LayerScale into the projection and fc2; gamma of a ConvNeXt into fc2."""
    for module in model.modules():
        pairs: list[tuple[str, nn.Linear]] = []
        if isinstance(module, Block):
            pairs = [("ls1", module.attn.proj), ("ls2", module.mlp.fc2)]
        elif isinstance(module, ConvNeXtForm):
            pairs = [("ls", module.mlp.fc2)]
        for name, layer in pairs:
            scale = getattr(module, name)
            if isinstance(scale, LayerScale):
                _scale_outputs(layer, scale.gamma)
                setattr(module, name, nn.Identity())


@pure
def fold_normalize(model: Deployed) -> None:
    """Mean and deviation of the pixels into the first convolution. Not where it pads: the zeros at the edges stand for
    the mean, and would become black."""
    conv = _first_conv(model.body)
    if conv is not None and isinstance(model.normalize, Normalize):
        _scale_inputs(conv, model.normalize.weight.flatten(), model.normalize.bias.flatten())
        model.normalize = nn.Identity()


def _first_conv(body: nn.Module) -> nn.Conv2d | None:
    """The first convolution, if neither it nor the form pads the images."""
    conv: nn.Module | None = None
    if isinstance(body, TokenBody):
        conv = body.patches.convs[0]
    elif isinstance(body, WindowBody) and not any(body.embed.pad):
        conv = body.embed.proj
    elif isinstance(body, ConvNeXtBody):
        conv = body.stem[0]
    return conv if isinstance(conv, nn.Conv2d) and conv.padding == (0, 0) else None


@pure
def fold_positions(model: Deployed) -> None:
    """Class and other prefix tokens plus their positions, summed once."""
    if isinstance(model.body, TokenBody):
        model.body.add_tokens.sum_prefix()


@pure
def fold_heads(model: Deployed) -> None:
    """DeiT's mean of two heads as one product: [x, y] [W / 2, V / 2]^T + (b + c) / 2."""
    if not isinstance(model.head, MeanOfHeads) or not isinstance(model.head.heads[0], nn.Linear):
        return
    heads = model.head.heads
    weight = torch.cat([head.weight for head in heads], dim=1) / len(heads)  # type: ignore[misc]
    bias = torch.stack([head.bias for head in heads]).mean(dim=0)  # type: ignore[misc]
    model.head = ProductHead(_linear(weight, bias))


@pure
def fold_batch_norms(model: Deployed) -> None:
    """Batch norms in evaluation mode into the convolutions before them."""
    for module in list(model.modules()):
        children = list(module.named_children())
        for (name, conv), (after, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, after, nn.Identity())


@pure
def fold_window_bias(model: Deployed) -> None:
    """The relative position bias and the mask of each block of a Swin, gathered and summed once."""
    for attn in _attentions(model):
        if isinstance(attn, WindowedAttention):
            attn.bias = attn.gather_bias().detach()
            attn.table = None


@pure
def fold_window_order(model: Deployed) -> None:
    """The tokens of a Swin sorted by window from block to block: shift, partition and their reverse in one gather."""
    if isinstance(model.body, WindowBody):
        fold_orders(model.body)


@pure
def fold_last_block(model: Deployed) -> None:
    """The last block of a ViT for the tokens that the head reads, without keys and values of the others."""
    body = model.body
    if not isinstance(body, TokenBody) or body.model.read_tokens is None:
        return
    body.read = body.model.read_tokens
    block = body.model.blocks[-1]
    assert isinstance(block.attn, FoldedAttention)
    block.attn = ReadingAttention(block.attn)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return layer


def _scale_inputs(layer: Product, scale: Tensor, shift: Tensor) -> None:
    """The layer of x becomes that of x * scale + shift, for each input channel."""
    channels = (1, -1, *(1 for _ in layer.weight.shape[2:]))
    _add_bias(layer, (layer.weight * shift.view(channels)).flatten(1).sum(dim=1))
    layer.weight = nn.Parameter((layer.weight * scale.view(channels)).detach())


def _scale_outputs(layer: nn.Linear, factor: Tensor) -> None:
    layer.weight = nn.Parameter((layer.weight * factor[:, None]).detach())
    if layer.bias is not None:
        layer.bias = nn.Parameter((layer.bias * factor).detach())


def _add_bias(layer: Product, bias: Tensor) -> None:
    layer.bias = nn.Parameter((bias if layer.bias is None else layer.bias + bias).detach())


def _drop_affine(norm: nn.LayerNorm) -> None:
    norm.weight = norm.bias = None  # type: ignore[assignment]
