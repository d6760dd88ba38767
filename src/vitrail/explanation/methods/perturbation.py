"""Methods that change the image and watch the output. They need nothing of the model but a forward pass (and, for
integrated gradients, a backward pass), so they apply to any.

What an image is changed to is the mean colour, which is zero after normalisation.

Shapes: B batch, S changed copies of each image in a forward pass, I channels, H W height and width of the image,
h w height and width of the map, K classes.
"""

import numpy as np
import torch
from torch import Tensor, nn

from vitrail.explanation.methods.gradients import gradients_enabled, plain
from vitrail.explanation.methods.method import Request
from vitrail.models.vit import VisionTransformer

IMAGES = 16  # changed copies in a forward pass: about what a CPU or GPU needs to be busy, and little memory
STEPS = 50  # points of the path, as in captum
WINDOWS = 16  # along the longer side of an image, at most


def integrated_gradients(request: Request) -> Tensor:
    """Pixel x the mean of its gradient on the path from the mean colour to the image, summed over channels: B H W.

    Sundararajan et al., "Axiomatic Attribution for Deep Networks", 2017 (https://arxiv.org/abs/1703.01365). The
    integral is a Gauss-Legendre sum of 50 points. All values of an image add up to the target's difference between
    the image and the mean colour. Negative: against the target.
    """
    model, images = request.model, plain(request.images)
    weights = _class_weights(request)
    nodes, sizes = np.polynomial.legendre.leggauss(STEPS)  # on -1..1, the sizes of the steps add up to 2
    with gradients_enabled():
        scales, steps = (torch.tensor(x, device=images.device) for x in ((nodes + 1) / 2, sizes / 2))
        total = torch.zeros(images.shape, device=images.device)
        for chosen in torch.arange(STEPS, device=images.device).split(_copies(images)):
            scale = scales[chosen].to(images.dtype)[:, None, None, None, None]
            path = (scale * images).flatten(0, 1).requires_grad_()  # S B I H W -> (S B) I H W
            logits = model(path)
            (gradient,) = torch.autograd.grad(logits, path, weights.repeat(len(chosen), 1).to(logits.dtype))
            total += torch.einsum(
                "sbihw,s->bihw", gradient.float().unflatten(0, (len(chosen), -1)), steps[chosen].float()
            )
        mean: Tensor = (total * images.float()).sum(dim=1)
    return mean


def occlusion(request: Request) -> Tensor:
    """How much the target falls when a window of the image is replaced by the mean colour: B h w, a window a cell.

    Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", 2013 (https://arxiv.org/abs/1311.2901).
    The windows are squares that do not overlap, as in `occlusion_window`. Negative: against the target.
    """
    model, images = request.model, plain(request.images)
    weights = _class_weights(request)
    height, width = images.shape[2:]
    window = occlusion_window(model, height, width)
    grid = (-(-height // window), -(-width // window))

    def measure(logits: Tensor) -> Tensor:
        by_copy: Tensor = logits.float().unflatten(0, (-1, len(images)))  # (S B) K -> S B K
        return (by_copy * weights).sum(dim=2)

    drops = []
    with torch.no_grad():
        whole = measure(model(images))  # 1 B
        for cells in torch.arange(grid[0] * grid[1]).split(_copies(images)):
            copies = images.repeat(len(cells), 1, 1, 1, 1)  # S B I H W
            for copy, cell in zip(copies, cells.tolist(), strict=True):
                row, column = (window * place for place in divmod(cell, grid[1]))
                copy[:, :, row : row + window, column : column + window] = 0
            drops.append(whole - measure(model(copies.flatten(0, 1))))
    maps: Tensor = torch.cat(drops).T.unflatten(1, grid)
    return maps


def occlusion_window(model: nn.Module, height: int, width: int) -> int:
    """The side of a window in pixels: for a ViT a multiple of its patch. At most 16 fit along the longer side, and
    windows of `ceil(height / number of rows)` pixels are these windows, so that the map tells their size."""
    step = model.config.patch_size if isinstance(model, VisionTransformer) else 1
    window = -(-max(height, width) // (WINDOWS * step)) * step
    while -(-height // -(-height // window)) != window:
        window += step
    return window


def _class_weights(request: Request) -> Tensor:
    """The target's gradient with respect to the logits of the unchanged images, B K: 1 for a class, -1 for one that is
    subtracted. So changed copies are measured on the class of the original, also if it is the predicted one."""
    with torch.no_grad():
        logits = request.model(plain(request.images)).float()
    with gradients_enabled():
        leaf = plain(logits).requires_grad_()
        (weights,) = torch.autograd.grad(request.target(leaf).sum(), leaf)
    return weights


def _copies(images: Tensor) -> int:
    """How many copies of every image go into one forward pass."""
    return max(1, IMAGES // len(images))
