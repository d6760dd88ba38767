"""External models: models of timm or torchvision that are not in the catalog."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from vitrail.errors import DeviceError, ModelError, WeightsError, did_you_mean
from vitrail.images.preprocess import Preprocess
from vitrail.pretrained.resolve import is_catalog_source
from vitrail.utils.text import join_names, one_line, printable
from vitrail.weights.labels import label_names
from vitrail.weights.values import non_finite

_IMAGENET_CLASSES = 1000  # a head of this size is taken for ImageNet-1k


@dataclass(frozen=True)
class ExternalModel:
    """A model with its published weights, preprocessing and class names."""

    model: nn.Module
    preprocess: Preprocess
    class_names: tuple[str, ...] | None


def open_external_model(source: str) -> ExternalModel | None:
    """Load timm:NAME or torchvision:NAME[.WEIGHTS].

    None for any other source, for a model of the catalog, or if the library is not installed.

    Raises:
        ModelError: the library has no such model.
        WeightsError: its weights could not be loaded.
        DeviceError: the library cannot be imported.
    """
    library, _, name = source.partition(":")
    opener = _OPENERS.get(library)
    if opener is None or is_catalog_source(source) or find_spec(library) is None:
        return None
    try:
        module = import_module(library)
    except Exception as error:  # any kind, if its version does not match torch's
        raise DeviceError(f"{library} cannot be imported: {one_line(error)}") from error
    return opener(module, name)


def _timm(timm: Any, name: str) -> ExternalModel:
    if not timm.is_model(name):
        raise ModelError(f"timm has no model {printable(name)!r}{did_you_mean(name, timm.list_models())}")
    model = _load(f"timm:{name}", lambda: timm.create_model(name, pretrained=True))
    config: dict[str, Any] = dict(model.pretrained_cfg)
    names = config.get("label_names") or (
        label_names("imagenet-1k") if model.num_classes == _IMAGENET_CLASSES else None
    )
    return ExternalModel(model, Preprocess.from_timm(config), tuple(names) if names else None)


def _torchvision(torchvision: Any, name: str) -> ExternalModel:
    models = torchvision.models
    name, _, tag = name.partition(".")
    known = models.list_models(models)
    if name not in known:
        raise ModelError(f"torchvision has no model {printable(name)!r}{did_you_mean(name, known)}")
    available = models.get_model_weights(name)
    if tag and tag not in available.__members__:
        raise WeightsError(
            f"torchvision:{name} has no weights {printable(tag)!r}: choose from {', '.join(available.__members__)}"
        )
    weights = available[tag] if tag else available.DEFAULT
    model = _load(f"torchvision:{name}", lambda: models.get_model(name, weights=weights))
    preset = weights.transforms()
    preprocess = Preprocess(
        size=(preset.crop_size[0],) * 2,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
        crop_pct=min(1.0, preset.crop_size[0] / preset.resize_size[0]),
    )
    return ExternalModel(model, preprocess, tuple(weights.meta["categories"]))


def _load(source: str, create: Callable[[], nn.Module]) -> Any:
    """Create the model; any error of its download becomes a WeightsError, as do values that are not finite."""
    try:
        model = create()
    except Exception as error:
        raise WeightsError(f"could not load the weights of {source}: {one_line(error)}") from error
    if wrong := non_finite(model.state_dict()):
        raise WeightsError(f"{source} contains NaN or infinity in {join_names(wrong, 3)}: these weights are not usable")
    return model


_OPENERS: dict[str, Callable[[Any, str], ExternalModel]] = {"timm": _timm, "torchvision": _torchvision}
