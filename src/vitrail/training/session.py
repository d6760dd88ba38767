"""One session of a run: its epochs, validations and checkpoints, from wherever it stands to its end.

A run has several sessions if it is stopped and taken up again.
"""

import hashlib
import os
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.data.dataset import Dataset
from vitrail.data.loader import EvalLoader, TrainLoader
from vitrail.errors import VitrailError
from vitrail.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vitrail.training.evaluate import evaluate_loader, make_loader
from vitrail.training.folder import RunFolder
from vitrail.training.interrupt import Interrupt, Stopped
from vitrail.training.loop import Place, Trainer
from vitrail.training.metrics import Evaluation
from vitrail.training.plan import epoch_line
from vitrail.training.prepare import Setup
from vitrail.training.progress import Reporter
from vitrail.training.schedule import Schedule
from vitrail.training.tasks import Classify
from vitrail.training.views import Viewer


@dataclass
class Best:
    """The weights with the best validation so far: the highest top-1, of equal ones the lowest loss."""

    epoch: int = 0  # from 1; 0: none yet
    top1: float = -1.0
    loss: float = float("inf")
    weights: dict[str, Tensor] = field(default_factory=dict)

    def beaten_by(self, top1: float, loss: float) -> bool:
        """Whether these figures are better."""
        return (top1, -loss) > (self.top1, -self.loss)


class Session:
    """Trains a setup. Faults of the setup show when it is made; it writes only to the folder that it enters.

    `history` has one record an epoch, as metrics.jsonl does.
    """

    folder: RunFolder

    def __init__(self, setup: Setup, reporter: Reporter, device: torch.device) -> None:
        config, dataset = setup.config, setup.dataset
        self.setup = setup
        self.config = config
        self.reporter = reporter
        self.loader = TrainLoader(
            dataset.split("train"),
            setup.preprocess,
            batch_size=config.batch_size,
            seed=config.seed,
            workers=config.workers or 0,
            crop_scale=config.crop_scale,
            crop_ratio=config.crop_ratio,
            pin=device.type == "cuda",
        )
        self.validation = None
        if "val" in dataset.splits:
            self.validation = make_loader(
                dataset.split("val"), setup.preprocess, device, config.eval_batch_size, config.workers
            )
        if config.grad_checkpointing:
            _checkpoint_gradients(setup.model)
        self.trainer = Trainer(
            setup.model,
            Classify(config.label_smoothing),
            Viewer(config, setup.preprocess, dataset.num_classes, device),
            make_schedule(config.epochs, self.loader.steps_per_epoch, setup),
            config,
            device,
        )
        self.images = fingerprint(dataset)
        self.best = Best()
        self.history: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}
        self._saved_steps = -1
        self._saved_at = time.perf_counter()

    def enter(self, folder: RunFolder) -> bool:
        """Work in this folder from now on, and take up its newest checkpoint; False where there is none.

        Raises:
            VitrailError: it is of other images, or cannot be read.
        """
        self.folder = folder
        found = load_checkpoint(folder.checkpoint)
        if found is None:
            return False
        if found.record["images"] != self.images:
            raise VitrailError(f"the images are not those that {self.folder.path} was trained on: it cannot go on")
        self.trainer.place = Place(**found.record["place"])
        self.trainer.load_state(found.tensors)
        self.best = Best(**found.record["best"], weights=found.tensors["best"])
        self.history = found.record["history"]
        self.skipped = found.record["skipped"]
        self._saved_steps = self.trainer.place.steps
        return True

    def run(self) -> None:
        """Train to the end of the schedule.

        Raises:
            Stopped: by Ctrl-C or SIGTERM; a checkpoint is written.
            VitrailError: the loss is not finite, memory or disk is full.
        """
        trainer, schedule = self.trainer, self.trainer.schedule
        self.folder.write_metrics(self.history)
        self._started = time.perf_counter() - trainer.place.seconds
        with self.reporter, Interrupt() as interrupt:
            while trainer.place.step or not schedule.finished(trainer.place.steps, trainer.place.seconds):
                self._steps(interrupt)
                self._stop_if(interrupt)
                self._end_epoch()
                self._save_if_due()
                self._stop_if(interrupt)
        if trainer.place.steps != self._saved_steps and trainer.place.steps:
            self.save()

    def _steps(self, interrupt: Interrupt) -> None:
        """The rest of this epoch, or as much of it as the schedule or a signal allows."""
        trainer, place, schedule = self.trainer, self.trainer.place, self.trainer.schedule
        begin, waited = time.perf_counter(), self.loader.wait_seconds
        batches = self.loader.epoch(place.epoch, place.step)
        while not interrupt.number and not schedule.finished(place.steps, place.seconds):
            batch = next(batches, None)
            if batch is None:
                break
            trainer.step(batch)
            now = time.perf_counter()
            place.seconds = now - self._started
            place.step_seconds += now - begin
            place.wait_seconds += self.loader.wait_seconds - waited
            begin, waited = now, self.loader.wait_seconds
            self.reporter.step(trainer)
            self._save_if_due()
        batches.close()  # type: ignore[attr-defined]  # a generator: lets go of the images made ahead

    def _end_epoch(self) -> None:
        """Validate where it is time, note the figures, and go on to the next epoch."""
        trainer, place = self.trainer, self.trainer.place
        loss = trainer.mean_loss()
        if not np.isfinite(loss):
            raise VitrailError(
                f"the training loss became {loss} in epoch {place.epoch + 1}: use a lower lr (now {self.config.lr:g}), "
                "more warmup_epochs, or clip_grad=1"
            )
        last = trainer.schedule.finished(place.steps, place.seconds)
        record: dict[str, Any] = {
            "epoch": place.epoch + 1,
            "steps": place.steps,
            "lr": trainer.lr,
            "train_loss": loss,
            "train_images": place.epoch_images,
        }
        if self.validation and (last or (place.epoch + 1) % self.config.eval_every == 0):
            record |= self._validate(self.validation)
        place.seconds = time.perf_counter() - self._started
        record |= {"seconds": round(place.seconds, 3), "images_per_second": round(rate(place), 1)}
        self.skipped |= {item["path"]: item["reason"] for item in self.loader.skipped}
        self.history.append(record)
        self.folder.add_metrics(record)
        self.reporter.epoch(epoch_line(record, self.config, self.best.epoch), last)
        trainer.next_epoch()

    def _validate(self, loader: EvalLoader) -> dict[str, Any]:
        result = evaluate_loader(
            self.trainer.best_guess, loader, self.setup.dataset.class_names, "val", amp=self.config.amp
        )
        self.skipped |= {item["path"]: item["reason"] for item in result.skipped}
        if self.best.beaten_by(result.top1, result.loss):
            weights = {
                name: value.detach().to("cpu", copy=True)
                for name, value in self.trainer.best_guess.state_dict().items()
            }
            self.best = Best(self.trainer.place.epoch + 1, result.top1, result.loss, weights)
        return {f"val_{name}": getattr(result, name) for name in ("top1", "top5", "loss", "ece")}

    def _stop_if(self, interrupt: Interrupt) -> None:
        if interrupt.number is None:
            return
        self.save()
        where = f"epoch {self.trainer.place.epoch + 1}, step {self.trainer.place.steps}"
        raise Stopped(f"stopped at {where}; go on with `vitrail train --resume {self.folder.path}`", interrupt.number)

    def _save_if_due(self) -> None:
        steps, minutes = self.config.checkpoint_every, self.config.checkpoint_minutes
        by_steps = steps and self.trainer.place.steps % steps == 0
        by_time = minutes and time.perf_counter() - self._saved_at >= 60 * minutes
        if by_steps or by_time:
            self.save()

    def save(self) -> None:
        """Write a checkpoint of this very place."""
        best = {"epoch": self.best.epoch, "top1": self.best.top1, "loss": self.best.loss}
        record = {
            "place": asdict(self.trainer.place),
            "best": best,
            "history": self.history,
            "skipped": self.skipped,
            "images": self.images,
            "torch": torch.__version__,
        }
        tensors = self.trainer.state() | {"best": self.best.weights}
        save_checkpoint(self.folder.checkpoint, self.trainer.place.steps, Checkpoint(tensors, record))
        self._saved_steps = self.trainer.place.steps
        self._saved_at = time.perf_counter()

    def final_model(self) -> torch.nn.Module:
        """The model, with the best weights; without any validation, with the last ones."""
        self.trainer.model.load_state_dict(self.best.weights or self.trainer.best_guess.state_dict())
        return self.trainer.model.eval()

    def final_evaluation(self, model: torch.nn.Module) -> Evaluation:
        """Figures of the final model on the images that had no say in the training."""
        dataset, name = self.setup.dataset, self.setup.dataset.eval_split()
        loader = make_loader(
            dataset.split(name),
            self.setup.preprocess,
            self.trainer.device,
            self.config.eval_batch_size,
            self.config.workers,
        )
        return evaluate_loader(model, loader, dataset.class_names, name, amp=self.config.amp)


