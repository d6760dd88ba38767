"""The teacher of a distillation: how it is opened, and how its input and output are adapted to the student.

The teacher sees the same augmented view as the student. The student's normalisation is undone, channels and size are
converted, and the teacher's normalisation is applied, on the device. The student's classes are selected by name.

Shapes: B batch, C channels, H W height and width, K classes.
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.classifier import Classifier, ExportedClassifier, load_torch
from vitrail.errors import ConfigError, ModelError, VitrailError, did_you_mean
from vitrail.images.preprocess import Preprocess
from vitrail.inference.export_folder import is_export
from vitrail.inference.exported import ExportRuntime, open_runtime
from vitrail.inference.onnx_runtime import OnnxModel
from vitrail.inference.runtime import Outputs
from vitrail.inference.torch_runtime import autocast
from vitrail.pretrained.external import open_external_model
from vitrail.training.engine.batch_augmenter import View
from vitrail.training.setup import absolute_path
from vitrail.utils.device import uses_bf16
from vitrail.utils.files import user_path
from vitrail.utils.fingerprint import model_fingerprint
from vitrail.utils.text import counted, one_line

_OBJECT = "python:"  # prefix, in the config, of a teacher that was passed as an object
_NO_PREPROCESS = "it has no preprocessing: the student's is used"
_GREY = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow converts RGB to grey

Source = str | Path | Classifier | ExportedClassifier | nn.Module


@dataclass(frozen=True)
class Teacher:
    """A classifier that returns logits.

    model: normalised float B C H W to B K. preprocess: None if unknown: the student's is used. class_names: None if
    unknown. fingerprint: of the weights. notes: assumptions that were made.
    """

    name: str
    model: nn.Module
    preprocess: Preprocess | None
    class_names: tuple[str, ...] | None
    fingerprint: str
    size: str  # such as "25,557,032 parameters"
    notes: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """Name, size and input."""
        size = ""
        if self.preprocess is not None:
            height, width = self.preprocess.size
            size = f", input {height}x{width}{' grey' if self.preprocess.channels == 1 else ''}"
        return f"{self.name}, {self.size}{size}"


def config_name(source: Source) -> str:
    """The teacher in a run's config: an absolute path, a name, or class and fingerprint of an object."""
    if isinstance(source, Classifier | nn.Module):
        model = source.model if isinstance(source, Classifier) else source
        return f"{_OBJECT}{type(model).__name__}:{model_fingerprint(model)[:16]}"
    if isinstance(source, ExportedClassifier):
        source = source.folder
    return absolute_path(str(source), must_exist=not isinstance(source, Path))


def open_teacher(source: Source) -> Teacher:
    """Open a teacher: a MODEL, an export, an .onnx file, or a classifier or module passed by the caller.

    Raises:
        VitrailError: as for a MODEL; ModelError if it has no classification head.
    """
    if isinstance(source, nn.Module):
        return _of_module(copy.deepcopy(source))  # the caller's own may be trained, moved, or be the student itself
    if isinstance(source, Classifier):
        return _of_classifier(source, copy.deepcopy(source.model), source.architecture)
    name = str(source)
    if name.startswith(_OBJECT):
        raise ConfigError(f"this run's teacher was passed from Python ({name}): pass it again, as teacher=")
    try:
        if name.lower().endswith(".onnx"):
            return _of_onnx(name, OnnxModel(user_path(name), torch.get_num_threads()))
        if is_export(name):
            return _of_export(name, open_runtime(name, torch.get_num_threads()))
        if (external := open_external_model(name)) is not None:
            return _teacher(name, external.model, external.preprocess, external.class_names)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            classifier = load_torch(name)
        return _of_classifier(classifier, classifier.model, name, tuple(str(warning.message) for warning in caught))
    except VitrailError as error:
        raise type(error)(f"the teacher cannot be opened: {error}") from None


def _of_classifier(classifier: Classifier, model: nn.Module, name: str, notes: tuple[str, ...] = ()) -> Teacher:
    if not classifier.class_names:
        raise ModelError(f"the teacher {name} has no head for classes: use a classifier")
    if name != classifier.architecture:
        name = f"{name} ({classifier.architecture})"
    return _teacher(name, model, classifier.preprocess, classifier.class_names, notes)


