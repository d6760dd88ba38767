"""The training step.

A step draws its random numbers from (seed, number of the step), so a run that is stopped after any step and resumed
gives the same weights as one that was not stopped. Of several processes, each trains on its part of a batch; dropout
then also depends on the rank.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitrail.data.loader import Batch
from vitrail.images.limits import computing
from vitrail.training.config.schema import TrainConfig
from vitrail.training.engine.batch_augmenter import View
from vitrail.training.engine.ema import Ema
from vitrail.training.engine.non_finite import NonFiniteGuard
from vitrail.training.engine.optimizer import clip_gradients, make_optimizer, parameter_groups, set_rates
from vitrail.training.engine.parallel import (
    BatchNormBuffers,
    convert_sync_batchnorm,
    no_sync,
    shard_model,
    wrap_model,
)
from vitrail.training.engine.schedule import Schedule
from vitrail.training.engine.state import TrainState
from vitrail.training.engine.state_dicts import (
    Tensors,
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
)
from vitrail.training.objectives.classification import Task
from vitrail.utils.counter_rng import fold
from vitrail.utils.device import precision, seed_torch, uses_bf16
from vitrail.utils.distributed import SINGLE_PROCESS, DistributedContext


class Trainer:
    """A model, its optimizer and the average of its weights (EMA), and the training step.

    A step does not wait for the device: losses are summed there until `mean_loss` reads them. A step whose loss or
    gradient is not finite changes neither weights nor average nor optimizer; `guard` counts it.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        view: Callable[[Batch, int], View],
        schedule: Schedule,
        config: TrainConfig,
        device: torch.device,
        distributed: DistributedContext = SINGLE_PROCESS,
        example: Batch | None = None,
    ) -> None:
        """example: a batch for a trial step, needed in several processes."""
        self.model = model.to(device).train()
        self.task = task
        self.view = view
        self.schedule = schedule
        self.config = config
        self.device = device
        self.distributed = distributed
        self.state = TrainState()
        self.guard = NonFiniteGuard(synchronous=device.type == "cpu")
        self.sharded = config.machine.shard and distributed.world_size > 1
        self.bf16 = uses_bf16(model, device, config.machine.amp)
        convert_sync_batchnorm(model, distributed, device)
        self._norms = BatchNormBuffers(model, distributed)
        decay = config.regularize.ema
        average = Ema.copy_of(model) if decay else None
        self._forward = self._wrap(average, example)
        self.groups = parameter_groups(model, config)
        self.optimizer = make_optimizer(self.groups, config.optimizer)
        self.ema = Ema(model, decay, config.regularize.ema_warmup, average) if decay else None
        self.loss_sum = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        self._parameters: list[nn.Parameter] = [p for group in self.groups for p in group["params"]]

    def _wrap(self, average: nn.Module | None, example: Batch | None) -> nn.Module:
        """The module to call in place of the model: DDP, sharded or compiled as configured."""
        if self.sharded and average is not None:
            shard_model(average, self.distributed, self.device)

        def trial_step(model: nn.Module) -> None:
            assert example is not None
            before = self._norms.snapshot()
            with precision(self.device, self.bf16):
                loss = self.task(model, self.view(example, 0))
            loss.backward()
            self._norms.restore(before)

        forward = wrap_model(self.model, self.distributed, self.device, self.sharded, trial_step)
        return torch.compile(forward) if self.config.machine.compile else forward  # type: ignore[return-value]

    @property
    def eval_model(self) -> nn.Module:
        """The model that is validated and saved: the average if there is one."""
        return self.ema.model if self.ema else self.model

    @property
    def lr(self) -> float:
        """The largest learning rate of the groups, as of the last step."""
        return max(float(group["peak_lr"]) for group in self.groups) * self.state.factor

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates as of the last step, by the groups' names without their ", no decay"."""
        return {
            group["name"].removesuffix(", no decay"): float(group["peak_lr"]) * self.state.factor
            for group in self.groups
        }

    @computing()
    def step(self, batch: Batch) -> None:
        """Train on one batch; of several processes, each passes its part, all of one size."""
        state, distributed = self.state, self.distributed
        seed = fold(self.config.seed, "step", state.steps)
        seed_torch(fold(seed, distributed.rank) if distributed.rank else seed, self.device)
        state.factor = self.schedule.factor(state.steps, state.spent) * state.lr_scale
        set_rates(self.optimizer, state.factor)
        # Not after the step: gradients freed last, at the end of the heap, would keep the memory before them allocated.
        self.optimizer.zero_grad(set_to_none=True)
        before = self._norms.snapshot()
        loss = self._accumulate_gradients(self.view(batch, state.epoch))
        norm = clip_gradients(self._parameters, self.config.optimizer.clip_grad)
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        self._optimizer_step(finite, before)
        self.loss_sum.add_(torch.where(finite, loss, 0))
        images = len(batch) * distributed.world_size
        self.guard.record(state, self.lr, finite, loss / images, images)
        state.steps += 1
        state.step += 1
        state.images += images
        state.epoch_images += images
        self.guard.flush_if_due()

    @computing()
    def rehearse(self, batch: Batch) -> None:
        """The forward and backward pass of a step, to be timed. The next step gives the same as without it."""
        buffers = list(self.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        self.optimizer.zero_grad(set_to_none=True)
        self._accumulate_gradients(self.view(batch, self.state.epoch))
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)

    def _optimizer_step(self, finite: Tensor, before: list[Tensor]) -> None:
        """Update weights, batch norm statistics and average if the gradient is finite; else restore the statistics."""
        if not self.guard.synchronous:
            self.optimizer.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
            self.optimizer.step()
            after = self._norms.snapshot()
            self._norms.restore([torch.where(finite, a, b) for a, b in zip(after, before, strict=True)])
        elif finite:
            self.optimizer.step()
        else:
            self._norms.restore(before)
        self._norms.average()
        if self.ema and not self.guard.synchronous:
            self.ema.update(self.state.steps, finite)
        elif self.ema and finite:
            self.ema.update(self.state.steps)

    def _accumulate_gradients(self, view: View) -> Tensor:
        """Gradients of the mean loss over all processes' images; a view goes through the model in `accumulate` parts.

        Returns the sum of the images' losses.
        """
        total = torch.zeros_like(self.loss_sum)
        size = -(-len(view) // self.config.machine.accumulate)
        for start in range(0, len(view), size):
            part = view if size >= len(view) else view.part(slice(start, start + size))
            with no_sync(self._forward, start + size < len(view)):
                with precision(self.device, self.bf16):
                    loss = self.task(self._forward, part)
                share = len(part) / len(view)
                (loss if share == 1 else loss * share).backward()
            total.add_(loss.detach(), alpha=len(part))
        self.distributed.all_reduce(total)
        return total

    def mean_loss(self) -> float:
        """The mean training loss of this epoch so far; NaN if no step was finite. Waits for the device."""
        self.guard.flush()
        return float(self.loss_sum) / self.state.epoch_images if self.state.epoch_images else float("nan")

    def next_epoch(self) -> None:
        """Go on to the start of the next epoch."""
        self.state.epoch += 1
        self.state.step = self.state.epoch_images = 0
        self.loss_sum.zero_()

    def state_dict(self) -> dict[str, Tensors]:
        """Every tensor that the next step depends on, by part: model, optimizer, ema, loss. See state_dicts.py."""
        parts = {
            "model": model_state(self.model, self.distributed),
            "optimizer": optimizer_state(self.model, self.optimizer, self.distributed),
            "loss": {"sum": self.loss_sum.cpu()},
        }
        return parts | ({"ema": model_state(self.ema.model, self.distributed)} if self.ema else {})

    @torch.no_grad()
    def load_state_dict(self, parts: dict[str, Tensors]) -> None:
        """Restore the result of `state_dict`; in several processes, that of rank 0.

        Raises:
            RunError: it is of another model.
        """
        distributed = self.distributed
        load_model_state(self.model, parts.get("model", {}), distributed)
        if self.ema:
            load_model_state(self.ema.model, parts.get("ema", {}), distributed)
        load_optimizer_state(self.model, self.optimizer, parts.get("optimizer", {}), distributed)
        self.loss_sum.fill_(distributed.broadcast_object(float(parts["loss"]["sum"]) if parts else 0.0))
