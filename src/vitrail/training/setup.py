"""From the settings that were given to what is trained: dataset, config, model and preprocessing."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitrail.data.catalog import absolute_data, open_dataset
from vitrail.data.dataset import Dataset
from vitrail.errors import VitrailError
from vitrail.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from vitrail.inference.engine import default_workers
from vitrail.models.base import ImageModel
from vitrail.models.catalog import VARIANTS, variant
from vitrail.models.timm_compat import window_mismatch
from vitrail.pretrained.create import create_model
from vitrail.pretrained.load import Pretrained, load_pretrained
from vitrail.pretrained.model_folder import name_of
from vitrail.training.config.automatic import DatasetStats, choose
from vitrail.training.config.recipes import Recipe, named_recipe, recipe_names
from vitrail.training.config.schema import TrainConfig, Use, keys_for
from vitrail.training.resources.image_cache import settle_cache
from vitrail.utils.counter_rng import fold
from vitrail.utils.text import one_line

_WHOLE_IMAGE = 64  # pixels a side up to which evaluation sees the whole image, and not the middle of a larger one
_CROP_PCT = 0.95
_CROP_MODES = {"crop": "center", "pad": "border", "squash": "squash"}
_MUCH_LOST = 0.4  # share of an image
_FAMILIES = {row.family for row in VARIANTS.values()}


@dataclass
class Setup:
    """What a run starts from. reasons: a line for each setting that was chosen automatically."""

    config: TrainConfig
    dataset: Dataset
    model: nn.Module
    preprocess: Preprocess
    reasons: list[str]
    pretrained: Pretrained | None = None
    stats: DatasetStats | None = None  # that the automatic choice was based on
    given: Mapping[str, Any] = field(default_factory=dict)  # settings that were not chosen automatically
    teacher: Any = None  # a teacher that was passed as an object
    recipe: Recipe | None = None
    auto_batch: bool = False  # whether the batch size will be fitted to the device; config has a provisional one
    external: bool = False  # whether the model was passed as an object

    def with_batch_size(self, size: int, reason: str) -> "Setup":
        """The same with another batch size and the settings that follow from it, such as the learning rate."""
        assert self.stats is not None
        given = {**self.given, "batch_size": size}
        choice = choose(self.stats, given, self.recipe)
        config = self.config.updated({**choice.values, **given})
        others = self.reasons[len(choice.reasons) :]
        return replace(self, config=config, reasons=[*choice.reasons, reason, *others], auto_batch=False)


def prepare(
    data: str | Path | Dataset,
    asked: TrainConfig,
    external: nn.Module | None = None,
    recipe: Recipe | None = None,
) -> Setup:
    """Open the data, choose the settings that are not given, and build the model (or adapt an `external` one).

    asked: its given values are kept. recipe: None: the one that `asked` names, or one chosen for the images.

    Raises:
        VitrailError: the data, a setting or the model does not exist, or they do not fit together.
    """
    if recipe is None and asked.recipe in recipe_names():
        recipe = named_recipe(asked.recipe)
    if external is None and asked.model.model and not asked.model.weights:
        variant(asked.model.model)  # before a download, not after
    dataset = data if isinstance(data, Dataset) else open_dataset(data, data_dir=asked.data.data_dir, **held_out(asked))
    train = dataset.split("train")
    given = asked.given | {"data": data.name if isinstance(data, Dataset) else absolute_data(data)}
    if external is not None:
        given["model"] = type(external).__name__
    for key in ("teacher", "teacher_outputs"):
        if given.get(key):
            given[key] = absolute_path(given[key], must_exist=key == "teacher")
    auto_batch = given.get("batch_size") == 0
    if auto_batch:
        del given["batch_size"]
    pretrained = bool(asked.model.pretrained or asked.model.weights)
    stats = DatasetStats(len(train), dataset.sizes.median, dataset.sizes.uniform, pretrained)
    found = None
    if pretrained and external is None:
        if not given.get("weights") and "model" not in given:
            given["model"] = choose(stats, given, recipe).values["model"]
        found = _load(asked.updated(given), dataset)
        given["model"] = found.name or name_of(found.model.config)
    choice = choose(stats, given, recipe)
    config = TrainConfig().updated({"workers": default_workers(train), **choice.values, **given})
    if external is not None:
        model, preprocess = _prepare_external(external, config, dataset)
    elif found is not None:
        own = found.model.config
        model, preprocess = found.model, found.preprocess or _fresh_preprocess(dataset, own.img_size, own.in_chans)
    else:
        model, preprocess = _build(config, dataset)
    if config.model.fit != "auto":
        preprocess = preprocess.replace(crop_mode=_CROP_MODES[config.model.fit])
    _check_model(model, preprocess, dataset.num_classes)
    config, cache_line = settle_cache(config, dataset, preprocess)
    given["cache"] = config.io.cache
    weights = [str(found.report)] if found else []
    mismatch = window_mismatch(model.config, preprocess.size) if isinstance(model, ImageModel) else None
    notes = [mismatch] if mismatch else []
    reasons = [*choice.reasons, *weights, *notes, *advise_fit(dataset, preprocess, config), *cache_line]
    return Setup(
        config,
        dataset,
        model,
        preprocess,
        reasons,
        pretrained=found,
        stats=stats,
        given=given,
        recipe=recipe,
        auto_batch=auto_batch,
        external=external is not None,
    )


def advise_fit(dataset: Dataset, preprocess: Preprocess, config: TrainConfig) -> list[str]:
    """A line where the middle crop would lose much of the images and nobody chose it."""
    height, width = preprocess.size
    narrow, _, wide = (aspect * height / width for aspect in dataset.sizes.aspect)
    lost = 1 - min(narrow, 1 / wide, 1.0)
    if config.model.fit != "auto" or preprocess.crop_mode != "center" or lost < _MUCH_LOST:
        return []
    long = "wide" if wide > 1 / narrow else "tall"
    return [
        f"advice: some images are very {long}, and the middle crop loses up to {lost:.0%} of them; "
        "--fit pad or --fit squash keeps them whole"
    ]


def held_out(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide which images are held out."""
    return {key: config.flat[key] for key in keys_for(Use.HELD_OUT)}