class _NumpyModule(nn.Module):
    """A function from NumPy's float32 B C H W to logits B K as a module, on any device."""

    def __init__(self, logits: Callable[[npt.NDArray[np.float32]], Outputs]) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.logits(images.detach().float().cpu().numpy())).to(images.device)


def _of_onnx(name: str, model: OnnxModel) -> Teacher:
    notes = model.notes if model.preprocess else (_NO_PREPROCESS,)
    size = f"{model.bytes / 1e6:,.1f} MB"
    return Teacher(name, _NumpyModule(model.run), model.preprocess, model.class_names, model.identity, size, notes)


def _of_export(name: str, runtime: ExportRuntime) -> Teacher:
    """It takes uint8 images, to which the augmented ones are rounded: no normalisation, which is inside."""
    record = runtime.record
    neutral = record.preprocess.replace(
        mean=(0.0,) * record.preprocess.channels, std=(1.0,) * record.preprocess.channels
    )

    def logits(images: npt.NDArray[np.float32]) -> Outputs:
        pixels = np.rint(images * 255).clip(0, 255).astype(np.uint8)
        return runtime.logits(np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)))

    size = f"{sum(each['bytes'] for each in record.files.values()) / 1e6:,.1f} MB"
    return Teacher(name, _NumpyModule(logits), neutral, record.class_names, runtime.fingerprint(), size)


def _of_module(module: nn.Module) -> Teacher:
    """Any module; without timm's `pretrained_cfg`, the student's preprocessing is used."""
    known = getattr(module, "preprocess", True) is not None  # of a model of vitrail it may be unknown
    record, names = getattr(module, "pretrained_cfg", None) if known else None, getattr(module, "class_names", None)
    preprocess = Preprocess.from_timm(record) if isinstance(record, Mapping) else None
    notes = () if preprocess else (_NO_PREPROCESS,)
    return _teacher(type(module).__name__, module, preprocess, tuple(names) if names else None, notes)


def _teacher(
    name: str,
    model: nn.Module,
    preprocess: Preprocess | None,
    class_names: tuple[str, ...] | None,
    notes: tuple[str, ...] = (),
) -> Teacher:
    """The model as a teacher, in eval mode and without gradients."""
    if getattr(model, "num_classes", None) == 0:
        raise ModelError(f"the teacher {name} has no head for classes: use a classifier")
    model.eval().requires_grad_(False)
    size = counted(sum(p.numel() for p in model.parameters()), "parameter")
    return Teacher(name, model, preprocess, class_names, model_fingerprint(model), size, notes)


class Adapt:
    """A student's images to a teacher's: float B C H W to float B C' H' W'.

    The normalisation is applied after resizing, which gives the same, as interpolation weights sum to 1.
    """

    def __init__(self, student: Preprocess, teacher: Preprocess, device: torch.device) -> None:
        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)

        if {student.channels, teacher.channels} - {1, 3} and student.channels != teacher.channels:
            raise ModelError(
                f"the teacher has {teacher.channels} channels and the student {student.channels}: "
                "only 1 and 3 channels can be converted"
            )
        mean, std = student.mean, student.std
        self.mixing: Tensor | None = None
        if student.channels > teacher.channels:  # converted to grey without normalisation: mean 0, standard deviation 1
            self.mixing = column([grey * s for grey, s in zip(_GREY, std, strict=True)])
            mean, std = (sum(grey * m for grey, m in zip(_GREY, mean, strict=True)),), (1.0,)
        if len(mean) < teacher.channels:
            mean, std = mean * teacher.channels, std * teacher.channels
        same = (mean, std) == (teacher.mean, teacher.std)
        self.scale = None if same else column([s / t for s, t in zip(std, teacher.std, strict=True)])
        shifts = [(s - t) / deviation for s, t, deviation in zip(mean, teacher.mean, teacher.std, strict=True)]
        self.shift = column(shifts)
        self.channels = teacher.channels
        self.size = None if student.size == teacher.size else teacher.size
        self.mode = {"nearest": "nearest", "bilinear": "bilinear"}.get(teacher.interpolation, "bicubic")

    def __call__(self, images: Tensor) -> Tensor:
        x = images
        if self.mixing is not None:
            x = (x * self.mixing).sum(dim=1, keepdim=True)
        if self.size is not None:
            x = F.interpolate(x, self.size, mode=self.mode, antialias=self.mode != "nearest")
        if self.scale is not None:
            return torch.addcmul(self.shift, x, self.scale)
        return x if x.shape[1] == self.channels else x.expand(-1, self.channels, -1, -1)


