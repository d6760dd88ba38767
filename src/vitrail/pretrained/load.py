"""A model with the weights that a source holds: what is in the file decides what is built."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vitrail.errors import ModelError
from vitrail.images.preprocess import Preprocess
from vitrail.models.base import ImageModel
from vitrail.models.build import build_model, configure
from vitrail.models.catalog import variant
from vitrail.models.configs import ModelConfig
from vitrail.pretrained.resolve import Loaded, load_source
from vitrail.weights.heads import HeadPolicy
from vitrail.weights.report import Report

# What a file may have otherwise than the catalog's row of the same model; everything else makes another network of it.
_FREE = {
    "img_size",
    "in_chans",
    "num_classes",
    "drop_rate",
    "drop_path_rate",
    "pos_drop_rate",
    "proj_drop_rate",
    "attn_drop_rate",
    "norm_eps",
    "init_values",
    "ls_init_value",
    "dist_head",
}


@dataclass(frozen=True)
class Pretrained:
    """The model, and how its weights came into it.

    `name` is the catalog's, where it is known. `preprocess` is what the weights were trained with, at the model's own
    size and channels. `class_names` are those of the head that was loaded; None for a fresh head or unknown names.
    """

    model: ImageModel
    loaded: Loaded
    report: Report
    name: str | None
    preprocess: Preprocess | None
    class_names: tuple[str, ...] | None


def load_pretrained(
    source: str | Path,
    name: str | None = None,
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    heads: HeadPolicy = "auto",
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    **options: Any,
) -> Pretrained:
    """Build the model that `source` holds weights for, and load them strictly.

    Args:
        source: see `vitrail.pretrained.resolve`.
        name: the catalog's name of the model; may be left out where the source says what it is.
        num_classes: for a fresh head; None keeps the head that is there.
        class_names: of the classes that the head is for, to keep or permute an old head by name.
        heads: "auto", "keep" or "new"; see `vitrail.weights.load.load_weights`.
        img_size, in_chans, options: changes of the config; tensors are resampled to them.

    Raises:
        VitrailError: no such source, nothing known of the network, or tensors that do not fit it.
    """
    loaded = load_source(source, name)
    known = loaded.architecture
    config = _agreed(known.config, name, str(source))
    if name is None and known.name and _differing(config, known.name) is None:
        name = known.name  # else a file that starts from a model of the catalog and changes it: that has no name
    # The head that is in the file says how many classes there are: configs of other libraries often do not.
    config = configure(
        config,
        num_classes=loaded.num_classes if num_classes is None else num_classes,
        img_size=img_size,
        in_chans=in_chans,
        **options,
    )
    if "dist_token" in loaded.tensors and "head_dist.weight" not in loaded.tensors and loaded.num_classes:
        config = configure(config, dist_head=False)  # transformers' DeiT without a teacher
    model = build_model(config)
    report = loaded.fit(model, num_classes=num_classes, class_names=class_names, heads=heads)
    preprocess = known.preprocess or (variant(name).preprocess if name else None)
    names = known.class_names if num_classes is None else None
    return Pretrained(model, loaded, report, name, _fitted(preprocess, config), names)


def _agreed(found: ModelConfig | None, name: str | None, source: str) -> ModelConfig:
    """The config that the file states, once it is certain that it is the model asked for."""
    if name is None:
        if found is None:
            raise ModelError(f"{source} does not say which model its weights are for: pass --model")
        return found
    row = variant(name).config
    if found is None:
        return row
    if type(found) is not type(row):
        raise ModelError(f"{source} holds a {type(found).__name__.removesuffix('Config')}, which {name} is not")
    if field := _differing(found, name):
        mine, theirs = getattr(row, field), getattr(found, field)
        raise ModelError(f"{source} is another model than {name}: its {field} is {theirs}, not {mine}")
    return found


def _differing(config: ModelConfig, name: str) -> str | None:
    """The first field that makes `config` another network than the catalog's row of that name; None for none."""
    row = variant(name).config
    names = [field.name for field in fields(row) if field.name not in _FREE]
    return next((field for field in names if getattr(config, field, None) != getattr(row, field)), None)


def _fitted(preprocess: Preprocess | None, config: ModelConfig) -> Preprocess | None:
    """At the size and with the channels of the model. Grey is the mean of the colours."""
    if preprocess is None:
        return None
    if preprocess.channels != config.in_chans:
        mean, std = ((sum(values) / len(values),) * config.in_chans for values in (preprocess.mean, preprocess.std))
        preprocess = preprocess.replace(channels=config.in_chans, mean=mean, std=std)
    return preprocess.replace(size=config.img_size)
