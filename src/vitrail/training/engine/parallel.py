"""A model on several processes: a copy in each (DDP), or parameters and optimizer state sharded over them (FSDP2).

Li et al., "PyTorch Distributed", 2020 (https://arxiv.org/abs/2006.15704); Zhao et al., "PyTorch FSDP", 2023
(https://arxiv.org/abs/2304.11277).
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vitrail.errors import DistributedError
from vitrail.training.config.schema import TrainConfig
from vitrail.utils.distributed import DistributedContext

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_HAVE_STATISTICS = (*_NORMS, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def check_distributed_config(config: TrainConfig, distributed: DistributedContext) -> None:
    """Raise DistributedError for settings that several processes do not support."""
    if distributed.world_size == 1:
        return
    if config.machine.compile:
        raise DistributedError("compile=true works in one process only: leave it out")
    if (config.augment.mixup or config.augment.cutmix) and config.schedule.batch_size // distributed.world_size % 2:
        raise DistributedError(
            f"mixup and CutMix pair images, and batch_size={config.schedule.batch_size} over {distributed.world_size} "
            f"processes leaves an odd number in each: use a multiple of {2 * distributed.world_size}"
        )


def wrap_model(
    model: nn.Module,
    distributed: DistributedContext,
    device: torch.device,
    shard: bool,
    trial_step: Callable[[nn.Module], None],
) -> nn.Module:
    """The module to call in place of `model`, which is on `device`: its gradients are the mean over the processes.

    With `shard` that is the model itself, sharded in place. trial_step: one forward and backward pass of a module.
    """
    if distributed.world_size == 1:
        return model
    if shard:
        shard_model(model, distributed, device)
        return model
    trial_step(model)
    unused = any(p.requires_grad and p.grad is None for p in model.parameters())  # in some external models
    model.zero_grad(set_to_none=True)
    # Batch norm buffers are ours to average: see BatchNormBuffers. DDP's option for them was renamed in newer torch.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {buffers: False}
    forward = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=unused,
        **options,
    )
    # DDP regroups its buckets after the first backward pass, which changes the order of sums. A resumed run must sum in
    # the same order as an uninterrupted one, so the first pass is done here.
    trial_step(forward)
    forward.zero_grad(set_to_none=True)
    return forward


def shard_model(model: nn.Module, distributed: DistributedContext, device: torch.device) -> None:
    """Shard a model's parameters over the processes, in place: each block, then the parameters outside blocks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (distributed.world_size,))
    for block in [*blocks(model), model]:
        fully_shard(block, mesh=mesh)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a network, inner ones first: modules of one type, two or more in a list or Sequential."""
    found = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len({type(part) for part in module}) == 1:
            found += [part for part in module if len(module) > 1 and _is_block(part)]
    return found[::-1]


def _is_block(module: nn.Module) -> bool:
    is_container = isinstance(module, nn.ModuleList | nn.Sequential)
    return not is_container and any(True for _ in module.children()) and any(True for _ in module.parameters())


def convert_sync_batchnorm(model: nn.Module, distributed: DistributedContext, device: torch.device) -> None:
    """Replace batch norms by SyncBatchNorm in several processes on CUDA, the only device that it supports."""
    if distributed.world_size == 1 or device.type != "cuda":
        return
    for name, child in list(model.named_children()):
        if type(child) in _NORMS:  # exactly these: a subclass in an external model may do more than a batch norm
            setattr(model, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
        else:
            convert_sync_batchnorm(child, distributed, device)


@contextlib.contextmanager
def no_sync(forward: nn.Module, enabled: bool) -> Iterator[None]:
    """DDP's no_sync, if `enabled` and the module is DDP: gradients are accumulated without being exchanged."""
    if enabled and isinstance(forward, DistributedDataParallel):
        with forward.no_sync():
            yield
    else:
        yield


def to_local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor, sharing its memory; a plain tensor as it is."""
    dtensor: Any = tensor
    return dtensor.to_local() if hasattr(tensor, "to_local") else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A DTensor gathered from all processes, which must all call this; a plain tensor as it is."""
    dtensor: Any = tensor
    return dtensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like_sharded(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that is the same in every process, sharded as `parameter` is; without sharding, as it is."""
    if not hasattr(parameter, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    dtensor: Any = parameter
    return distribute_tensor(tensor, dtensor.device_mesh, dtensor.placements, src_data_rank=None)


class BatchNormBuffers:
    """The running statistics of a model's batch norms, which a training step changes along with the weights."""

    def __init__(self, model: nn.Module, distributed: DistributedContext) -> None:
        norms = [m for m in model.modules() if isinstance(m, _HAVE_STATISTICS) and m.track_running_stats]
        statistics = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
        counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
        self._groups = [group for group in (statistics, counters) if group]  # each of one dtype
        self._distributed = distributed
        self._per_process = distributed.world_size > 1 and not any(isinstance(n, nn.SyncBatchNorm) for n in norms)

    def snapshot(self) -> list[Tensor]:
        """A copy, for `restore`."""
        return [torch.cat([tensor.detach().reshape(-1) for tensor in group]) for group in self._groups]

    def restore(self, snapshot: list[Tensor]) -> None:
        """Set the buffers to a snapshot."""
        for group, flat in zip(self._groups, snapshot, strict=True):
            values = flat.split([tensor.numel() for tensor in group])
            for tensor, value in zip(group, values, strict=True):
                tensor.copy_(value.reshape(tensor.shape))

    def average(self) -> None:
        """Set the statistics to their mean over the processes, if each computed them from its own images only."""
        if self._per_process and self._groups:
            flat = self.snapshot()
            self._distributed.all_reduce(flat[0])
            flat[0] /= self._distributed.world_size
            self.restore(flat)