def match_classes(
    teacher_names: tuple[str, ...] | None, count: int, class_names: Sequence[str], name: str
) -> tuple[list[int] | None, str]:
    """The columns of the teacher's logits for `class_names`, None for all in their order; and a note.

    teacher_names: the teacher's `count` class names; None, or "0", "1", ..., if it has none.

    Raises:
        ModelError: the teacher lacks a class, or has no class names and another number of classes.
    """
    numbered = teacher_names == tuple(str(n) for n in range(count))
    if teacher_names is None or (numbered and not set(class_names) <= set(teacher_names)):
        if count != len(class_names):
            raise ModelError(
                f"the teacher {name} has {count} classes without names, and the data {len(class_names)}: "
                "they cannot be matched"
            )
        return None, "its classes have no names; the data's order is assumed"
    index = {label: i for i, label in enumerate(teacher_names)}
    missing = [label for label in class_names if label not in index]
    if missing:
        more = f" and {len(missing) - 1} more of the data's classes" if len(missing) > 1 else ""
        raise ModelError(
            f"the teacher {name} has no class {missing[0]!r}{did_you_mean(missing[0], teacher_names)}{more}: "
            "it needs all classes of the data, with the same names"
        )
    columns = [index[label] for label in class_names]
    if columns == list(range(count)):
        return None, ""
    return columns, "" if len(columns) == count else f"{len(columns)} of its {count} classes are used"


class TeacherLogits:
    """A teacher's logits of the student's classes for a view: float32 B K, without gradients.

    amp: as for the student; "auto" decides by the teacher's own width, so that a teacher gives the logits that it gives
    in `predict` and `evaluate`, whatever the student's precision is.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: Preprocess,
        class_names: Sequence[str],
        device: torch.device,
        amp: str = "auto",
    ) -> None:
        self.teacher = teacher
        self.student = student
        self.class_names = tuple(class_names)
        self.device = device
        self.model = teacher.model.to(device)
        self.bf16 = uses_bf16(self.model, device, amp)
        self.adapt: Callable[[Tensor], Tensor] | None = None
        if teacher.preprocess is not None:
            self.adapt = Adapt(student, teacher.preprocess, device)
        self.columns: Tensor | None = None
        self.notes = ""

    def check(self) -> None:
        """Try a blank image, so that errors are raised before training.

        Raises:
            ModelError: it cannot take the image, returns no logits, or its classes do not match.
        """
        blank = torch.zeros(1, self.student.channels, *self.student.size, device=self.device)
        name = self.teacher.name
        try:
            logits = self._all_logits(blank)
        except (RuntimeError, ValueError, TypeError) as error:
            shown = blank.shape if self.adapt is None else self.adapt(blank).shape
            what = f"{shown[1]} channels of {shown[2]}x{shown[3]} pixels"
            raise ModelError(f"the teacher {name} cannot take {what}: {one_line(error)}") from error
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 1 or logits.shape[1] < 1:
            kind = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ModelError(f"the teacher {name} gives {kind} for an image, not logits of shape (1, classes)")
        count, known = logits.shape[1], self.teacher.class_names
        if known is not None and len(known) != count:
            raise ModelError(f"the teacher {name} gives {count} logits and has {len(known)} class names")
        columns, note = match_classes(known, count, self.class_names, name)
        self.columns = None if columns is None else torch.tensor(columns, device=self.device)
        self.notes = "".join(f"; {text}" for text in (note, *self.teacher.notes) if text)

    def __call__(self, view: View) -> Tensor:
        logits = self._all_logits(view.images)
        if self.columns is not None:
            logits = logits.index_select(1, self.columns)
        return logits.float()

    @torch.no_grad()
    def _all_logits(self, images: Tensor) -> Tensor:
        with autocast(self.device, self.bf16):
            logits: Tensor = self.model(images if self.adapt is None else self.adapt(images))
        return logits
