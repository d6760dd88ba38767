"""Classifiers: `Classifier`, a torch model with its preprocessing and class names; `ExportedClassifier`; and `load`.

Importing this imports no torch, so that an export predicts without it.
Shapes: K classes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitrail.errors import ConfigError, DeviceError, ModelError
from vitrail.images.preprocess import Preprocess
from vitrail.inference.engine import Engine
from vitrail.inference.export_folder import ExportRecord, is_export
from vitrail.inference.exported import open_runtime
from vitrail.prediction import BaseClassifier
from vitrail.reports.run_summary import RunSummary
from vitrail.utils.files import SUMS, mismatches, user_path
from vitrail.utils.text import one_line

if TYPE_CHECKING:
    import torch

    from vitrail.models.base import ImageModel
    from vitrail.pretrained.load import Pretrained

PRECISIONS = ("auto", "bf16", "off")  # see inference/torch_runtime.py


class Classifier(BaseClassifier):
    """`model` is an nn.Module in timm's interface, `preprocess` a Preprocess, `class_names` the K names by index.

    `precision` is "bf16" (autocast), "off" (float32) or "auto": the faster one on this hardware.
    """

    def __init__(
        self,
        model: ImageModel,
        preprocess: Preprocess,
        class_names: Sequence[str],
        report: Any = None,
        *,
        architecture: str | None = None,
        notes: dict[str, Any] | None = None,
        precision: str = "auto",
    ) -> None:
        from vitrail.pretrained.model_folder import name_of

        if precision not in PRECISIONS:
            raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        if len(class_names) != model.num_classes:
            raise ModelError(f"{len(class_names)} class names for a model of {model.num_classes} classes")
        super().__init__(class_names, architecture or name_of(model.config), notes or {}, precision)
        self.model = model
        self.preprocess = preprocess
        if hasattr(model, "unpooled"):  # a model of vitrail, whose pretrained_cfg then tells timm
            model.preprocess = preprocess
        self.report = report

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device | torch.dtype) -> Classifier:
        """Move the model; returns the classifier itself.

        Raises:
            ConfigError: a type of numbers: the weights stay float32, see `precision`.
        """
        if type(device).__name__ == "dtype":  # of torch, which need not have been imported
            kind = str(device).removeprefix("torch.")
            if kind == "float32":
                return self
            bf16 = 'for bfloat16 set precision="bf16" (classifier.precision, or vitrail.load)'
            raise ConfigError(f"the weights of a classifier stay float32, not {kind}: {bf16}")
        self.model.to(device)
        return self

    def half(self) -> Classifier:
        """Refused, see `to`."""
        import torch

        return self.to(torch.float16)

    def bfloat16(self) -> Classifier:
        """Refused, see `to`."""
        import torch

        return self.to(torch.bfloat16)

    def resize(self, img_size: int | tuple[int, int] | str) -> Classifier:
        """Change the input size, in pixels: 384, (320, 192) or "320x192" (height, width). Returns the classifier.

        Raises:
            ConfigError: not a size.
            ModelError: the model cannot take images of this size.
        """
        from pydantic import TypeAdapter, ValidationError

        from vitrail.inference.torch_runtime import TorchRuntime
        from vitrail.models.build import configure
        from vitrail.utils.settings import Size

        try:
            size = TypeAdapter(Size).validate_python(img_size)
        except ValidationError:
            raise ConfigError(f"{img_size!r} is not an image size: use 384, or 320x192 for height and width") from None
        preprocess = self.preprocess.replace(size=size or self.preprocess.size)
        configure(self.model.config, img_size=preprocess.size)  # raises ModelError for too many tokens
        try:
            TorchRuntime(self.model, preprocess).logits(np.zeros((1, *preprocess.size, preprocess.channels), np.uint8))
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"{self.architecture} cannot take images of {preprocess.size[0]}x{preprocess.size[1]}: {error}"
            ) from None
        self.preprocess = preprocess
        return self

    def engine(self, *, adapt_threads: bool = False, cuda_graphs: bool = False, frozen: bool = False) -> Engine:
        from vitrail.inference.torch_runtime import TorchRuntime

        runtime = TorchRuntime(
            self.model, self.preprocess, self.precision, self.architecture, adapt_threads, cuda_graphs, frozen
        )
        return Engine(runtime)

    def save(self, folder: str | Path) -> Path:
        """Write a model folder, atomically; see `vitrail.pretrained.model_folder`."""
        from vitrail.models.timm_compat import timm_mismatch
        from vitrail.pretrained.model_folder import Contents, write_model_folder

        folder = Path(folder)
        if getattr(self.model, "pruned", False):
            raise ModelError("a pruned model is not one of the catalog: save its state_dict() instead")
        mismatch = timm_mismatch(self.model.config, self.preprocess.size)
        if mismatch:
            warnings.warn(mismatch, stacklevel=2)
        write_model_folder(
            folder,
            Contents(
                model=self.model,
                preprocess=self.preprocess,
                class_names=self.class_names,
                architecture=self.architecture,
                notes=self.notes,
            ),
        )
        return folder


class ExportedClassifier(BaseClassifier):
    """A classifier from an export folder: predicts, embeds and evaluates without torch, on the CPU.

    `precision` is that of the export ("fp32", "bf16" or "int8"), `report` the result of its check. `record` is the
    content of its export.json.

    Raises:
        ExportError: the folder is damaged, or not of this version.
        ModelError: the number of class names is not that of the model's logits.
        DeviceError: the runtime of the export is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        runtime = open_runtime(folder)
        self.record = record = runtime.record
        super().__init__(record.class_names, record.architecture, record.notes, record.precision)
        self.preprocess = record.preprocess
        self.report = record.check
        self._engine = Engine(runtime)

    def engine(self, *, adapt_threads: bool = False, cuda_graphs: bool = False, frozen: bool = False) -> Engine:
        if cuda_graphs:
            raise DeviceError("CUDA graphs need a CUDA device, and an export runs on the CPU")
        return self._engine


