"""The attention weights of every block, by an explicit pass beside the fused one.

Shapes: B batch, I channels of the image, H W its height and width, A heads, N tokens (prefix and patches),
M windows of an image, n tokens of a window.
"""

import copy

from torch import Tensor, nn

from vitrail.errors import ModelError
from vitrail.layers.block import Block
from vitrail.models.swin import PatchMerging, SwinBlock, SwinTransformer
from vitrail.models.vit import VisionTransformer


def attention_weights(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The attention weights of each block in inference, in order: rows are queries, columns keys, and rows sum to 1.

    The model itself is not changed: no hooks, no switches; one in training mode is copied and the copy runs in
    evaluation mode. The result is differentiable; use `torch.inference_mode()` where no gradients are needed.

    Args:
        model: a ViT, DeiT, DINOv2 or Swin of this package.
        images: preprocessed, B I H W, or one image I H W (B is 1).

    Returns:
        ViT: B A N N a block, with tokens in the order class, distillation, registers, patches; the last block has all
        N x N, though `forward` computes only the rows that the head reads. Swin: (B M) A n n a block;
        `SwinBlock.windows` maps windows to tokens. Weights on padding are 0 in the rows of tokens.

    Raises:
        ModelError: the architecture has no attention, or is not of this package.
    """
    if not isinstance(model, VisionTransformer | SwinTransformer):
        raise ModelError(f"{type(model).__name__} has no attention weights: use a ViT, DeiT, DINOv2 or Swin of vitrail")
    if any(module.training for module in model.modules()):
        model = copy.deepcopy(model).eval()
    x = images if images.dim() == 4 else images[None]
    x = model.embed(x) if isinstance(model, VisionTransformer) else model.patch_embed(x)
    found = []
    for layer in model.modules():  # in the order in which they run
        if isinstance(layer, PatchMerging):
            x = layer(x)
        elif isinstance(layer, Block | SwinBlock):
            x, weights = layer.explain(x)
            found.append(weights)
    return found
