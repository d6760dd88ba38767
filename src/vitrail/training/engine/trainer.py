"""The training loop: one step, and the state that says how far a run has come.

A step draws its randomness from (seed, number of the step), so a run that is stopped after any step and taken up again
goes on as if nothing had been. Of several processes, each learns from its part of a batch; dropout then also depends on
the process.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from vitrail.data.loader import Batch
from vitrail.errors import VitrailError
from vitrail.training.config.schema import TrainConfig
from vitrail.training.engine.batch_augmenter import View
from vitrail.training.engine.ema import Ema
from vitrail.training.engine.non_finite import NonFiniteGuard
from vitrail.training.engine.optimizer import clip_gradients, make_optimizer, parameter_groups, set_rates
from vitrail.training.engine.parallel import Statistics, apart, part_of, split, spread, synchronised, whole
from vitrail.training.engine.schedule import Schedule
from vitrail.training.engine.state import TrainState
from vitrail.training.objectives.classification import Task
from vitrail.utils.counter_rng import fold
from vitrail.utils.device import precision, seed_torch, uses_bf16
from vitrail.utils.distributed import SINGLE_PROCESS, DistributedContext


class Trainer:
    """A model, its optimiser and the average of its weights, and the step that moves them.

    Nothing in a step waits for the device: losses are summed there, and read when somebody looks. A step whose loss or
    gradient is not finite changes neither weights nor average nor optimiser; `guard` counts it.
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
        """example: a batch to try the model on, which several processes need."""
        self.model = model.to(device).train()
        self.task = task
        self.view = view
        self.schedule = schedule
        self.config = config
        self.device = device
        self.distributed = distributed
        self.state = TrainState()
        self.guard = NonFiniteGuard(reads_at_once=device.type == "cpu")
        self.sharded = config.machine.shard and distributed.world_size > 1
        self.bf16 = uses_bf16(model, device, config.machine.amp)
        synchronised(model, distributed, device)
        self._statistics = Statistics(model, distributed)
        decay = config.regularize.ema
        average = Ema.copy_of(model) if decay else None
        self._forward = self._prepare(average, example)
        self.groups = parameter_groups(model, config)
        self.optimizer = make_optimizer(self.groups, config.optimizer.betas)
        self.ema = Ema(model, decay, config.regularize.ema_warmup, average) if decay else None
        self.loss_sum = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        self._parameters: list[nn.Parameter] = [p for group in self.groups for p in group["params"]]

    def _prepare(self, average: nn.Module | None, example: Batch | None) -> nn.Module:
        """What is called instead of the model."""
        if self.sharded and average is not None:
            split(average, self.distributed, self.device)

        def attempt(model: nn.Module) -> None:
            assert example is not None
            before = self._statistics.read()
            with precision(self.device, self.bf16):
                loss = self.task(model, self.view(example, 0))
            loss.backward()
            self._statistics.write(before)

        forward = spread(self.model, self.distributed, self.device, self.sharded, attempt)
        return torch.compile(forward) if self.config.machine.compile else forward  # type: ignore[return-value]

    @property
    def eval_model(self) -> nn.Module:
        """The model that is validated and kept: the average where there is one."""
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

    def step(self, batch: Batch) -> None:
        """Train on one batch; of several processes, each passes its part, all of one size."""
        state, distributed = self.state, self.distributed
        seed = fold(self.config.seed, "step", state.steps)
        seed_torch(fold(seed, distributed.rank) if distributed.rank else seed, self.device)
        state.factor = self.schedule.factor(state.steps, state.spent) * state.rate
        set_rates(self.optimizer, state.factor)
        # Not at the end: what lies at the end of the heap keeps the system from taking back all that is free before it.
        self.optimizer.zero_grad(set_to_none=True)
        before = self._statistics.read()
        loss = self._accumulate_gradients(self.view(batch, state.epoch))
        norm = clip_gradients(self._parameters, self.config.optimizer.clip_grad)
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        self._optimizer_step(finite, before)
        self.loss_sum.add_(torch.where(finite, loss, 0))
        images = len(batch) * distributed.world_size
        self.guard.note(state, self.lr, finite, loss / images, images)
        state.steps += 1
        state.step += 1
        state.images += images
        state.epoch_images += images
        self.guard.read_if_due()

    def _optimizer_step(self, finite: Tensor, before: list[Tensor]) -> None:
        """Take the step, if the gradient is finite; else leave all as it is, and the statistics as they were before."""
        if not self.guard.reads_at_once:
            self.optimizer.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
            self.optimizer.step()
            after = self._statistics.read()
            self._statistics.write([torch.where(finite, a, b) for a, b in zip(after, before, strict=True)])
        elif finite:
            self.optimizer.step()
        else:
            self._statistics.write(before)
        self._statistics.average()
        if self.ema and not self.guard.reads_at_once:
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
            with apart(self._forward, start + size < len(view)):
                with precision(self.device, self.bf16):
                    loss = self.task(self._forward, part)
                share = len(part) / len(view)
                (loss if share == 1 else loss * share).backward()
            total.add_(loss.detach(), alpha=len(part))
        self.distributed.all_reduce(total)
        return total

    def mean_loss(self) -> float:
        """The mean training loss of this epoch so far; not a number where no step was good. Waits for the device."""
        self.guard.read()
        return float(self.loss_sum) / self.state.epoch_images if self.state.epoch_images else float("nan")

    def next_epoch(self) -> None:
        """Go on to the start of the next epoch."""
        self.state.epoch += 1
        self.state.step = self.state.epoch_images = 0
        self.loss_sum.zero_()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor that the next step depends on, by part: model, optimizer, ema, loss.

        Where they are split over processes, all must ask; the first one gets whole tensors on the CPU, the others none.
        """
        parts = {"model": self.model.state_dict(), "optimizer": self._optimizer_state(), "loss": {"sum": self.loss_sum}}
        parts |= {"ema": self.ema.model.state_dict()} if self.ema else {}
        return {part: self.gathered(tensors) for part, tensors in parts.items()}

    def gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as they are; where they are split over processes, whole in the first one, one at a time."""
        if not self.sharded:
            return tensors
        found = {}
        for name, tensor in tensors.items():
            all_of_it = whole(tensor.detach())
            if self.distributed.is_main:
                found[name] = all_of_it.cpu()
        return found

    @torch.no_grad()
    def load_state_dict(self, tensors: Iterable[tuple[str, str, Tensor]]) -> None:
        """Take up what `state` gave: part, name and tensor, in any order, and in each process the same.

        Raises:
            VitrailError: it is not of this model.
        """
        self.optimizer.state.clear()
        parts = {"model": self.model.state_dict(), "loss": {"sum": self.loss_sum}}
        parts |= {"ema": self.ema.model.state_dict()} if self.ema else {}
        missing = {(part, name) for part, tensors in parts.items() for name in tensors}
        moments: dict[str, Tensor] = {}
        weights = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for part, name, tensor in tensors:
            what, _, owner = name.partition(":")
            if part == "optimizer" and owner in weights:
                moments[name] = tensor if what == "step" else part_of(tensor, weights[owner])
            elif (part, name) in missing and parts[part][name].shape == tensor.shape:
                target = parts[part][name]
                target.copy_(part_of(tensor, target))
                missing.remove((part, name))
            else:
                raise VitrailError(f"the checkpoint does not fit this model: {name} of {part}")
        if missing:
            raise VitrailError(f"the checkpoint does not fit this model: it has no {min(missing)[1]}")
        self._load_optimizer_state(moments)

    def _names(self) -> list[str]:
        """Names of the parameters in the optimiser's order."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [names[id(parameter)] for parameter in self._parameters]

    def _optimizer_state(self) -> dict[str, Tensor]:
        """AdamW's tensors under "what:parameter"."""
        names, state = self._names(), self.optimizer.state_dict()["state"]
        return {f"{what}:{names[i]}": value for i, entry in state.items() for what, value in entry.items()}

    def _load_optimizer_state(self, tensors: dict[str, Tensor]) -> None:
        numbers = {name: i for i, name in enumerate(self._names())}
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            what, _, name = key.partition(":")
            state.setdefault(numbers[name], {})[what] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
