"""A model on several processes: whole in each (DDP), or its weights and optimiser state split over them (FSDP2).

Li et al., "PyTorch Distributed", 2020 (https://arxiv.org/abs/2006.15704); Zhao et al., "PyTorch FSDP", 2023
(https://arxiv.org/abs/2304.11277). A checkpoint holds whole tensors either way, so that it knows no number of
processes.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vitrail.errors import VitrailError
from vitrail.training.config.schema import TrainConfig
from vitrail.utils.distributed import DistributedContext

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def check_shareable(config: TrainConfig, distributed: DistributedContext) -> None:
    """Raise VitrailError for what several processes cannot do."""
    if distributed.world_size == 1:
        return
    if config.machine.compile:
        raise VitrailError("compile=true is for one process: leave it out")
    if (config.augment.mixup or config.augment.cutmix) and config.schedule.batch_size // distributed.world_size % 2:
        raise VitrailError(
            f"mixup and CutMix pair images, and batch_size={config.schedule.batch_size} is not divisible by "
            f"{2 * distributed.world_size} (2 x processes): use a batch_size that is"
        )


def spread(
    model: nn.Module,
    distributed: DistributedContext,
    device: torch.device,
    shard: bool,
    attempt: Callable[[nn.Module], None],
) -> nn.Module:
    """What is called instead of the model, which is on `device`, so that gradients come out as the mean over processes.

    With `shard` the model itself is split, its blocks one by one. `attempt` takes the model forward and backward once.
    """
    if distributed.world_size == 1:
        return model
    if shard:
        split(model, distributed, device)
        return model
    attempt(model)
    unused = any(p.requires_grad and p.grad is None for p in model.parameters())  # a guest may have some
    model.zero_grad(set_to_none=True)
    # Batch norms are this library's: see Statistics. The key that leaves them alone has changed its name.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    leave: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    forward = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=unused,
        **leave,
    )
    # After its first pass it forms its sums in another order, and a run that is taken up again must find that one.
    attempt(forward)
    forward.zero_grad(set_to_none=True)
    return forward


def split(model: nn.Module, distributed: DistributedContext, device: torch.device) -> None:
    """Split a model's parameters over the processes, in place: block by block, and what stands outside of blocks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (distributed.world_size,))
    for block in [*blocks(model), model]:
        fully_shard(block, mesh=mesh)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The parts that a network repeats, the inner ones first: two or more of a kind in a row that have parts."""
    found = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len({type(part) for part in module}) == 1:
            found += [part for part in module if len(module) > 1 and _is_block(part)]
    return found[::-1]


def _is_block(module: nn.Module) -> bool:
    holds = isinstance(module, nn.ModuleList | nn.Sequential)
    return not holds and any(True for _ in module.children()) and any(True for _ in module.parameters())


def synchronised(model: nn.Module, distributed: DistributedContext, device: torch.device) -> bool:
    """Let batch norms see the images of all processes, where the device can (CUDA); whether there were any."""
    if distributed.world_size == 1 or device.type != "cuda":
        return False
    found = False
    for name, child in list(model.named_children()):
        if type(child) in _NORMS:  # exactly: a guest's own kind may do more than a batch norm
            setattr(model, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
            found = True
        else:
            found |= synchronised(child, distributed, device)
    return found


@contextlib.contextmanager
def apart(forward: nn.Module, wanted: bool) -> Iterator[None]:
    """No exchange of gradients inside, where this is wanted and the model is whole in each process."""
    if wanted and isinstance(forward, DistributedDataParallel):
        with forward.no_sync():
            yield
    else:
        yield


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, as a plain one that shares its memory."""
    own: Any = tensor
    return own.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts; every process must ask. A plain one comes back as it is."""
    own: Any = tensor
    return own.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which each process has, split as `like` is."""
    own: Any = like
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    there = tensor.to(own.to_local().device)
    return distribute_tensor(there, own.device_mesh, own.placements, src_data_rank=None)


_HAVE_STATISTICS = (*_NORMS, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class Statistics:
    """The running statistics of a model's batch norms, which a step changes beside the weights."""

    def __init__(self, model: nn.Module, distributed: DistributedContext) -> None:
        norms = [m for m in model.modules() if isinstance(m, _HAVE_STATISTICS) and m.track_running_stats]
        tensors = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
        counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
        self._kinds = [kind for kind in (tensors, counters) if kind]
        self._distributed = distributed
        self._shared = distributed.world_size > 1 and not any(isinstance(norm, nn.SyncBatchNorm) for norm in norms)

    def read(self) -> list[Tensor]:
        """A copy."""
        return [torch.cat([tensor.detach().reshape(-1) for tensor in kind]) for kind in self._kinds]

    def write(self, flat: list[Tensor]) -> None:
        """Set them to what `read` gave."""
        for kind, values in zip(self._kinds, flat, strict=True):
            parts = values.split([tensor.numel() for tensor in kind])
            for tensor, part in zip(kind, parts, strict=True):
                tensor.copy_(part.reshape(tensor.shape))

    def average(self) -> None:
        """Their mean over the processes, where each has seen its own images only."""
        if self._shared and self._kinds:
            flat = self.read()
            self._distributed.all_reduce(flat[0])
            flat[0] /= self._distributed.world_size
            self.write(flat)
