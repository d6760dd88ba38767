"""Grad-CAM: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", 2017
(https://arxiv.org/abs/1610.02391).

Shapes: B batch, H W height and width of the image, h w height and width of a feature map, N = prefix tokens + h w,
C channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.errors import ModelError
from vitrail.explanation.methods.gradients import output_and_gradient, plain, watched
from vitrail.explanation.methods.method import Request
from vitrail.models.convnext import ConvNeXt
from vitrail.models.resnet import ResNet
from vitrail.models.swin import SwinTransformer
from vitrail.models.vit import VisionTransformer
from vitrail.utils.text import format_shape


@dataclass(frozen=True)
class Layer:
    """The layer whose output is explained. name: of the module. to_map: from its output to B C h w."""

    name: str
    to_map: Callable[[Tensor], Tensor]


def gradcam(request: Request) -> Tensor:
    """relu(sum over channels of the channel x the mean of its gradient), B h w, at the last output with positions.

    For a CNN that is the last feature map before pooling, for Swin the output of the final norm, and for a ViT a norm
    before an MLP: see `_token_layer`.

    Raises:
        ModelError: an external model without such a layer.
    """
    layer = find_layer(request.model, request.images)
    output, gradient = output_and_gradient(request.model, layer.name, request.images, request.target)
    weights = layer.to_map(gradient).mean(dim=(2, 3), keepdim=True)  # B C 1 1
    return (weights * layer.to_map(output)).sum(dim=1).relu()


def find_layer(model: Any, images: Tensor) -> Layer:
    """The layer to explain. An external model may be run once to find it.

    Raises:
        ModelError: there is none.
    """
    height, width = images.shape[2:]
    match model:
        case VisionTransformer():
            patch = model.config.patch_size
            read = model.config.global_pool == "avg"
            return _token_layer(
                model, "blocks", "norm2", read, model.num_prefix_tokens, (height // patch, width // patch)
            )
        case SwinTransformer():
            return Layer("norm", _from_channels_last)
        case ResNet():
            return Layer(f"{model.stages[-1]}.{model.config.layers[-1] - 1}", _as_it_is)
        case ConvNeXt():
            return Layer(f"stages.{model.num_stages - 1}", _as_it_is)
    patch_grid = getattr(getattr(model, "patch_embed", None), "dynamic_feat_size", None)  # of timm's transformers
    if patch_grid and hasattr(model, "num_prefix_tokens") and _has_layer(model, "blocks", "norm2"):
        grid = patch_grid((height, width))
        return _token_layer(model, "blocks", "norm2", model.global_pool != "token", model.num_prefix_tokens, grid)
    if hasattr(model, "class_token") and _has_layer(model, "encoder.layers", "ln_2"):  # torchvision's ViT
        grid = (height // model.patch_size, width // model.patch_size)
        return _token_layer(model, "encoder.layers", "ln_2", False, 1, grid)
    return _last_map(model, images)


def _token_layer(
    model: nn.Module, blocks: str, norm: str, patches_read: bool, prefix: int, grid: tuple[int, int]
) -> Layer:
    """The norm before the MLP of the last block whose patch tokens reach the head.

    With average pooling that is the last block. A head that reads the class token reads no patch after the last
    attention, and the gradient of the patches there is zero: then it is the block before. The norm before the
    attention (norm1) would have a gradient in the last block too, but its map is known to be spread over the
    background.
    """
    names = [name for name, _ in model.get_submodule(blocks).named_children()]
    index = -1 if patches_read else -2
    if len(names) < -index:
        raise ModelError(f"gradcam needs two blocks in a {type(model).__name__} that pools the class token, not 1")
    return Layer(f"{blocks}.{names[index]}.{norm}", partial(_from_tokens, prefix=prefix, grid=grid))


def _last_map(model: nn.Module, images: Tensor) -> Layer:
    """The module of an external model that returns the last feature map with more than one position."""
    shapes: dict[str, torch.Size] = {}  # of outputs with positions, in the order in which the modules end

    def watch(name: str, output: Tensor) -> Tensor:
        if output.dim() == 3 or (output.dim() == 4 and _positions(model, output.shape) > 1):
            shapes.pop(name, None)
            shapes[name] = output.shape
        return output

    names = [name for name, module in model.named_modules() if name and not isinstance(module, nn.AdaptiveAvgPool2d)]
    with torch.no_grad():
        watched(model, names, watch)(plain(images[:1]))
    name = next(reversed(shapes), "")
    if not name or len(shapes[name]) != 4:
        found = f"its last output is {format_shape(shapes[name])}, from {name}" if name else "it has none"
        raise ModelError(
            f"gradcam does not apply to {type(model).__name__}, which has no feature map B C h w before its head "
            f"({found}), nor blocks of a ViT as in timm or torchvision: use occlusion or integrated_gradients"
        )
    return Layer(name, _from_channels_last if _channels_last(model) else _as_it_is)


def _has_layer(model: nn.Module, blocks: str, norm: str) -> bool:
    """Whether the model has blocks under this name, and a layer `norm` in the last one."""
    try:
        last = list(model.get_submodule(blocks).children())[-1]
    except (AttributeError, IndexError):
        return False
    return hasattr(last, norm)


def _channels_last(model: nn.Module) -> bool:
    """Whether feature maps are B h w C, which timm states in its Swin and others."""
    return getattr(model, "output_fmt", "NCHW") == "NHWC"


def _positions(model: nn.Module, shape: torch.Size) -> int:
    height, width = shape[1:3] if _channels_last(model) else shape[2:]
    return height * width


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _from_channels_last(x: Tensor) -> Tensor:
    """B h w C -> B C h w."""
    return x.permute(0, 3, 1, 2)


def _from_tokens(x: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """B N C -> B C h w."""
    patches = x[:, prefix:]
    if patches.shape[1] != grid[0] * grid[1]:
        raise ModelError(
            f"gradcam does not apply to this model: {x.shape[1]} tokens with {prefix} prefix tokens are not a grid of "
            f"{grid[0]}x{grid[1]} patches"
        )
    feature_map: Tensor = patches.transpose(1, 2).unflatten(2, grid)
    return feature_map
