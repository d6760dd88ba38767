"""torch's number of threads in a training on the CPU: chosen by trial, and again when steps become slow."""

import time
from collections.abc import Callable

import torch

from vitrail.data.loader import Batch
from vitrail.images.preprocess import Preprocess
from vitrail.inference.threads import ThreadWatch, Trial, fastest_threads, timed
from vitrail.training.config.threads import ThreadPlan
from vitrail.training.engine.trainer import Trainer
from vitrail.training.resources.trial import blank_batch, estimate_peak_memory, trial_images
from vitrail.utils.memory import available_memory

_MAX_SHARE = 0.03  # of a training, after which a trial is cut short
_MIN_STEPS, _MIN_BUDGET = 20, 10.0  # of a run, and seconds, below which nothing is tried
_LONG = 500  # steps of a run from which on the trial takes full batches, else a part of them
_PARTS, _MIN_IMAGES = 4, 8
_MEMORY_SHARE = 0.9  # of the available memory, above which nothing is tried


class ThreadControl:
    """Sets the number of threads of each step. `plan` has what was set, for the run's config.

    setting: the config's `threads`. may_try: whether numbers may be tried: on the CPU, in a single process.
    """

    def __init__(self, setting: str = "none", may_try: bool = False) -> None:
        self.plan = ThreadPlan.parse(setting)
        self.may_try = may_try and self.plan.auto
        self.most = torch.get_num_threads()
        self._watch = ThreadWatch(self.most, self.most if self.may_try else 1)

    def apply(self, step: int) -> None:
        """Set the number of threads for this step."""
        threads = self.plan.at(step)
        if threads is not None and threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    def choose_for(self, trainer: Trainer, preprocess: Preprocess) -> str | None:
        """Choose the number for the first steps, if that is left open. A line if it is not torch's default."""
        if not self.open:
            return None
        torch.set_num_threads(1)  # the estimate of the memory takes no longer than it must on busy cores
        images = _trial_images(trainer) if self.most > 1 else 0
        if images:
            images = _within_memory(trainer, preprocess, images)
        limit = _MAX_SHARE * (trainer.schedule.budget or float("inf"))
        return self.choose(images, lambda: trainer.rehearse(blank_batch(images, preprocess)), limit)

    @property
    def open(self) -> bool:
        """Whether `choose` is to choose."""
        return self.may_try and self.plan.open

    def choose(self, images: int, work: Callable[[], object], limit: float = float("inf")) -> str | None:
        """Choose the first number, if that is left open, by work on so many images; 0 for torch's default.

        Returns a line if it is not torch's default. limit: see `fastest_threads`.
        """
        if not self.open:
            return None
        trial = self._try(work, limit) if images and self.most > 1 else Trial(self.most, {})
        self._set(0, trial.threads)
        if trial.threads == self.most:
            return None
        return f"threads {trial.threads} of {self.most}: {trial.line(images)}; threads={self.most} uses them all"

    def due(self, seconds: float) -> bool:
        """Whether `look` is due, after a step that took `seconds` without waiting for images."""
        return self._watch.due(seconds)

    def look(self, trainer: Trainer, batch: Batch) -> str | None:
        """Choose the number for the next steps by trial, on the last batch. A line if it is another one."""
        step, before = trainer.state.steps, torch.get_num_threads()
        trial = self._try(lambda: trainer.rehearse(batch), 0.0)
        self._set(step, trial.threads)
        if trial.threads == before:
            return None
        return f"threads {trial.threads} of {self.most} from step {step + 1} on: {trial.line(len(batch))}"

    def _try(self, work: Callable[[], object], limit: float) -> Trial:
        start = time.perf_counter()
        trial = fastest_threads(self.most, timed(work), limit)
        self._watch.looked(trial, time.perf_counter() - start)
        return trial

    def _set(self, step: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.plan = self.plan.changed(step, threads)


def _trial_images(trainer: Trainer) -> int:
    """Images of a trial step: of a short run, part of a batch; 0 for a run too short for any."""
    steps, size = trainer.schedule.steps, trainer.config.schedule.batch_size
    if steps is None:
        return size if (trainer.schedule.budget or 0.0) >= _MIN_BUDGET else 0
    if steps < _MIN_STEPS:
        return 0
    return size if steps >= _LONG or trainer.config.machine.compile else min(size, max(_MIN_IMAGES, size // _PARTS))


def _within_memory(trainer: Trainer, preprocess: Preprocess, images: int) -> int:
    """So many images or half of them, see `trial_images`; 0 if a step on all of them might exhaust the memory."""
    limit, expected = available_memory(trainer.device), estimate_peak_memory(trainer, preprocess, images)
    if limit is not None and expected >= _MEMORY_SHARE * limit:
        return 0
    return trial_images(trainer, expected, images)
