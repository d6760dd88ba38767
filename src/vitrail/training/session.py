"""One session of a run: its epochs, validations and checkpoints, from the current state to the end.

A run has several sessions if it is stopped and resumed. In several processes, each runs the same session; rank 0 writes
the files.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

from vitrail.data.contents import fingerprint
from vitrail.data.loader import Batch
from vitrail.errors import ConfigError, DivergedError, RunError
from vitrail.evaluation.evaluate import Interrupted, NotFinite, evaluate
from vitrail.evaluation.metrics import Evaluation
from vitrail.inference.engine import SplitReader
from vitrail.inference.torch_runtime import TorchRuntime
from vitrail.training.build import make_train_loader, make_trainer
from vitrail.training.callbacks import early_stop
from vitrail.training.checkpoints.best import BestWeights, validation_score
from vitrail.training.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vitrail.training.checkpoints.policy import CheckpointPolicy
from vitrail.training.checkpoints.run_folder import RunFolder
from vitrail.training.config.schema import KEYS
from vitrail.training.config.stamp import to_run_toml
from vitrail.training.engine.interrupt import Interrupt, Stopped
from vitrail.training.engine.non_finite import MAX_CONSECUTIVE_BAD_STEPS, MAX_ROLLBACKS, ROLLBACK_LR_SCALE
from vitrail.training.engine.parallel import check_distributed_config
from vitrail.training.engine.state import TrainState
from vitrail.training.engine.state_dicts import Tensors, load_model_state, model_state
from vitrail.training.engine.sync import ProcessSync
from vitrail.training.monitoring.plan import epoch_line
from vitrail.training.monitoring.progress import Reporter
from vitrail.training.monitoring.trackers import Trackers
from vitrail.training.resources.image_cache import cached_readers
from vitrail.training.resources.threads import ThreadControl
from vitrail.training.setup import Setup
from vitrail.utils.distributed import SINGLE_PROCESS, DistributedContext


class Session:
    """Trains a setup. Errors in the setup are raised by the constructor; files are written from `enter` on.

    `history` has one record per epoch, as metrics.jsonl has. `model` is the one that is saved in the end.
    """

    folder: RunFolder
    trackers: Trackers

    def __init__(
        self,
        setup: Setup,
        reporter: Reporter,
        device: torch.device,
        distributed: DistributedContext = SINGLE_PROCESS,
        threads: ThreadControl | None = None,
    ) -> None:
        config, dataset = setup.config, setup.dataset
        self.distributed = distributed
        self.setup = setup
        self.config = config
        self.reporter = reporter
        readers = cached_readers(config, dataset, setup.preprocess, reporter.log)
        self.loader = make_train_loader(setup, device, distributed, readers.get("train"))
        self.validation: SplitReader | None = None
        if "val" in dataset.splits:
            self.validation = SplitReader(dataset.split("val"), setup.preprocess, readers.get("val"))
        if config.schedule.patience is not None and self.validation is None:
            raise ConfigError("patience needs validation images, and the data have none: leave it out")
        check_distributed_config(config, distributed)
        # Several devices may need another module (sharded parameters, SyncBatchNorm) than the one to save.
        converted = distributed.world_size > 1 and (config.machine.shard or device.type == "cuda")
        self.model = copy.deepcopy(setup.model) if converted else setup.model
        self.trainer = make_trainer(setup, self.loader.steps_per_epoch, device, distributed)
        self.threads = threads or ThreadControl()
        self.images = fingerprint(dataset)
        self.teacher = self.trainer.task.teacher_fingerprint
        self.best = BestWeights()
        self.history: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}
        self.checked = ""  # a line about the images, of a resumed run
        self._policy = CheckpointPolicy(config)
        self._initial: Checkpoint | None = None
        self._last_whole: Path | None = None  # the checkpoint that was written or read last
        self._sync = ProcessSync(distributed)

    def enter(self, folder: RunFolder) -> bool:
        """Use this run folder, and restore its newest checkpoint; False if it has none.

        Raises:
            RunError: the checkpoint is of other images or of another teacher, or cannot be read.
        """
        self.folder = folder
        track = self.config.io.track if self.distributed.is_main else "none"
        self.trackers = Trackers(track, folder, self.config.flat, self.reporter.log)
        return self._restore(load_checkpoint(folder.checkpoint) if self.distributed.is_main else None)

    def choose_threads(self) -> str | None:
        """Choose torch's number of threads, if that is left open. A line if it is not torch's default."""
        line = self.threads.choose_for(self.trainer, self.setup.preprocess)
        self._note_threads()
        return line

    def _look_for_threads(self, batch: Batch) -> None:
        """Choose the number of threads for the next steps, and write it to the config before they are made."""
        if line := self.threads.look(self.trainer, batch):
            self.reporter.log(line)
            self._note_threads()
            self.folder.write_config(to_run_toml(self.config, KEYS))

    def _note_threads(self) -> None:
        used = {"threads": str(self.threads.plan)}
        self.config = self.config.updated(used)
        self.setup = replace(self.setup, config=self.config, given={**self.setup.given, **used})

    @property
    def next_lr(self) -> float:
        """The largest learning rate of the next step."""
        state = self.trainer.state
        factor = self.trainer.schedule.factor(state.steps, state.spent) * state.lr_scale
        return max(float(group["peak_lr"]) for group in self.trainer.groups) * factor

    def run(self) -> None:
        """Train to the end of the schedule.

        Raises:
            Stopped: by Ctrl-C or SIGTERM; a checkpoint is written.
            VitrailError: the loss is not finite, or memory or disk is full.
        """
        state = self.trainer.state
        self.folder.write_metrics(self.history)
        self.trainer.task.start_training()
        self.threads.apply(state.steps)
        if not state.steps and not state.rollbacks:
            self._initial = self._initial_checkpoint()
        self._started = time.perf_counter() - state.seconds
        with self.reporter, Interrupt(ignore_repeats=self.distributed.world_size > 1) as interrupt:
            while self.trainer.state.step or not self._finished():
                self._train_epoch(interrupt)
                if self.trainer.state.consecutive_bad_steps >= MAX_CONSECUTIVE_BAD_STEPS:
                    self._rollback()
                    continue
                self._stop_if_signalled(interrupt)
                self._end_epoch(interrupt)
                self._save_if_due()
                self._stop_if_signalled(interrupt)
        if self.trainer.state.steps:
            self.save()

    def _finished(self) -> bool:
        """Whether the schedule is at its end, or the run has stopped early."""
        state, schedule = self.trainer.state, self.trainer.schedule
        stopped = bool(state.stopped) and state.stopped_of == schedule.steps  # else it has been extended
        return stopped or schedule.finished(state.steps, state.spent)

    def _train_epoch(self, interrupt: Interrupt) -> None:
        """The rest of the epoch; less if the schedule ends, a signal arrives or several steps are not finite."""
        trainer, state, schedule = self.trainer, self.trainer.state, self.trainer.schedule
        start, waited = time.perf_counter(), self.loader.wait_seconds
        batches = self.loader.epoch(state.epoch, state.step)
        while not self._sync.signal and not schedule.finished(state.steps, state.spent):
            batch = next(batches, None)
            if batch is None:
                break
            trainer.step(batch)
            self.threads.apply(state.steps)
            now = time.perf_counter()
            step, wait = now - start, self.loader.wait_seconds - waited
            state.step_seconds += step
            state.wait_seconds += wait
            if self.threads.due(step - wait):
                self._look_for_threads(batch)
                now = time.perf_counter()
            start, waited = now, self.loader.wait_seconds
            self.reporter.step(trainer)
            self._sync.update(state, now - self._started, interrupt.number)
            if state.consecutive_bad_steps >= MAX_CONSECUTIVE_BAD_STEPS:
                break
            self._save_if_due()
        trainer.guard.flush()
        batches.close()  # type: ignore[attr-defined]  # a generator: cancels the batches that are being read

    def _end_epoch(self, interrupt: Interrupt) -> None:
        """Validate if it is due, record the epoch, and go to the next one."""
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
            start, longest = self._clock(), state.validation_seconds if self.best.epoch else 0.0  # else an estimate
            record |= self._validate(self.validation, interrupt)
            reserve = trainer.schedule.reserve(max(longest, self._clock() - start))
            state.validation_seconds = self.distributed.broadcast_object(reserve)
        self._sync.update(state, self._clock(), interrupt.number, force=True)
        record |= {"seconds": round(state.seconds, 3), "images_per_second": round(state.images_per_second, 1)}
        setup, patience, folder = self.setup, self.config.schedule.patience, self.folder.path
        reason = self.distributed.run_on_main(lambda: early_stop(setup.callbacks, patience, record, self.best, folder))
        state.stopped, state.stopped_of = "" if last else reason, trainer.schedule.steps
        if state.stopped and self.validation and "val_loss" not in record:
            record |= self._validate(self.validation, interrupt)  # else there might be no best epoch
        for skipped in self.distributed.all_gather_object(self.loader.skipped):
            self.skipped |= {item["path"]: item["reason"] for item in skipped}
        self.history.append(record)
        self.folder.append(self.folder.metrics, record)
        self.trackers.epoch(record, trainer.rates)
        self.reporter.epoch(epoch_line(record, self.config, self.best.epoch), last or bool(state.stopped))
        trainer.next_epoch()

    def _clock(self) -> float:
        """Seconds of the run so far, in this process."""
        return time.perf_counter() - self._started

    # --- validation

    def _validate(self, images: SplitReader, interrupt: Interrupt) -> dict[str, Any]:
        """Metrics of the current model, which is kept if it is the best so far; none if they are not finite."""
        try:
            result = self._evaluate(self.trainer.eval_model, images, "val", lambda: interrupt.number)
            if not np.isfinite(result.loss):
                raise NotFinite("the validation loss is not finite")
        except Interrupted as stopped:
            self._stop(stopped.signal)
        except NotFinite as error:
            self.reporter.log(f"epoch {self.trainer.state.epoch + 1} is not kept: {error}")
            return {}
        self.skipped |= {item["path"]: item["reason"] for item in result.skipped}
        score = validation_score(result, self.config.regularize.balance)
        if self.best.is_beaten_by(score, result.loss):
            weights = _cpu_copy(model_state(self.trainer.eval_model, self.distributed))
            self.best = BestWeights(self.trainer.state.epoch + 1, result.top1, result.loss, score, weights)
        names = ("top1", "balanced_top1", "top5", "loss", "ece")
        return {f"val_{name}": getattr(result, name) for name in names}

    def final_model(self) -> nn.Module:
        """The trainer's model with the best weights; without validation images, with the last ones.

        Raises:
            DivergedError: no validation was finite.
        """
        trainer, distributed = self.trainer, self.distributed
        if self.validation and self.trainer.state.steps and not self.best.epoch:
            raise DivergedError(
                f"no validation of the run in {self.folder.path} was finite: there is no model to keep; start a new "
                "run with a lower lr or more warmup_epochs, or check weights and images"
            )
        # All processes know the epoch; rank 0 alone has the weights.
        weights = self.best.weights if self.best.epoch else model_state(trainer.eval_model, distributed)
        load_model_state(trainer.model, weights, distributed)
        if self.model is not trainer.model:
            load_model_state(self.model, weights, distributed)
        return trainer.model.eval()

    def final_evaluation(self, model: nn.Module) -> Evaluation:
        """Metrics of the final model on the test split, else on the validation split."""
        name = self.setup.dataset.eval_split()
        images = SplitReader(self.setup.dataset.split(name), self.setup.preprocess)
        try:
            return self._evaluate(model, images, name)
        except NotFinite as error:
            raise DivergedError(f"the run in {self.folder.path} has no usable model: {error}") from None

    def _evaluate(
        self, model: nn.Module, images: SplitReader, name: str, stop: Callable[[], int | None] | None = None
    ) -> Evaluation:
        machine = self.config.machine
        return evaluate(
            TorchRuntime(model, self.setup.preprocess, machine.amp),
            images,
            self.setup.dataset.class_names,
            name=name,
            batch_size=machine.eval_batch_size,
            workers=machine.workers,
            stop=stop,
            distributed=self.distributed,
            sharded=self.trainer.sharded,
        )

    # --- checkpoints

    def save(self) -> None:
        """Write a checkpoint of the current state, unless the last one is of it."""
        trainer = self.trainer
        trainer.guard.flush()
        if self._policy.is_saved(trainer.state):
            return
        start = time.perf_counter()
        checkpoint = self._checkpoint()
        if self.distributed.is_main:
            steps, folder = trainer.state.steps, self.folder.checkpoint
            self._last_whole = save_checkpoint(folder, steps, checkpoint, keep=self._last_whole)
        self._policy.cost = self.distributed.broadcast_object(time.perf_counter() - start)
        self._policy.record(trainer.state)
        self._initial = None

    def _save_if_due(self) -> None:
        if self._policy.due(self.trainer.state):
            self.trainer.guard.flush()
            if self._policy.due(self.trainer.state):
                self.save()

    def _stop_if_signalled(self, interrupt: Interrupt) -> None:
        self._sync.update(self.trainer.state, self._clock(), interrupt.number, force=True)
        if self._sync.signal:
            self._stop(self._sync.signal)

    def _stop(self, number: int) -> NoReturn:
        self.save()
        where = f"epoch {self.trainer.state.epoch + 1}, step {self.trainer.state.steps}"
        raise Stopped(f"stopped at {where}; continue with `vitrail train --resume {self.folder.path}`", number)

    def _checkpoint(self) -> Checkpoint:
        """Of the current state. All processes must call this; rank 0 gets the tensors."""
        return Checkpoint(self.trainer.state_dict() | {"best": self.best.weights}, self._record())

    def _initial_checkpoint(self) -> Checkpoint:
        """Of the start of the run, kept in memory for a rollback until a checkpoint is written.

        At that point the average equals the model, and the optimizer has no state.
        """
        model = _cpu_copy(model_state(self.trainer.model, self.distributed))
        parts = {"model": model, "ema": model, "best": {}, "loss": {"sum": torch.zeros(())}}
        return Checkpoint(parts, self._record())

    def _record(self) -> dict[str, Any]:
        """What a checkpoint contains beside tensors."""
        return {
            "state": asdict(self.trainer.state),
            "best": self.best.record(),
            "history": list(self.history),
            "skipped": dict(self.skipped),
            "images": self.images.to_dict(),
            "teacher": self.teacher,
            "torch": torch.__version__,
        }

    def _restore(self, found: Checkpoint | None) -> bool:
        """Continue from rank 0's checkpoint; False if it has none."""
        record = self.distributed.broadcast_object(None if found is None else found.record)
        if record is None:
            return False
        if difference := self.images.difference(record["images"]):
            raise RunError(f"cannot resume {self.folder.path}: the images are not the same as before ({difference})")
        self.checked = self.images.checked(record["images"])
        if record["teacher"] != self.teacher:
            raise RunError(f"cannot resume {self.folder.path}: the teacher is not the same as before")
        tensors = found.tensors if found else {}
        for line in found.damaged if found else ():
            self.reporter.log(f"warning: {line}; resuming from the older one of step {record['state']['steps']}")
        self._last_whole = found.place if found else None
        self.trainer.state = TrainState(**record["state"])
        self.trainer.load_state_dict(tensors)
        self.best = BestWeights(**record["best"], weights=tensors.get("best", {}))
        self.history = record["history"]
        self.skipped = record["skipped"]
        self._policy.record(self.trainer.state)
        return True

    def _rollback(self) -> None:
        """Go back to the last checkpoint and lower the learning rate. Raises RunError after too many rollbacks."""
        trainer, before = self.trainer, self.trainer.state
        if before.rollbacks >= MAX_ROLLBACKS:
            raise RunError(trainer.guard.failure_message(self._policy.steps, before.rollbacks, trainer.bf16))
        self._restore((load_checkpoint(self.folder.checkpoint) or self._initial) if self.distributed.is_main else None)
        state = trainer.state
        state.lr_scale, state.rollbacks = before.lr_scale * ROLLBACK_LR_SCALE, before.rollbacks + 1
        state.skipped, state.consecutive_bad_steps = before.skipped, 0
        for name, value in vars(before).items():
            if name.endswith("seconds"):  # not undone
                setattr(state, name, value)
        first, last = trainer.guard.record_rollback()
        self.folder.write_metrics(self.history)
        self.save()
        self.reporter.log(
            f"steps {first} to {last} were not finite and changed nothing; "
            f"back at step {state.steps}, with {state.lr_scale:g} of the learning rate"
        )


def _cpu_copy(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