def reopen(config: TrainConfig, data: str | Path | Dataset | None, external: nn.Module | None = None) -> Setup:
    """The setup of a run that is resumed; `data` is needed only where the config does not name it (a Dataset)."""
    return prepare(config.data.data if data is None else data, config.updated(config.flat), external)


def absolute_path(text: str, *, must_exist: bool = True) -> str:
    """A path made absolute; text that is no path, such as a model's name, as it is."""
    path = Path(text).expanduser()
    return text if text in VARIANTS or (must_exist and not path.exists()) else str(path.resolve())


def _build(config: TrainConfig, dataset: Dataset) -> tuple[nn.Module, Preprocess]:
    """A model from scratch, at the data's own mean and deviation."""
    row = variant(config.model.model).config
    size = config.model.img_size or row.img_size
    preprocess = _fresh_preprocess(dataset, size, config.model.in_chans or dataset.channels)
    torch.manual_seed(fold(config.seed, "weights"))
    model = create_model(
        config.model.model,
        num_classes=dataset.num_classes,
        img_size=size,
        in_chans=preprocess.channels,
        **_model_options(config),
    )
    return model, preprocess


def _load(options: TrainConfig, dataset: Dataset) -> Pretrained:
    """A model with weights, for these classes. Where no model of the catalog is named, the weights say which it is."""
    named = options.model.model not in (
        "",
        *_FAMILIES,
    )  # a family stands for weights without a variant name
    torch.manual_seed(fold(options.seed, "weights"))  # of a fresh head
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the report, which is always printed, says the same
        return load_pretrained(
            options.model.weights or "default",
            variant(options.model.model).name if named else None,
            num_classes=dataset.num_classes,
            class_names=dataset.class_names,
            img_size=options.model.img_size,
            in_chans=options.model.in_chans,
            **_model_options(options),
        )


def _model_options(config: TrainConfig) -> dict[str, Any]:
    values = {f"{key}_rate": config.flat[key] for key in keys_for(Use.BUILD)}
    return {name: value for name, value in values.items() if value is not None}


@torch.no_grad()
def _check_model(model: nn.Module, preprocess: Preprocess, num_classes: int) -> None:
    """One blank image through the model: a size that it cannot take is found now, and not in the first step."""
    training, device = model.training, next(model.parameters()).device
    blank = torch.zeros(1, preprocess.channels, *preprocess.size, device=device)
    try:
        logits = model.eval()(blank)
    except (RuntimeError, ValueError) as error:
        height, width = preprocess.size
        what = f"{preprocess.channels} channels of {height}x{width} pixels"
        raise VitrailError(f"{type(model).__name__} cannot take {what}: {one_line(error)}") from error
    finally:
        model.train(training)
    if tuple(logits.shape) != (1, num_classes):
        raise VitrailError(f"{type(model).__name__} gives {tuple(logits.shape)} for an image, not (1, {num_classes})")


def _fresh_preprocess(dataset: Dataset, size: tuple[int, int], channels: int) -> Preprocess:
    """For a model from scratch: the data's own mean and deviation."""
    crop_pct = 1.0 if max(size) <= _WHOLE_IMAGE else _CROP_PCT
    mean, std = dataset.mean or IMAGENET_MEAN, dataset.std or IMAGENET_STD
    return Preprocess(size=size, crop_pct=crop_pct, mean=mean, std=std, channels=len(mean)).with_channels(channels)


def _prepare_external(model: nn.Module, config: TrainConfig, dataset: Dataset) -> tuple[nn.Module, Preprocess]:
    """The caller's own model, with a head for these classes; its preprocessing is its own where it says."""
    for key in ("pretrained", "weights", *keys_for(Use.BUILD)):
        if config.flat[key]:
            raise VitrailError(f"{key} belongs to models made by name: set it on your own model before you pass it in")
    if getattr(model, "num_classes", None) != dataset.num_classes:
        if not hasattr(model, "reset_classifier"):
            kind = type(model).__name__
            raise VitrailError(f"{kind} needs num_classes = {dataset.num_classes}, or a reset_classifier to set it")
        torch.manual_seed(fold(config.seed, "weights"))
        model.reset_classifier(dataset.num_classes)  # type: ignore[operator]
    own: Any = getattr(model, "config", None)
    size = config.model.img_size
    if hasattr(own, "img_size") and hasattr(own, "in_chans"):  # one of ours
        return model, _fresh_preprocess(dataset, size or own.img_size, config.model.in_chans or own.in_chans)
    if isinstance(record := getattr(model, "pretrained_cfg", None), Mapping):  # one of timm's
        preprocess = Preprocess.from_timm(record)
        return model, preprocess.replace(size=size or preprocess.size)
    if size is None:
        raise VitrailError(
            f"{type(model).__name__} does not say which size it takes: pass img_size=224 or whatever it is"
        )
    return model, _fresh_preprocess(dataset, size, config.model.in_chans or 3)
