"""From the given settings to what is trained: dataset, config, model and preprocessing."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from vitrail.data.catalog import absolute_data, open_dataset
from vitrail.data.dataset import Data, Dataset
from vitrail.errors import ConfigError, DataError, ModelError, WeightsError
from vitrail.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from vitrail.inference.engine import default_workers
from vitrail.models.base import ImageModel
from vitrail.models.catalog import VARIANTS, variant
from vitrail.models.timm_compat import timm_mismatch
from vitrail.pretrained.create import create_model
from vitrail.pretrained.load import Pretrained, load_pretrained
from vitrail.pretrained.model_folder import name_of
from vitrail.pretrained.resolve import at_hand, unobtainable
from vitrail.training.callbacks import Callback
from vitrail.training.config.automatic import DatasetStats, candidates, choose, weights_advised
from vitrail.training.config.recipes import Recipe, named_recipe, recipe_names
from vitrail.training.config.schema import TrainConfig, Use, keys_for
from vitrail.training.resources.image_cache import settle_cache
from vitrail.utils.counter_rng import fold
from vitrail.utils.files import user_path
from vitrail.utils.text import format_bytes, one_line, printable

_FULL_CROP = 64  # largest input side, pixels, that is evaluated without a center crop
_CROP_PCT = 0.95
_CROP_MODES = {"crop": "center", "pad": "border", "squash": "squash"}
_LARGE_LOSS, _MANY_IMAGES = 0.4, 0.1  # shares of an image, and of the images
# Settings with which it is not left open whether training starts from published weights.
_DECIDES_WEIGHTS = {"pretrained", "weights", "teacher"}
_FAMILIES = {row.family for row in VARIANTS.values()}


@dataclass
class Setup:
    """What a run starts from. reasons: a line per automatic choice."""

    config: TrainConfig
    dataset: Dataset
    model: nn.Module
    preprocess: Preprocess
    reasons: list[str]
    pretrained: Pretrained | None = None
    stats: DatasetStats | None = None  # the automatic choice is based on them
    given: Mapping[str, Any] = field(default_factory=dict)  # settings that were not chosen automatically
    teacher: Any = None  # a teacher that was passed as an object
    recipe: Recipe | None = None
    auto_batch: bool = False  # the batch size will be chosen for the device; config has a provisional one
    external: bool = False  # the model was passed as an object
    callbacks: tuple[Callback, ...] = ()

    def with_batch_size(self, size: int, reason: str) -> "Setup":
        """The same with another batch size and the settings that follow from it, such as the learning rate."""
        assert self.stats is not None
        given = {**self.given, "batch_size": size}
        choice = choose(self.stats, given, self.recipe)
        config = self.config.updated({**choice.values, **given})
        other_reasons = self.reasons[len(choice.reasons) :]
        return replace(self, config=config, reasons=[*choice.reasons, reason, *other_reasons], auto_batch=False)


def prepare(
    data: Data,
    requested: TrainConfig,
    external: nn.Module | None = None,
    recipe: Recipe | None = None,
    *,
    may_use_weights: bool = True,
    may_download: bool = False,
) -> Setup:
    """Open the data, choose the settings that are not given, and build the model (or adapt an `external` one).

    requested: its given values are kept. recipe: None: the one that `requested` names, or one chosen for the images.
    may_use_weights: whether an automatically chosen model starts from published weights if they are on this machine;
    may_download: or if their server can be reached.

    Raises:
        VitrailError: of the kind of what is missing or does not match: data, setting, model or weights.
    """
    if recipe is None and requested.recipe in recipe_names():
        recipe = named_recipe(requested.recipe)
    if external is None and requested.model.model and not requested.model.weights:
        variant(requested.model.model)  # before a download, not after
    folder, split = requested.data.data_dir, split_settings(requested)
    dataset = open_dataset(data, data_dir=folder, **split)
    train = dataset.split("train")
    given = _portable(requested.given) | {"data": _storable(data) if isinstance(data, str | Path) else dataset.name}
    if external is not None:
        given["model"] = type(external).__name__
    if auto_batch := given.get("batch_size") == 0:
        del given["batch_size"]
    auto = may_use_weights and external is None and _weights_left_open(given, recipe, dataset)
    given = {key: value for key, value in given.items() if key != "pretrained" or value is not None}
    if auto:
        stats, loaded, weights_line = _automatic_weights(requested, given, dataset, may_download)
    else:
        stats, loaded, weights_line = _stated_weights(requested, given, dataset, external, recipe)
    if loaded is not None:
        given["model"] = loaded.name or name_of(loaded.model.config)
    given.setdefault("pretrained", stats.pretrained and not given.get("weights"))
    choice = choose(stats, given, recipe)
    config = TrainConfig().updated({"workers": default_workers(train), **choice.values, **given})
    model, preprocess = _make_model(config, dataset, external, loaded)
    config, cache_line = settle_cache(config, dataset, preprocess)
    given["cache"] = config.io.cache
    notes = ([str(loaded.report)] if loaded else []) + weights_line
    if isinstance(model, ImageModel) and (mismatch := timm_mismatch(model.config, preprocess.size)):
        notes.append(mismatch)
    return Setup(
        config,
        dataset,
        model,
        preprocess,
        reasons=[*choice.reasons, *notes, *advise_fit(dataset, preprocess, config), *cache_line],
        pretrained=loaded,
        stats=stats,
        given=given,
        recipe=recipe,
        auto_batch=auto_batch,
        external=external is not None,
    )


def dataset_stats(dataset: Dataset, pretrained: bool | None = None) -> DatasetStats:
    """What the automatic choice depends on.

    pretrained: whether training starts from weights. None: if the images are large, and the published weights of the
    model that would be chosen are on this machine. Nothing is downloaded without being asked for.
    """
    images, sizes = len(dataset.split("train")), dataset.sizes
    stats = DatasetStats(images, sizes.median, sizes.uniform, bool(pretrained))
    if pretrained is None and weights_advised(sizes.median):
        with_weights = replace(stats, pretrained=True)
        return with_weights if at_hand(candidates(with_weights)[0].model) else stats
    return stats


def _weights_left_open(given: Mapping[str, Any], recipe: Recipe | None, dataset: Dataset) -> bool:
    """Whether to start from published weights if they can be had: for images and inputs that are not small, if nothing
    else decides it, or with pretrained=auto."""
    if "pretrained" in given and given["pretrained"] is None:
        return not given.get("weights")
    large = all(weights_advised(size) for size in (dataset.sizes.median, given.get("img_size")) if size)
    return recipe is None and not _DECIDES_WEIGHTS & given.keys() and large


def _stated_weights(
    requested: TrainConfig,
    given: Mapping[str, Any],
    dataset: Dataset,
    external: nn.Module | None,
    recipe: Recipe | None,
) -> tuple[DatasetStats, Pretrained | None, list[str]]:
    """The weights that the settings ask for, if they ask for some; as `_automatic_weights`, without a line."""
    stats = dataset_stats(dataset, bool(requested.model.pretrained or requested.model.weights))
    if not stats.pretrained or external is not None:
        return stats, None, []
    if not given.get("weights") and "model" not in given:
        given = {**given, "model": choose(stats, given, recipe).values["model"]}
    return stats, _load(requested.updated(given), dataset), []


def _automatic_weights(
    requested: TrainConfig, given: Mapping[str, Any], dataset: Dataset, may_download: bool
) -> tuple[DatasetStats, Pretrained | None, list[str]]:
    """The published weights to start from, if they can be had; a line that says what was taken, or why it was not.
    Downloads if it may."""
    stats = dataset_stats(dataset, True)
    model = given.get("model") or candidates(stats)[0].model
    if not (reason := unobtainable(model, may_download)):
        cached = at_hand(model)
        try:
            loaded = _load(requested.updated({**given, "model": model, "pretrained": True}), dataset)
            size = format_bytes(sum(tensor.nbytes for tensor in loaded.loaded.tensors.values()))
            where = "in the cache" if cached else "from the hub"
            licence = loaded.loaded.licence or "not stated"
            line = (
                f"start   weights of {model}, licence {licence}, {size}, {where}; --no-pretrained trains from scratch"
            )
            return stats, loaded, [line]
        except WeightsError as error:  # a download that failed: training need not
            reason = one_line(error)
    line = (
        f"start   from scratch, without the published weights of {model}: {reason}; with weights of this or another "
        "model, or with --weights FILE, few images give a better result"
    )
    return dataset_stats(dataset, False), None, [line] if may_download else []


def advise_fit(dataset: Dataset, preprocess: Preprocess, config: TrainConfig) -> list[str]:
    """A line if the default center crop cuts off a large part of many images."""
    height, width = preprocess.size
    share = dataset.sizes.losing(width / height, _LARGE_LOSS)
    if config.model.fit != "auto" or preprocess.crop_mode != "center" or share < _MANY_IMAGES:
        return []
    return [
        f"advice: the center crop cuts off {_LARGE_LOSS:.0%} or more of {share:.0%} of the images; "
        "--fit pad or --fit squash keeps all of them"
    ]


def split_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide which images are held out for validation and test."""
    return {key: config.flat[key] for key in keys_for(Use.HELD_OUT)}


