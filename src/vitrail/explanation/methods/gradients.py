"""Gradients with respect to what is inside a model, whatever the grad mode of the caller, and without a trace."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.utils.eval_view import eval_view


@contextmanager
def gradients_enabled() -> Iterator[None]:
    """Record operations also under the caller's `torch.no_grad()` or `torch.inference_mode()`; for this thread only."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def plain(images: Tensor) -> Tensor:
    """The images as a tensor that gradients can be computed for: one made in inference mode is copied."""
    with torch.inference_mode(False):
        return images.clone() if images.is_inference() else images.detach()


def watched(model: nn.Module, names: Iterable[str], watch: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """A private view of the model in which the outputs of the layers `names` go through `watch`, with the name.

    No hook is used: `eval_view` shares the tables of hooks with the model, and so with other threads. The view's
    modules are its own, so a `forward` set on them is seen by nobody else.
    """
    view = eval_view(model)
    for name in names:
        layer = view.get_submodule(name)
        vars(layer)["forward"] = partial(_forward_and_watch, layer.forward, partial(watch, name))
    return view


def _forward_and_watch(
    forward: Callable[..., Any], watch: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any
) -> Any:
    output = forward(*args, **kwargs)
    return watch(output) if isinstance(output, Tensor) else output


def output_and_gradient(
    model: nn.Module, name: str, images: Tensor, target: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The output of the layer `name`, and the gradient of the target with respect to it; both float32.

    The output is made a leaf of the graph: so this works if all parameters are frozen, and nothing before the layer
    is differentiated. If the layer runs several times, the last time counts.
    """
    leaf = images

    def watch(_name: str, output: Tensor) -> Tensor:
        nonlocal leaf
        leaf = output.detach().requires_grad_()
        return leaf.clone()  # what follows may work in place, which a leaf forbids

    with gradients_enabled():
        logits = watched(model, [name], watch)(plain(images))
        (gradient,) = torch.autograd.grad(target(logits).sum(), leaf)
    return leaf.detach().float(), gradient.float()
