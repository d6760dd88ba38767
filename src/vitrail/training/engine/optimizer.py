"""The optimizer and its parameter groups: learning rate and weight decay of each parameter.

AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2017 (https://arxiv.org/abs/1711.05101).
Layer-wise decay of the learning rate is that of BEiT (https://arxiv.org/abs/2106.08254), after ELECTRA.
"""

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from vitrail.errors import ConfigError, ModelError
from vitrail.training.config.schema import OptimizerSettings, TrainConfig
from vitrail.training.engine.optimizers.lamb import Lamb
from vitrail.training.engine.optimizers.muon import Muon
from vitrail.training.engine.optimizers.sgd import Sgd
from vitrail.training.engine.parallel import full_tensor
from vitrail.utils.text import counted, format_rate

_HEADS = ("head", "head_dist", "heads", "fc", "classifier")  # first part of a parameter's name
_EMBEDDING = re.compile("embed|token")  # in the name of an embedding of patches or positions, or a token


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups for the optimizer: every trainable parameter is in exactly one.

    Each group has params, a name, its peak learning rate `peak_lr` (`lr` starts as that) and its weight_decay. Vectors
    and scalars (biases, norms, scales) have no weight decay, nor does what the model names in `no_weight_decay`. For
    Muon, groups of hidden matrices have orthogonalize=True and their `momentum`.

    Raises:
        ConfigError: layer_decay is set and the model has neither layer_ids nor group_matcher, or the optimizer is Muon
            and the model has no hidden matrices.
        ModelError: all parameters are frozen.
    """
    settings = config.optimizer
    own: Any = model
    no_decay = own.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # names or patterns
    layers = layer_ids(model) if settings.layer_decay < 1 else None
    deepest = max(layers.values()) if layers else 0
    muon = settings.optimizer == "muon"
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
        decays = parameter.ndim > 1 and not any(fnmatchcase(name, pattern) for pattern in no_decay)
        key += "" if decays else ", no decay"
        empty: dict[str, Any] = {
            "name": key,
            "params": [],
            "lr": peak,
            "peak_lr": peak,
            "weight_decay": settings.weight_decay * decays,
        }
        if muon:
            hidden = decays and parameter.ndim == 2 and not is_head and not _EMBEDDING.search(name)
            key = empty["name"] = key + ", Muon" * hidden
            empty |= {"orthogonalize": hidden, "momentum": momentum(settings)}
        groups.setdefault(key, empty)["params"].append(parameter)
    if not groups:
        raise ModelError("the model has no trainable parameters: all of them are frozen")
    if muon and not any(group["orthogonalize"] for group in groups.values()):
        raise ConfigError(
            f"Muon is for hidden matrices, and {type(model).__name__} trains none: use optimizer=adamw, sgd or lamb"
        )
    return list(groups.values())


def layer_ids(model: nn.Module) -> dict[str, int]:
    """Depth of every parameter by name: 0 at the input, the largest at the head. For our models and timm's."""
    own: Any = model
    if hasattr(model, "layer_ids"):
        return dict(own.layer_ids())
    if hasattr(model, "group_matcher"):  # a timm model
        from timm.models._manipulate import group_with_matcher

        return dict(group_with_matcher(model.named_parameters(), own.group_matcher(coarse=False), reverse=True))
    kind = type(model).__name__
    raise ConfigError(
        f"layer_decay needs a model with layer_ids or group_matcher, which {kind} lacks: set layer_decay=1"
    )


def describe_groups(groups: list[dict[str, Any]]) -> list[str]:
    """One line a group: its name, size, peak learning rate and weight decay."""
    width = max(len(group["name"]) for group in groups)
    return [
        f"{group['name']:{width}}  {sum(p.numel() for p in group['params']):>12,} parameters"
        f"  lr {group['peak_lr']:.3g}  weight decay {group['weight_decay']:.3g}"
        for group in groups
    ]


def summarize_groups(groups: list[dict[str, Any]], layer_decay: float = 1.0) -> str:
    """All groups in one line: their number, the range of their peak learning rates, and the largest weight decay."""
    rates = [group["peak_lr"] for group in groups]
    low, high = format_rate(min(rates)), format_rate(max(rates))
    layers = "" if layer_decay == 1 else f", layer decay {layer_decay:g}"
    decay = f", weight decay {max(group['weight_decay'] for group in groups):.3g}"
    return f"{counted(len(groups), 'group')}, lr {low if low == high else f'{low} ... {high}'}{layers}{decay}"


def make_optimizer(groups: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The configured optimizer over these groups; AdamW is fused into one kernel if torch has one for the device."""
    if settings.momentum is not None and settings.optimizer not in ("sgd", "muon"):
        raise ConfigError(f"momentum is of sgd and muon: leave it out with optimizer={settings.optimizer}")
    fused, pace = groups[0]["params"][0].device.type in ("cpu", "cuda", "mps", "xpu"), momentum(settings)
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw": lambda: torch.optim.AdamW(groups, betas=settings.betas, fused=fused),
        "sgd": lambda: Sgd(groups, pace),
        "lamb": lambda: Lamb(groups, settings.betas),
        "muon": lambda: Muon(groups, settings.betas, fused),
    }
    return makers[settings.optimizer]()


def momentum(settings: OptimizerSettings) -> float:
    """The momentum of SGD or Muon."""
    usual = 0.95 if settings.optimizer == "muon" else 0.9
    return usual if settings.momentum is None else settings.momentum


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale all gradients so that their global norm is at most `max_norm`, if given. Returns the norm before."""
    norm = full_tensor(get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if max_norm is not None:
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
