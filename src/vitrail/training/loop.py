"""The training loop: one step, and the state that says how far a run has come.

A step draws its randomness from (seed, number of the step), so a run that is stopped after any step and taken up again
goes on as if nothing had been.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitrail.data.loader import Batch
from vitrail.randomness import fold
from vitrail.training.config import TrainConfig
from vitrail.training.device import precision, seed_torch, uses_bf16
from vitrail.training.ema import Ema
from vitrail.training.optim import clip_gradients, make_optimizer, parameter_groups, set_rates
from vitrail.training.schedule import Schedule
from vitrail.training.tasks import Task
from vitrail.training.views import View


@dataclass
class Place:
    """How far a run has come. A checkpoint keeps all of it."""

    epoch: int = 0  # the one that is being done, from 0
    step: int = 0  # steps done in it
    steps: int = 0  # steps done in all
    images: int = 0  # images learnt from in all
    epoch_images: int = 0  # and in this epoch
    seconds: float = 0.0  # of the clock, in all sessions of the run
    step_seconds: float = 0.0  # of these in steps, and not in validation or in writing checkpoints
    wait_seconds: float = 0.0  # of these waiting for images
    factor: float = 0.0  # what the peak learning rates were multiplied by in the last step


class Trainer:
    """A model, its optimiser and the average of its weights, and the step that moves them.

    Nothing in a step waits for the device: losses are summed there, and read when somebody looks.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        view: Callable[[Batch, int], View],
        schedule: Schedule,
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        self.model = model.to(device).train()
        self.task = task
        self.view = view
        self.schedule = schedule
        self.config = config
        self.device = device
        self.place = Place()
        self.groups = parameter_groups(model, config)
        self.optimizer = make_optimizer(self.groups, config.betas)
        self.ema = Ema(model, config.ema, config.ema_warmup) if config.ema else None
        self.bf16 = uses_bf16(device, config.amp)
        self.loss_sum = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        self._parameters: list[nn.Parameter] = [p for group in self.groups for p in group["params"]]
        self._forward: nn.Module = torch.compile(model) if config.compile else model  # type: ignore[assignment]

    @property
    def best_guess(self) -> nn.Module:
        """The model that is validated and kept: the average where there is one."""
        return self.ema.model if self.ema else self.model

    @property
    def lr(self) -> float:
        """The largest learning rate of the groups, as of the last step."""
        return max(float(group["peak_lr"]) for group in self.groups) * self.place.factor

    def step(self, batch: Batch) -> None:
        """Learn from one batch."""
        place = self.place
        seed_torch(fold(self.config.seed, "step", place.steps), self.device)
        place.factor = self.schedule.factor(place.steps, place.seconds)
        set_rates(self.optimizer, place.factor)
        self._learn(self.view(batch, place.epoch))
        if self.config.clip_grad is not None:
            clip_gradients(self._parameters, self.config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(place.steps)
        place.steps += 1
        place.step += 1
        place.images += len(batch)
        place.epoch_images += len(batch)

    def _learn(self, view: View) -> None:
        """Gradients of the mean loss over the whole view, which goes through the model in `accumulate` parts."""
        size = -(-len(view) // self.config.accumulate)
        for start in range(0, len(view), size):
            part = view if size == len(view) else view.part(slice(start, start + size))
            with precision(self.device, self.bf16):
                loss = self.task(self._forward, part)
            (loss if part is view else loss * (len(part) / len(view))).backward()
            self.loss_sum.add_(loss.detach(), alpha=len(part))

    def mean_loss(self) -> float:
        """The mean training loss of this epoch so far. Waits for the device."""
        return float(self.loss_sum) / max(self.place.epoch_images, 1)

    def next_epoch(self) -> None:
        """Go on to the start of the next epoch."""
        self.place.epoch += 1
        self.place.step = self.place.epoch_images = 0
        self.loss_sum.zero_()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor that the next step depends on, by part: model, optimizer, ema, loss."""
        parts = {"model": self.model.state_dict(), "optimizer": self._optimizer_state(), "loss": {"sum": self.loss_sum}}
        return parts | ({"ema": self.ema.model.state_dict()} if self.ema else {})

    def load_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take up what `state` gave."""
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.model.load_state_dict(state["ema"])
        self.loss_sum.copy_(state["loss"]["sum"])
        self._load_optimizer_state(state["optimizer"])

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
