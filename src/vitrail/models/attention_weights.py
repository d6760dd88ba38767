"""The attention weights of every block, from a second forward pass that computes them explicitly.

Shapes: B batch, I channels of the image, H W its height and width, A heads, N tokens (prefix and patches),
M windows of an image, n tokens of a window.
"""

from torch import Tensor, nn

from vitrail.errors import ModelError
from vitrail.models.swin import PatchMerging, SwinBlock, SwinTransformer
from vitrail.models.vit import Block, VisionTransformer
from vitrail.utils.eval_view import eval_view


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
    view = eval_view(model)
    x = images if images.dim() == 4 else images[None]
    if isinstance(view, VisionTransformer):
        x = view.embed(x)
    elif isinstance(view, SwinTransformer):
        x = view.patch_embed(x)
    else:
        raise ModelError(f"{type(model).__name__} has no attention weights: use a ViT, DeiT, DINOv2 or Swin of vitrail")
    weights = []
    for layer in view.modules():  # in the order in which they run
        if isinstance(layer, PatchMerging):
            x = layer(x)
        elif isinstance(layer, Block | SwinBlock):
            x, block_weights = layer.forward_with_weights(x)
            weights.append(block_weights)
    return weights
