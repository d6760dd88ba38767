"""One session of a run: its epochs, validations and checkpoints, from wherever it stands to its end.

A run has several sessions if it is stopped and taken up again. Where several processes train together, each goes
through the same session: they agree before every step on whether to stop and what time it is, and the first one writes.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from vitrail.data.cache.readers import Read
from vitrail.data.dataset import Dataset
from vitrail.data.loader import EvalLoader, TrainLoader
from vitrail.data.sampling import class_weights
from vitrail.errors import VitrailError
from vitrail.evaluation.evaluate import Abandoned, evaluate_loader, make_loader
from vitrail.evaluation.metrics import Evaluation
from vitrail.training.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vitrail.training.checkpoints.policy import Best, CheckpointPolicy, copied, everywhere, fingerprint, without_best
from vitrail.training.checkpoints.run_folder import RunFolder
from vitrail.training.config.schema import TrainConfig
from vitrail.training.engine.batch_augmenter import BatchAugmenter
from vitrail.training.engine.interrupt import Interrupt, Stopped
from vitrail.training.engine.non_finite import LOWER, RETURNS, TOLERATED
from vitrail.training.engine.parallel import check_shareable, part_of
from vitrail.training.engine.schedule import Schedule
from vitrail.training.engine.state import TrainState
from vitrail.training.engine.trainer import Trainer
from vitrail.training.monitoring.plan import epoch_line
from vitrail.training.monitoring.progress import Reporter
from vitrail.training.monitoring.trackers import Trackers
from vitrail.training.objectives.distillation import begin, identity_of, make_task
from vitrail.training.resources.image_cache import cached_readers
from vitrail.training.resources.trial import blank
from vitrail.training.setup import Setup
from vitrail.utils.distributed import SINGLE_PROCESS, DistributedContext


class Session:
    """Trains a setup. Faults of the setup show when it is made; it writes only to the folder that it enters.

    `history` has one record an epoch, as metrics.jsonl does. `model` is the one that is kept in the end.
    """

    folder: RunFolder
    trackers: Trackers

    def __init__(
        self, setup: Setup, reporter: Reporter, device: torch.device, distributed: DistributedContext = SINGLE_PROCESS
    ) -> None:
        config, dataset = setup.config, setup.dataset
        self.distributed = distributed
        self.setup = setup
        self.config = config
        self.reporter = reporter
        readers = cached_readers(config, dataset, setup.preprocess, reporter.say)
        self.loader = TrainLoader(
            dataset.split("train"),
            setup.preprocess,
            batch_size=config.schedule.batch_size,
            seed=config.seed,
            workers=config.machine.workers or 0,
            crop_scale=config.augment.crop_scale,
            crop_ratio=config.augment.crop_ratio,
            repeats=config.augment.repeats,
            balance=config.regularize.balance == "sample",
            rank=distributed.rank,
            world_size=distributed.world_size,
            pin=device.type == "cuda",
            read=readers.get("train"),
        )
        self.validation = self._eval_loader("val", device, readers.get("val")) if "val" in dataset.splits else None
        if config.machine.grad_checkpointing:
            _checkpoint_gradients(setup.model)
        check_shareable(config, distributed)
        # What training on several devices may change (split parameters, other batch norms) is nothing to keep.
        changes = distributed.world_size > 1 and (config.machine.shard or device.type == "cuda")
        self.model = copy.deepcopy(setup.model) if changes else setup.model
        self.trainer = Trainer(
            setup.model,
            make_task(setup, device),
            BatchAugmenter(
                config, setup.preprocess, dataset.num_classes, device, _class_weights(config, dataset), distributed
            ),
            make_schedule(config.schedule.epochs, self.loader.steps_per_epoch, setup),
            config,
            device,
            distributed,
            blank(2, setup.preprocess) if distributed.world_size > 1 else None,
        )
        self.images = fingerprint(dataset)
        self.teacher = identity_of(self.trainer.task)
        self.best = Best()
        self.history: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}
        self._due = CheckpointPolicy(config)
        self._start: Checkpoint | None = None
        self._signal: int | None = None

    def enter(self, folder: RunFolder) -> bool:
        """Work in this folder from now on, and take up its newest checkpoint; False where there is none.

        Raises:
            VitrailError: it is of other images, or cannot be read.
        """
        self.folder = folder
        track = self.config.io.track if self.distributed.is_main else "none"
        self.trackers = Trackers(track, folder, self.config.flat, self.reporter.say)
        found = load_checkpoint(folder.checkpoint) if self.distributed.is_main else None
        return self._take_up(found)

    def _take_up(self, found: Checkpoint | None) -> bool:
        """Go to the place of the first process's checkpoint; False where it has none."""
        record = self.distributed.broadcast_object(None if found is None else found.record)
        if record is None:
            return False
        if record["images"] != self.images:
            raise VitrailError(f"the images are not those that {self.folder.path} was trained on: it cannot go on")
        if record.get("teacher", "") != self.teacher:
            raise VitrailError(f"the teacher is not the one that {self.folder.path} learnt from: it cannot go on")
        self.trainer.state = TrainState(**record["place"])
        self.trainer.load_state_dict(everywhere({} if found is None else without_best(found), self.distributed))
        self.best = Best(**record["best"], weights=found.tensors["best"] if found else {})
        self.history = record["history"]
        self.skipped = record["skipped"]
        self._due.start(self.trainer.state)
        return True

    def run(self) -> None:
        """Train to the end of the schedule.

        Raises:
            Stopped: by Ctrl-C or SIGTERM; a checkpoint is written.
            VitrailError: the loss is not finite, memory or disk is full.
        """
        trainer, schedule = self.trainer, self.trainer.schedule
        self.folder.write_metrics(self.history)
        begin(trainer.task)
        if not trainer.state.steps and not trainer.state.rollbacks:
            self._start = self._first_checkpoint()
        self._started = time.perf_counter() - trainer.state.seconds
        with self.reporter, Interrupt(patient=self.distributed.world_size > 1) as interrupt:
            while trainer.state.step or not schedule.finished(trainer.state.steps, trainer.state.spent):
                self._steps(interrupt)
                if trainer.state.in_a_row >= TOLERATED:
                    self._return()
                    continue
                self._stop_if_asked(interrupt)
                self._end_epoch(interrupt)
                self._save_if_due()
                self._stop_if_asked(interrupt)
        if trainer.state.steps:
            self.save()

    def _steps(self, interrupt: Interrupt) -> None:
        """The rest of this epoch, or as much of it as the schedule, a signal or bad steps allow."""
        trainer, state, schedule = self.trainer, self.trainer.state, self.trainer.schedule
        begin, waited = time.perf_counter(), self.loader.wait_seconds
        batches = self.loader.epoch(state.epoch, state.step)
        while not self._asked(interrupt) and not schedule.finished(state.steps, state.spent):
            batch = next(batches, None)
            if batch is None:
                break
            self._agree(interrupt)
            trainer.step(batch)
            now = time.perf_counter()
            if self.distributed.world_size == 1:
                state.seconds = now - self._started
            state.step_seconds += now - begin
            state.wait_seconds += self.loader.wait_seconds - waited
            begin, waited = now, self.loader.wait_seconds
            self.reporter.step(trainer)
            if state.in_a_row >= TOLERATED:
                break
            self._save_if_due()
        trainer.guard.read()
        batches.close()  # type: ignore[attr-defined]  # a generator: lets go of the images made ahead

    def _agree(self, interrupt: Interrupt) -> None:
        """What all processes go by in the next step: signals that any has seen, and the first one's clock."""
        if self.distributed.world_size == 1:
            return
        rows = self.distributed.all_gather_numbers(interrupt.number or 0, self._clock(), self._due.cost)
        self._signal = round(max(row[0] for row in rows)) or None
        self.trainer.state.seconds, self._due.cost = rows[0][1:]

    def _asked(self, interrupt: Interrupt) -> int | None:
        """The signal that asks the run to stop, as of the last agreement."""
        return interrupt.number if self.distributed.world_size == 1 else self._signal

    def _clock(self) -> float:
        return time.perf_counter() - self._started

    def _return(self) -> None:
        """Back to the last checkpoint, at a lower rate; or the end, after too many returns."""
        trainer, now = self.trainer, self.trainer.state
        if now.rollbacks >= RETURNS:
            raise VitrailError(trainer.guard.account(self._due.steps, now.rollbacks, trainer.bf16))
        found = None
        if self.distributed.is_main:
            found = load_checkpoint(self.folder.checkpoint) or self._start
        self._take_up(found)
        state = trainer.state
        state.rate, state.rollbacks = now.rate * LOWER, now.rollbacks + 1
        state.skipped, state.in_a_row = now.skipped, 0
        for name, value in vars(now).items():
            if name.endswith("seconds"):  # the clock does not go back
                setattr(state, name, value)
        first, last = trainer.guard.returned()
        self.folder.write_metrics(self.history)
        self.save()
        self.reporter.say(
            f"steps {first} to {last} were not finite and changed nothing; "
            f"back at step {state.steps}, with {state.rate:g} of the learning rate"
        )

    def _end_epoch(self, interrupt: Interrupt) -> None:
        """Validate where it is time, note the figures, and go on to the next epoch."""
        trainer, state = self.trainer, self.trainer.state
        loss = trainer.mean_loss()
        last = trainer.schedule.finished(state.steps, state.spent)
        record: dict[str, Any] = {
            "epoch": state.epoch + 1,
            "steps": state.steps,
            "lr": trainer.lr,
            "train_loss": loss if np.isfinite(loss) else None,
            "train_images": state.epoch_images,
            "skipped_steps": state.skipped,
            "rollbacks": state.rollbacks,
        }
        if self.validation and (last or (state.epoch + 1) % self.config.schedule.eval_every == 0):
            begin, longest = self._clock(), state.validation_seconds if self.best.epoch else 0.0  # else an estimate
            record |= self._validate(self.validation, interrupt)
            took = trainer.schedule.reserve(max(longest, self._clock() - begin))
            state.validation_seconds = self.distributed.broadcast_object(took)
        state.seconds = self.distributed.broadcast_object(self._clock())
        record |= {"seconds": round(state.seconds, 3), "images_per_second": round(rate(state), 1)}
        found = [item for items in self.distributed.all_gather_object(self.loader.skipped) for item in items]
        self.skipped |= {item["path"]: item["reason"] for item in found}
        self.history.append(record)
        self.folder.add_metrics(record)
        self.trackers.epoch(record, trainer.rates)
        self.reporter.epoch(epoch_line(record, self.config, self.best.epoch), last)
        trainer.next_epoch()

    def _validate(self, loader: EvalLoader, interrupt: Interrupt | None = None) -> dict[str, Any]:
        stop = None if interrupt is None else lambda: interrupt.number
        try:
            result = self._evaluate(self.trainer.eval_model, loader, "val", stop)
        except Abandoned as stopped:
            self._stop(stopped.signal)
        self.skipped |= {item["path"]: item["reason"] for item in result.skipped}
        score = result.top1 if self.config.regularize.balance == "none" else result.balanced_top1
        if self.best.beaten_by(score, result.loss):
            weights = self.trainer.gathered(self.trainer.eval_model.state_dict())
            kept = copied(weights) if self.distributed.is_main else {}
            self.best = Best(self.trainer.state.epoch + 1, result.top1, result.loss, kept, score)
        names = ("top1", "balanced_top1", "top5", "loss", "ece")
        return {f"val_{name}": getattr(result, name) for name in names}

    def _stop_if_asked(self, interrupt: Interrupt) -> None:
        if number := self._asked(interrupt):
            self._stop(number)

    def _stop(self, number: int) -> NoReturn:
        self.save()
        where = f"epoch {self.trainer.state.epoch + 1}, step {self.trainer.state.steps}"
        raise Stopped(f"stopped at {where}; go on with `vitrail train --resume {self.folder.path}`", number)

    def _save_if_due(self) -> None:
        if self._due.now(self.trainer.state):
            self.trainer.guard.read()
            if self._due.now(self.trainer.state):
                self.save()

    def save(self) -> None:
        """Write a checkpoint of this very place, unless it stands."""
        self.trainer.guard.read()
        if self._due.saved(self.trainer.state):
            return
        with self._due.saving(self.trainer.state):
            checkpoint = self._checkpoint()
            if self.distributed.is_main:
                save_checkpoint(self.folder.checkpoint, self.trainer.state.steps, checkpoint)
        self._start = None

    def _checkpoint(self) -> Checkpoint:
        """Of this very place; where the model is split, all processes must ask, and the first one gets its tensors."""
        return Checkpoint(self.trainer.state_dict() | {"best": self.best.weights}, self._record())

    def _first_checkpoint(self) -> Checkpoint | None:
        """Of the run's beginning, in the first process's memory: to return to while none is written.

        The average is then the model itself, and the optimiser knows nothing yet.
        """
        weights = self.trainer.gathered(self.trainer.model.state_dict())
        if not self.distributed.is_main:
            return None
        model = copied(weights)
        tensors = {"model": model, "loss": {"sum": torch.zeros_like(self.trainer.loss_sum)}}
        return Checkpoint(tensors | ({"ema": model} if self.trainer.ema else {}) | {"best": {}}, self._record())

    def _record(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        best = {name: getattr(self.best, name) for name in ("epoch", "top1", "loss", "score")}
        return {
            "place": asdict(self.trainer.state),
            "best": best,
            "history": list(self.history),
            "skipped": dict(self.skipped),
            "images": self.images,
            "teacher": self.teacher,
            "torch": torch.__version__,
        }

    def final_model(self) -> torch.nn.Module:
        """The model, with the best weights; without any validation, with the last ones."""
        trainer = self.trainer
        # The epoch is known to all processes, the weights to the first one alone.
        weights = self.best.weights if self.best.epoch else trainer.gathered(trainer.eval_model.state_dict())
        there, kept = trainer.model.state_dict(), self.model.state_dict()
        with torch.no_grad():
            for _, name, tensor in everywhere({"best": weights}, self.distributed):
                there[name].copy_(part_of(tensor, there[name]))
                kept[name].copy_(tensor)
        return trainer.model.eval()

    def final_evaluation(self, model: torch.nn.Module) -> Evaluation:
        """Figures of the final model on the images that had no say in the training."""
        name = self.setup.dataset.eval_split()
        return self._evaluate(model, self._eval_loader(name, self.trainer.device), name)

    def _eval_loader(self, split: str, device: torch.device, read: Read | None = None) -> EvalLoader:
        setup, size, workers = self.setup, self.config.machine.eval_batch_size, self.config.machine.workers
        return make_loader(setup.dataset.split(split), setup.preprocess, device, size, workers, read, self.distributed)

    def _evaluate(
        self, model: torch.nn.Module, loader: EvalLoader, name: str, stop: Callable[[], int | None] | None = None
    ) -> Evaluation:
        return evaluate_loader(
            model,
            loader,
            self.setup.dataset.class_names,
            name,
            amp=self.config.machine.amp,
            stop=stop,
            distributed=self.distributed,
            together=self.trainer.sharded,
        )


def _class_weights(config: TrainConfig, dataset: Dataset) -> npt.NDArray[np.float64] | None:
    """What each class counts in the loss, where it is balanced."""
    if config.regularize.balance != "loss":
        return None
    return class_weights(dataset.split("train").labels, dataset.num_classes)


def make_schedule(epochs: float | None, steps_per_epoch: int, setup: Setup) -> Schedule:
    """The config's, in steps. Part of an epoch is at least one step."""
    config = setup.config
    steps = None if epochs is None else round(epochs * steps_per_epoch)
    if epochs:
        steps = max(steps or 0, 1)
    warmup = config.schedule.warmup_epochs * steps_per_epoch
    if steps and config.schedule.budget is None and warmup > steps:
        length = config.schedule.warmup_epochs
        raise VitrailError(f"warmup_epochs={length:g} is longer than the run of {epochs:g} epochs")
    if config.schedule.min_lr > config.optimizer.lr:
        raise VitrailError(f"min_lr={config.schedule.min_lr:g} is above lr={config.optimizer.lr:g}")
    return Schedule(steps, warmup, config.schedule.min_lr / config.optimizer.lr, config.schedule.budget)


def rate(state: TrainState) -> float:
    """Training images a second, without validation and checkpoints."""
    return state.images / state.step_seconds if state.step_seconds else 0.0


def _checkpoint_gradients(model: torch.nn.Module) -> None:
    if not hasattr(model, "set_grad_checkpointing"):
        raise VitrailError(f"{type(model).__name__} has no gradient checkpointing: set grad_checkpointing=false")
    model.set_grad_checkpointing(True)  # type: ignore[operator]
