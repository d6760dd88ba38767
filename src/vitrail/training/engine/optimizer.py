"""AdamW and its parameter groups: who learns how fast, and who decays.

Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2017 (https://arxiv.org/abs/1711.05101). Layer-wise
decay of the learning rate is that of BEiT (https://arxiv.org/abs/2106.08254), after ELECTRA.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from vitrail.errors import VitrailError
from vitrail.training.config.schema import TrainConfig
from vitrail.training.engine.parallel import whole

_HEADS = ("head", "head_dist", "heads", "fc", "classifier")  # first part of a parameter's name, here and in guests


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups for AdamW: every parameter that learns stands in exactly one.

    Each group has params, a name, its peak learning rate `peak_lr` (`lr` starts as that) and its weight_decay. Vectors
    and scalars (biases, norms, scales) never decay, nor does what the model names in `no_weight_decay`.

    Raises:
        VitrailError: layer_decay is asked of a model that does not say in which layer its parameters are.
    """
    settings = config.optimizer
    keep = no_decay_names(model)
    layers = layer_ids(model) if settings.layer_decay < 1 else None
    deepest = max(layers.values()) if layers else 0
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_head = name.split(".")[0] in _HEADS
        peak = (settings.head_lr if is_head else settings.backbone_lr) or settings.lr
        key = "head" if is_head else "backbone"
        if layers is not None:
            peak *= settings.layer_decay ** (deepest - layers[name])
            key += f" layer {layers[name]}"
        decays = parameter.ndim > 1 and not any(fnmatchcase(name, pattern) for pattern in keep)
        key += "" if decays else ", no decay"
        empty = {
            "name": key,
            "params": [],
            "lr": peak,
            "peak_lr": peak,
            "weight_decay": settings.weight_decay * decays,
        }
        groups.setdefault(key, empty)["params"].append(parameter)
    if not groups:
        raise VitrailError("this model has no parameters to train: all of them are frozen")
    return list(groups.values())


def no_decay_names(model: nn.Module) -> set[str]:
    """What the model itself asks to spare, as names or patterns; nothing where it does not say."""
    own: Any = model
    return set(own.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()


def layer_ids(model: nn.Module) -> dict[str, int]:
    """Depth of every parameter by name: 0 at the input, the largest at the head. Our models say so, timm's too."""
    own: Any = model
    if hasattr(model, "layer_ids"):
        return dict(own.layer_ids())
    if hasattr(model, "group_matcher"):  # a guest from timm
        from timm.models._manipulate import group_with_matcher

        return dict(group_with_matcher(model.named_parameters(), own.group_matcher(coarse=False), reverse=True))
    kind = type(model).__name__
    raise VitrailError(f"layer_decay needs a model that names its layers, and {kind} does not: set layer_decay=1")


def describe_groups(groups: list[dict[str, Any]]) -> list[str]:
    """One line a group: its name, size, peak learning rate and weight decay."""
    width = max(len(group["name"]) for group in groups)
    return [
        f"{group['name']:{width}}  {sum(p.numel() for p in group['params']):>12,} parameters"
        f"  lr {group['peak_lr']:.3g}  weight decay {group['weight_decay']:.3g}"
        for group in groups
    ]


def make_optimizer(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW over these groups, fused into one kernel where torch has that for the device."""
    device = groups[0]["params"][0].device.type
    return torch.optim.AdamW(groups, betas=betas, fused=device in ("cpu", "cuda", "mps", "xpu"))


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], largest: float | None) -> Tensor:
    """Scale all gradients so that their common norm is at most `largest`; None: leave them. Returns the norm as it was.

    As `nn.utils.clip_grad_norm_`, with a norm over all processes where the gradients are sharded.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm = whole(get_total_norm(gradients))
    if largest is not None:
        clip_grads_with_norm_(parameters, largest, norm)
    return norm


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
