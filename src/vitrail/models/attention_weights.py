"""The attention weights of every block, from a second forward pass that computes them explicitly.

Shapes: B batch, I channels of the image, H W its height and width, A heads, N tokens (prefix and patches), C width,
M windows of an image, n tokens of a window, h w height and width of a feature map.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from vitrail.errors import ModelError
from vitrail.layers.window import Pair, Windows
from vitrail.models.swin import PatchMerging, SwinBlock, SwinTransformer
from vitrail.models.vit import Block, VisionTransformer
from vitrail.utils.eval_view import eval_view

AttentionModel = VisionTransformer | SwinTransformer


@dataclass(frozen=True, eq=False)
class AttentionStep:
    """One block: its output and its attention weights, softmax over keys, the last dimension.

    `weights` is a node of autograd's graph between the images and `output`: a score of the output can be
    differentiated with respect to it.
    """

    output: Tensor  # ViT: B N C; Swin: B h w C
    weights: Tensor  # ViT: B A N N; Swin: (B M) A n n
    windows: Windows | None = None  # Swin: which tokens the windows hold


@dataclass(frozen=True)
class MergeStep:
    """A patch merging of Swin, from 2x2 tokens to one."""

    size: Pair  # h w before; odd sides are padded


def attention_model(model: nn.Module) -> AttentionModel:
    """`model` in evaluation mode, with shared parameters.

    Raises:
        ModelError: the architecture has no attention, or is not of this package.
    """
    view = eval_view(model)
    if not isinstance(view, VisionTransformer | SwinTransformer):
        raise ModelError(f"{type(model).__name__} has no attention weights: use a ViT, DeiT, DINOv2 or Swin of vitrail")
    if isinstance(view, VisionTransformer) and any(view.config.merge):
        raise ModelError("a model that merges tokens has no attention weights of single patches: build it with merge=0")
    return view


def attention_steps(model: AttentionModel, images: Tensor) -> Iterator[AttentionStep | MergeStep]:
    """The blocks and patch mergings in the order in which they run, for images B I H W.

    model: in evaluation mode. `model.forward_head(model.norm(output))` of the last block's output gives the logits.
    """
    x = model.embed(images) if isinstance(model, VisionTransformer) else model.patch_embed(images)
    for layer in model.modules():
        if isinstance(layer, PatchMerging):
            yield MergeStep((x.shape[1], x.shape[2]))
            x = layer(x)
        elif isinstance(layer, SwinBlock):
            windows = layer.windows(x)
            x, weights = layer.forward_with_weights(x)
            yield AttentionStep(x, weights, windows)
        elif isinstance(layer, Block):
            x, weights = layer.forward_with_weights(x)
            yield AttentionStep(x, weights)


def attention_weights(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The attention weights of each block in evaluation mode, in order: softmax over keys, the last dimension.

    The model keeps its mode and gets no hooks. Gradients flow to its parameters and to `images`; use
    `torch.inference_mode()` if none are needed.

    Args:
        model: a ViT, DeiT, DINOv2 or Swin of this package.
        images: preprocessed, B I H W, or one image I H W (B is 1).

    Returns:
        ViT: one B A N N per block, tokens in the order class, distillation, registers, patches. All N queries, also in
        the last block, where `forward` computes only those that the head reads. Swin: one (B M) A n n per block;
        `SwinBlock.windows` maps windows to tokens; the weight of padding is 0 for queries that are tokens.

    Raises:
        ModelError: the architecture has no attention, or is not of this package.
    """
    steps = attention_steps(attention_model(model), images if images.dim() == 4 else images[None])
    return [step.weights for step in steps if isinstance(step, AttentionStep)]
