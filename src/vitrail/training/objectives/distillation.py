"""Learning from a teacher as well as from labels.

DeiT's distillation token: Touvron et al., 2020 (https://arxiv.org/abs/2012.12877), equations 2 (soft) and 3 (hard). The
class token learns the labels and the distillation token the teacher. Without such a token the same logits learn both:
Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (https://arxiv.org/abs/1503.02531).

Shapes: B batch, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import VitrailError
from vitrail.models.deit import DistilledVisionTransformer
from vitrail.training.config.schema import TrainConfig
from vitrail.training.engine.batch_augmenter import View
from vitrail.training.objectives.classification import Classify, Task
from vitrail.training.objectives.teacher import TeacherLogits, open_teacher
from vitrail.training.objectives.teacher_cache import Stored, deciding
from vitrail.training.setup import Setup


@dataclass(frozen=True)
class Hard:
    """Cross-entropy on the class that the teacher thinks best: logits and the teacher's, B K each, to a scalar."""

    def __call__(self, logits: Tensor, teacher: Tensor) -> Tensor:
        return F.cross_entropy(logits, teacher.argmax(dim=1))


@dataclass(frozen=True)
class Soft:
    """tau^2 KL(teacher || student), both softened by the temperature tau: logits B K each to the mean over the batch.

    tau^2 keeps the gradients' size when tau changes (Hinton et al., section 2).
    """

    temperature: float = 1.0

    def __call__(self, logits: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = (F.log_softmax(x.float() / self.temperature, dim=1) for x in (logits, teacher))
        return self.temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class Distill:
    """(1 - weight) of the loss on the labels and weight of the loss on what the teacher says of the same view.

    labels: the task without a teacher. teacher: a view to logits B K of the student's classes. lines: what there is to
    say of it before the first step. identity: changes when the teacher's weights do.
    """

    labels: Classify
    teacher: Callable[[View], Tensor]
    scheme: Hard | Soft
    weight: float = 0.5
    lines: tuple[str, ...] = ()
    identity: str = ""

    def __call__(self, model: nn.Module, view: View) -> Tensor:
        said = self.teacher(view)  # first, while the student holds no activations
        output = model(view.images)
        own, follower = output if isinstance(output, tuple) else (output, output)
        return (1 - self.weight) * self.labels.loss(own, view) + self.weight * self.scheme(follower, said)


def make_task(setup: Setup, device: torch.device) -> Task:
    """The task of a run: its labels, and its teacher where it has one.

    Raises:
        VitrailError: the teacher is not there or does not fit the student, or a key changes nothing.
    """
    config = setup.config
    labels = Classify(config.regularize.label_smoothing, config.regularize.loss, config.regularize.bce_threshold)
    _check(config)
    if config.distill.teacher is None:
        return labels
    teacher = open_teacher(setup.teacher if setup.teacher is not None else config.distill.teacher)
    answers = TeacherLogits(teacher, setup.preprocess, setup.dataset.class_names, device, config.machine.amp)
    answers.check()
    token = _learns_by_token(setup.model)
    hard = config.distill.distill == "hard" or (config.distill.distill == "auto" and token)
    if hard and config.distill.temperature != 1.0:
        raise VitrailError("temperature is for distill=soft: the teacher's best class is the same at any temperature")
    lines = [f"teacher {teacher.words}{answers.notes}", _describe(config, hard, token)]
    said: Callable[[View], Tensor] = answers
    if config.distill.teacher_outputs is not None:
        said = stored = Stored(config.distill.teacher_outputs, answers, deciding(setup, answers))
        lines.append(stored.line)
    scheme = Hard() if hard else Soft(config.distill.temperature)
    return Distill(labels, said, scheme, config.distill.distill_weight, tuple(lines), teacher.identity)


def begin(task: Task) -> None:
    """Tell a run's task that the steps to come are the run's own: those before were tried out."""
    if isinstance(task, Distill) and isinstance(task.teacher, Stored):
        task.teacher.begin()


def identity_of(task: Task) -> str:
    """A word that changes when the weights of the task's teacher do; empty without one."""
    return task.identity if isinstance(task, Distill) else ""


def _check(config: TrainConfig) -> None:
    """Refuse keys that need a teacher where there is none."""
    for key, field in type(config.distill).model_fields.items():
        if config.distill.teacher is None and getattr(config.distill, key) != field.default:
            raise VitrailError(f"{key} changes nothing without a teacher: name one with --teacher, or leave it out")


def _learns_by_token(model: nn.Module) -> bool:
    """Whether the model has a head of its own for the teacher; a guest of timm's is told to use it."""
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)  # type: ignore[operator]
        return True
    return isinstance(model, DistilledVisionTransformer)


def _describe(config: TrainConfig, hard: bool, token: bool) -> str:
    what = "its best class (hard)" if hard else f"its probabilities (soft, temperature {config.distill.temperature:g})"
    who = "the distillation token learns" if token else "the logits learn"
    return f"distil  {who} {what}, {config.distill.distill_weight:.0%} of the loss"
