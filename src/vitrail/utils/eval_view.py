"""A model in evaluation mode without a change of its own mode."""

from types import MethodType
from typing import Any

from torch import nn


def eval_view(model: nn.Module) -> nn.Module:
    """The same network in evaluation mode: copies of the modules that share parameters, buffers and hooks.

    The model itself is not touched, so one thread may evaluate while another trains it. Attributes that refer to
    modules of the model (lists, dicts, bound methods) refer to the copies. It is not a deep copy: those take memory,
    and models sharded by FSDP refuse them.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile, whose forward is bound to the original module
    copies: dict[int, nn.Module] = {}
    for module in model.modules():
        copies[id(module)] = object.__new__(type(module))  # FSDP's own __new__ would make the unsharded class

    def replaced(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return copies.get(id(value), value)
        if type(value) is MethodType:
            return MethodType(value.__func__, replaced(value.__self__))
        if type(value) is dict:
            return {key: replaced(item) for key, item in value.items()}
        return type(value)(map(replaced, value)) if type(value) in (list, tuple) else value

    for module in model.modules():
        shared = {"_parameters": module._parameters, "_buffers": module._buffers, "training": False}
        attributes = {name: value for name, value in vars(module).items() if name not in shared}
        copies[id(module)].__dict__.update({name: replaced(value) for name, value in attributes.items()} | shared)
    return copies[id(model)]