def absolute_path(text: str, *, must_exist: bool = True) -> str:
    """A path made absolute; other text, such as a catalog name, unchanged."""
    path = user_path(text)
    return text if text in VARIANTS or (must_exist and not path.exists()) else str(path.resolve())


def _portable(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with absolute paths, so that the run can be resumed from another directory."""
    paths = {key: given[key] for key in ("teacher", "teacher_outputs") if given.get(key)}
    return {**given, **{key: absolute_path(path, must_exist=key == "teacher") for key, path in paths.items()}}


def _storable(data: str | Path) -> str:
    """DATA as it is written to config.toml, which is UTF-8. Raises DataError if it cannot be."""
    text = absolute_data(data)
    if text.encode("utf-8", "replace") != text.encode("utf-8", "surrogateescape"):
        raise DataError(f"{printable(text)} is not UTF-8, and could not be written to the run: make a link to it")
    return text


def _make_model(
    config: TrainConfig, dataset: Dataset, external: nn.Module | None, loaded: Pretrained | None
) -> tuple[nn.Module, Preprocess]:
    """The model that is trained, from outside, from weights or from scratch, and its preprocessing."""
    if external is not None:
        model, preprocess = _prepare_external(external, config, dataset)
    elif loaded is not None:
        own = loaded.model.config
        model, preprocess = loaded.model, loaded.preprocess or _fresh_preprocess(dataset, own.img_size, own.in_chans)
    else:
        model, preprocess = _build(config, dataset)
    if config.model.fit != "auto":
        preprocess = preprocess.replace(crop_mode=_CROP_MODES[config.model.fit])
    _check_model(model, preprocess, dataset.num_classes)
    return model, preprocess


def _build(config: TrainConfig, dataset: Dataset) -> tuple[nn.Module, Preprocess]:
    """A model from scratch, normalised with the dataset's mean and standard deviation."""
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
    """A pretrained model with a head for these classes. The weights determine the variant if none is named."""
    named = options.model.model not in ("", *_FAMILIES)  # a run's config has the family if the variant has no name
    torch.manual_seed(fold(options.seed, "weights"))  # of a new head
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the report, which is always printed, has the same text
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
    rates = {f"{key}_rate": value for key in keys_for(Use.BUILD) if (value := config.flat[key]) is not None}
    return rates if config.model.merge is None else rates | {"merge": config.model.merge}


@torch.no_grad()
def _check_model(model: nn.Module, preprocess: Preprocess, num_classes: int) -> None:
    """Run one blank image through the model, so that an unsupported input size fails before training.

    One of our models computes only the shapes, on the meta device: a large size would take long.
    """
    training, ours = model.training, isinstance(model, ImageModel)
    device = torch.device("meta") if ours else next(model.parameters()).device
    blank = torch.zeros(1, preprocess.channels, *preprocess.size, device=device)
    own = [*model.named_parameters(), *model.named_buffers()] if ours else []
    state = {name: tensor.to(device) for name, tensor in own}
    try:
        logits = functional_call(model.eval(), state, (blank,))
    except (RuntimeError, ValueError) as error:
        height, width = preprocess.size
        what = f"{preprocess.channels} channels of {height}x{width} pixels"
        raise ModelError(f"{type(model).__name__} cannot take {what}: {one_line(error)}") from error
    finally:
        model.train(training)
    if tuple(logits.shape) != (1, num_classes):
        raise ModelError(f"{type(model).__name__} returns {tuple(logits.shape)} for an image, not (1, {num_classes})")


def _fresh_preprocess(dataset: Dataset, size: tuple[int, int], channels: int) -> Preprocess:
    """Preprocessing with the dataset's mean and standard deviation."""
    crop_pct = 1.0 if max(size) <= _FULL_CROP else _CROP_PCT
    mean, std = dataset.mean or IMAGENET_MEAN, dataset.std or IMAGENET_STD
    return Preprocess(size=size, crop_pct=crop_pct, mean=mean, std=std, channels=len(mean)).with_channels(channels)


def _prepare_external(model: nn.Module, config: TrainConfig, dataset: Dataset) -> tuple[nn.Module, Preprocess]:
    """The caller's model with a head for these classes, and its preprocessing if it has one."""
    for key in ("pretrained", "weights", "merge", *keys_for(Use.BUILD)):
        if config.flat[key]:
            raise ConfigError(f"{key} applies to models made by name: set it on the model before passing it")
    if getattr(model, "num_classes", None) != dataset.num_classes:
        if not hasattr(model, "reset_classifier"):
            kind = type(model).__name__
            raise ModelError(f"{kind} needs num_classes = {dataset.num_classes}, or a method reset_classifier")
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
        raise ConfigError(f"{type(model).__name__} has no config with its input size: pass img_size=, such as 224")
    return model, _fresh_preprocess(dataset, size, config.model.in_chans or 3)