def make_schedule(epochs: float | None, steps_per_epoch: int, setup: Setup) -> Schedule:
    """The config's, in steps. Part of an epoch is at least one step."""
    config = setup.config
    steps = None if epochs is None else round(epochs * steps_per_epoch)
    if epochs:
        steps = max(steps or 0, 1)
    warmup = config.warmup_epochs * steps_per_epoch
    if steps and config.budget is None and warmup > steps:
        raise VitrailError(f"warmup_epochs={config.warmup_epochs:g} is longer than the run of {epochs:g} epochs")
    if config.min_lr > config.lr:
        raise VitrailError(f"min_lr={config.min_lr:g} is above lr={config.lr:g}")
    return Schedule(steps, warmup, config.min_lr / config.lr, config.budget)


def rate(place: Place) -> float:
    """Training images a second, without validation and checkpoints."""
    return place.images / place.step_seconds if place.step_seconds else 0.0


def fingerprint(dataset: Dataset) -> str:
    """A word that changes when the training or validation images, their order or their labels do.

    Images go by the last two parts of their names, so that a folder may move.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name in ("train", "val"):
        split = dataset.splits.get(name)
        if split is not None:
            digest.update(np.ascontiguousarray(split.labels).tobytes())
            names = ("/".join(split.name(i).split(os.sep)[-2:]) for i in range(len(split)))
            digest.update("\n".join(names).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _checkpoint_gradients(model: torch.nn.Module) -> None:
    if not hasattr(model, "set_grad_checkpointing"):
        raise VitrailError(f"{type(model).__name__} has no gradient checkpointing: set grad_checkpointing=false")
    model.set_grad_checkpointing(True)  # type: ignore[operator]
