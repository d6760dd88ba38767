"""Knowledge distillation: the loss on the labels and the loss on a teacher's logits.

DeiT's distillation token: Touvron et al., 2020 (https://arxiv.org/abs/2012.12877), equations 2 (soft) and 3 (hard). The
class token is trained on the labels and the distillation token on the teacher. Without such a token the same logits are
trained on both: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (https://arxiv.org/abs/1503.02531).

Shapes: B batch, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import ConfigError
from vitrail.models.deit import DistilledVisionTransformer
from vitrail.training.config.schema import TrainConfig
from vitrail.training.engine.batch_augmenter import View
from vitrail.training.objectives.classification import Classify, Task
from vitrail.training.objectives.teacher import TeacherLogits, open_teacher
from vitrail.training.objectives.teacher_cache import StoredLogits, cache_key
from vitrail.training.setup import Setup


@dataclass(frozen=True)
class Hard:
    """Cross-entropy with the teacher's top class as the label. Logits and teacher B K; `mean` of the losses B."""

    def __call__(self, logits: Tensor, teacher: Tensor, mean: Callable[[Tensor], Tensor] = torch.mean) -> Tensor:
        return mean(F.cross_entropy(logits, teacher.argmax(dim=1), reduction="none"))


@dataclass(frozen=True)
class Soft:
    """tau^2 KL(teacher || student) at the temperature tau. Logits and teacher B K; `mean` of the losses B.

    tau^2 keeps the scale of the gradients when tau changes (Hinton et al., section 2).
    """

    temperature: float = 1.0

    def __call__(self, logits: Tensor, teacher: Tensor, mean: Callable[[Tensor], Tensor] = torch.mean) -> Tensor:
        student, teacher = (F.log_softmax(x.float() / self.temperature, dim=1) for x in (logits, teacher))
        return self.temperature**2 * mean(F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1))


@dataclass(frozen=True)
class Distill(Task):
    """(1 - weight) * loss on the labels + weight * loss on the teacher's logits for the same view.

    labels: the task without a teacher. teacher: a view to logits B K of the student's classes.
    """

    labels: Classify
    teacher: Callable[[View], Tensor]
    scheme: Hard | Soft
    weight: float = 0.5
    lines: tuple[str, ...] = ()
    teacher_fingerprint: str = ""

    def start_training(self) -> None:
        if isinstance(self.teacher, StoredLogits):
            self.teacher.start_writing()

    def __call__(self, model: nn.Module, view: View) -> Tensor:
        teacher_logits = self.teacher(view)  # first, before the student's activations take memory
        output = model(view.images)
        logits, distilled = output if isinstance(output, tuple) else (output, output)
        loss = self.labels.loss(logits, view)
        return (1 - self.weight) * loss + self.weight * self.scheme(distilled, teacher_logits, view.mean)


def make_task(setup: Setup, device: torch.device) -> Task:
    """The task of a run: classification, with distillation if it has a teacher.

    Raises:
        ConfigError: a setting has no effect.
        VitrailError: the teacher cannot be opened or does not fit the data.
    """
    config = setup.config
    labels = Classify(config.regularize.label_smoothing, config.regularize.loss, config.regularize.bce_threshold)
    _check(config)
    if config.distill.teacher is None:
        return labels
    teacher = open_teacher(setup.teacher if setup.teacher is not None else config.distill.teacher)
    logits = TeacherLogits(teacher, setup.preprocess, setup.dataset.class_names, device, config.machine.amp)
    logits.check()
    token = _has_distillation_token(setup.model)
    hard = config.distill.distill == "hard" or (config.distill.distill == "auto" and token)
    if hard and config.distill.temperature != 1.0:
        raise ConfigError("temperature has no effect with hard distillation: set distill=soft, or leave it out")
    lines = [f"teacher {teacher.description}{logits.notes}", _describe(config, hard, token)]
    source: Callable[[View], Tensor] = logits
    if config.distill.teacher_outputs is not None:
        source = stored = StoredLogits(config.distill.teacher_outputs, logits, cache_key(setup, logits))
        lines.append(stored.line)
    scheme = Hard() if hard else Soft(config.distill.temperature)
    return Distill(labels, source, scheme, config.distill.distill_weight, tuple(lines), teacher.fingerprint)


def _check(config: TrainConfig) -> None:
    """Raise ConfigError for a setting that needs a teacher if there is none."""
    for key, field in type(config.distill).model_fields.items():
        if config.distill.teacher is None and getattr(config.distill, key) != field.default:
            raise ConfigError(f"{key} has no effect without a teacher: set --teacher, or leave out {key}")


def _has_distillation_token(model: nn.Module) -> bool:
    """Whether the model has a head for the teacher's labels; enables it in timm's models."""
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)  # type: ignore[operator]
        return True
    return isinstance(model, DistilledVisionTransformer)


def _describe(config: TrainConfig, hard: bool, token: bool) -> str:
    scheme = "hard" if hard else f"soft, temperature {config.distill.temperature:g}"
    head = "distillation token" if token else "same logits as the labels"
    return f"distil  {scheme}, {head}, {config.distill.distill_weight:.0%} of the loss"