def load(
    source: str | Path,
    device: str | torch.device = "cpu",
    img_size: int | tuple[int, int] | str | None = None,
    precision: str = "auto",
    model: str | None = None,
) -> Classifier | ExportedClassifier:
    """Load a classifier: an ExportedClassifier from an export, which imports no torch, else a Classifier.

    source: an export; a model folder or run folder; a catalog name, for its default published weights; hf:org/repo,
    timm:name, torchvision:name, a URL; or a checkpoint file or folder of another library. device: "auto" for the best
    available. img_size: an input size other than that of training, see `Classifier.resize`. precision: see
    `Classifier`. Size and precision of an export are fixed, and its device is the CPU. model: a catalog name, the
    architecture of a checkpoint that does not tell it; for another source, it must be of that architecture.

    Raises:
        WeightsError: the source does not exist, is damaged, or its weights do not match the model.
        ModelError: the model cannot be built, or cannot take images of this size.
        ConfigError: not a size, or not a precision; or one that an export does not have.
        ExportError, DeviceError: see `ExportedClassifier`; or the device is not available.
    """
    path = user_path(source)
    if not is_export(path) or model is not None:
        return load_torch(source, device, img_size, precision, model)
    if str(device) not in ("auto", "cpu"):
        raise DeviceError(f"{path} is an export, which runs on the CPU: leave out the device {str(device)!r}")
    classifier = ExportedClassifier(path)
    if precision != "auto":
        raise ConfigError(f"{path} is an export, computed in {classifier.precision}: leave out precision {precision!r}")
    if img_size is not None:
        height, width = classifier.preprocess.size
        raise ConfigError(
            f"{path} is an export for images of {height}x{width} pixels: export the model for another size"
        )
    return classifier


def load_torch(
    source: str | Path,
    device: str | torch.device = "cpu",
    img_size: int | tuple[int, int] | str | None = None,
    precision: str = "auto",
    model: str | None = None,
) -> Classifier:
    """`load` for what needs the torch model.

    Raises:
        ModelError: the source is an export.
    """
    from vitrail.models.catalog import VARIANTS, variant
    from vitrail.pretrained.model_folder import find_model_folder, read_model_folder
    from vitrail.utils.device import pick_device

    path = user_path(source)
    if is_export(path):
        origin = ExportRecord.read(path).source["name"]
        raise ModelError(f"{path} is an export, without the torch model that this needs: use the original, {origin}")
    if folder := find_model_folder(path):
        found = read_model_folder(folder)
        if model is not None and found.architecture != variant(model).name:
            raise ModelError(f"{path} is a model of {found.architecture}, not {model}: leave out the model's name")
        classifier = Classifier(
            found.model,
            found.preprocess,
            found.class_names,
            None if folder == path else _summary(path),
            architecture=found.architecture,
            notes=found.notes,
            precision=precision,
        )
    else:
        from vitrail.pretrained.load import load_pretrained  # not needed for a model folder

        name = str(source) if str(source) in VARIANTS and model is None else None
        classifier = _from_weights(load_pretrained("default" if name else source, name or model), precision)
    classifier.to(pick_device(device) if isinstance(device, str) else device)
    return classifier if img_size is None else classifier.resize(img_size)


def _from_weights(found: Pretrained, precision: str) -> Classifier:
    """Classes without known names are named by their indices."""
    config = found.model.config
    names = found.class_names
    if names is None or len(names) != config.num_classes:
        names = tuple(str(number) for number in range(config.num_classes))
    preprocess = found.preprocess
    if preprocess is None:
        if config.in_chans != 3:
            raise ModelError(
                f"{found.loaded.source} has no preprocessing for images of {config.in_chans} channels: "
                "load it with vitrail.create_model, and make a Classifier with a Preprocess"
            )
        assumed = f"{found.loaded.source} has no preprocessing: ImageNet's mean and std are assumed"
        warnings.warn(assumed, stacklevel=3)
        preprocess = Preprocess(size=config.img_size)
    return Classifier(
        found.model.eval(),
        preprocess,
        names,
        found.report,
        architecture=found.name,
        notes={"source": found.loaded.source, "licence": found.loaded.licence},
        precision=precision,
    )


def _summary(run: Path) -> Any:
    """A run's summary; None if the run is not finished, and with a warning if the file is damaged."""
    path = run / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if (run / SUMS).is_file() and mismatches(run, [path.name]):
            raise ValueError(f"its checksum in {SUMS} differs")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"{path} is damaged or was edited, and is not used: {one_line(error)}", stacklevel=3)
        return None
    return RunSummary(summary, run)
