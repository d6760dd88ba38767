"""Full state dicts of a model and its optimizer, for any number of processes, sharded or not.

In several processes all must call these functions. Rank 0 alone gets, and passes, the full tensors, on the CPU; they
are broadcast, and sharded again where the model is. So a checkpoint does not depend on the number of processes.
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from vitrail.errors import RunError
from vitrail.utils.distributed import DistributedContext

Tensors = dict[str, Tensor]


def _options(distributed: DistributedContext, strict: bool = True) -> StateDictOptions:
    several = distributed.world_size > 1
    return StateDictOptions(full_state_dict=True, cpu_offload=several, broadcast_from_rank0=several, strict=strict)


def model_state(model: nn.Module, distributed: DistributedContext) -> Tensors:
    """Parameters and buffers by name. In one process they share the model's memory."""
    return dict(get_model_state_dict(model, options=_options(distributed)))  # type: ignore[arg-type]


def load_model_state(model: nn.Module, tensors: Tensors, distributed: DistributedContext) -> None:
    """Copy the result of `model_state` into a model.

    Raises:
        RunError: names or shapes are not those of the model.
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def check() -> None:
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if wrong := [name for name in {**expected, **found} if expected.get(name) != found.get(name)]:
            raise RunError(f"the checkpoint does not match the model: {wrong[0]} is missing or has another shape")

    distributed.run_on_main(check)
    set_model_state_dict(model, dict(tensors), options=_options(distributed))


def optimizer_state(model: nn.Module, optimizer: Optimizer, distributed: DistributedContext) -> Tensors:
    """The optimizer's tensors under "parameter.key", such as "head.weight.exp_avg"; none before its first step."""
    if not optimizer.state:  # get_optimizer_state_dict would initialise it by a step
        return {}
    found = get_optimizer_state_dict(model, optimizer, options=_options(distributed))
    state: dict[str, Tensors] = found.get("state", {})  # type: ignore[assignment]
    return {f"{name}.{key}": tensor for name, entry in state.items() for key, tensor in entry.items()}


def load_optimizer_state(
    model: nn.Module, optimizer: Optimizer, tensors: Tensors, distributed: DistributedContext
) -> None:
    """Set the optimizer's tensors to the result of `optimizer_state`; its parameter groups are not changed.

    Raises:
        RunError: they belong to parameters that the model does not have.
    """
    state: dict[str, Tensors] = {}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition(".")
        state.setdefault(name, {})[key] = tensor
    parameters = dict(model.named_parameters())
    names = distributed.broadcast_object(list(state))
    if unknown := [name for name in names if name not in parameters]:
        raise RunError(f"the checkpoint does not match the model: it has no parameter {unknown[0]}")
    optimizer.zero_grad(set_to_none=True)
    optimizer.state.clear()
    if names:
        # Not strict: a parameter without a gradient has no state.
        full: dict[str, Any] = {"state": state, "param_groups": []} if state else {}
        set_optimizer_state_dict(model, optimizer, full, options=_options(distributed, strict=False))
        for name in parameters.keys() - set(names):  # set_optimizer_state_dict has initialised these too
            optimizer.state.pop(parameters[name], None)
