"""External models: models of timm and torchvision outside the catalog, if the library is installed."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from vitrail.errors import DeviceError, ModelError, WeightsError, did_you_mean
from vitrail.images.preprocess import Preprocess
from vitrail.pretrained.resolve import is_of_catalog
from vitrail.utils.text import one_line, printable
from vitrail.weights.labels import label_names

_IMAGENET = 1000  # classes; heads of this size have ImageNet's, in its order


@dataclass(frozen=True)
class ExternalModel:
    """A model with its published weights, and what its library says of them."""

    model: nn.Module
    preprocess: Preprocess
    class_names: tuple[str, ...] | None


def open_external_model(source: str) -> ExternalModel | None:
    """The model that timm:NAME or torchvision:NAME names; None for other words, and for models of our catalog.

    Raises:
        WeightsError: the library knows no such model, or its weights cannot be had.
    """
    library, _, name = source.partition(":")
    opener = _OPENERS.get(library)
    if opener is None or is_of_catalog(source) or find_spec(library) is None:
        return None
    try:
        module = import_module(library)
    except Exception as error:  # an installation that does not fit torch's raises anything
        raise DeviceError(f"{library} cannot be imported: {one_line(error)}") from error
    return opener(module, name)


def _timm(timm: Any, name: str) -> ExternalModel:
    if not timm.is_model(name):
        near = did_you_mean(name, timm.list_models())
        raise ModelError(f"timm has no model {printable(name)!r}{near}")
    model = _published(f"timm:{name}", lambda: timm.create_model(name, pretrained=True))
    config: dict[str, Any] = dict(model.pretrained_cfg)
    names = config.get("label_names") or (label_names("imagenet-1k") if model.num_classes == _IMAGENET else None)
    return ExternalModel(model, Preprocess.from_timm(config), tuple(names) if names else None)


def _torchvision(torchvision: Any, name: str) -> ExternalModel:
    models = torchvision.models
    name, _, tag = name.partition(".")
    known = models.list_models(models)
    if name not in known:
        raise ModelError(f"torchvision has no model {printable(name)!r}{did_you_mean(name, known)}")
    kinds = models.get_model_weights(name)
    if tag and tag not in kinds.__members__:
        raise WeightsError(
            f"torchvision:{name} has no weights {printable(tag)!r}: there are {', '.join(kinds.__members__)}"
        )
    weights = kinds[tag] if tag else kinds.DEFAULT
    model = _published(f"torchvision:{name}", lambda: models.get_model(name, weights=weights))
    preset = weights.transforms()
    preprocess = Preprocess(
        size=(preset.crop_size[0],) * 2,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
        crop_pct=min(1.0, preset.crop_size[0] / preset.resize_size[0]),
    )
    return ExternalModel(model, preprocess, tuple(weights.meta["categories"]))


def _published(what: str, make: Callable[[], nn.Module]) -> Any:
    """The model; whatever keeps its weights away, in one line."""
    try:
        return make()
    except Exception as error:  # a download's, and whose error that is differs from library to library
        raise WeightsError(f"the weights of {what} could not be loaded: {one_line(error)}") from error


_OPENERS: dict[str, Callable[[Any, str], ExternalModel]] = {"timm": _timm, "torchvision": _torchvision}
