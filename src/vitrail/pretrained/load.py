"""Build the model that a source describes and load its weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail.errors import ModelError
from vitrail.images.preprocess import Preprocess
from vitrail.models.base import ImageModel
from vitrail.models.build import build_model, configure
from vitrail.models.catalog import variant
from vitrail.models.configs import ModelConfig, differences
from vitrail.models.timm_compat import RATES
from vitrail.pretrained.resolve import Loaded, load_source
from vitrail.weights.report import Report

# Fields in which a file may differ from the catalog's variant of the same name.
_MAY_DIFFER = {
    *("img_size", "in_chans", "num_classes", "norm_eps", "init_values", "ls_init_value", "dist_head", "merge"),
    *RATES,
}


@dataclass(frozen=True)
class Pretrained:
    """A model and the report on its weights.

    `name` is the catalog's; None if unknown. `preprocess` is that of the weights, at the model's size and channels.
    `class_names` are those of the loaded head; None for a new head or unknown names.
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
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    **options: Any,
) -> Pretrained:
    """Build the model that `source` describes, and load its weights strictly.

    Args:
        source: see `vitrail.pretrained.resolve`.
        name: the model's name in the catalog; optional if the source has a config.
        num_classes: classes of the head; None keeps the file's head.
        class_names: of the model; the file's head is kept, or its rows permuted, if it has the same names.
        img_size, in_chans, options: changes of the config; tensors are resampled to them.

    Raises:
        WeightsError: no such source, or tensors that do not match the model.
        ModelError: the architecture is unknown, differs from `name`, or cannot be built.
    """
    loaded = load_source(source, name)
    known = loaded.architecture
    config = _check_config(known.config, name, str(source))
    if name is None and known.name and _difference(config, known.name) is None:
        name = known.name
    # The head in the file determines the number of classes: configs of other libraries often lack it.
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
    report = loaded.fit(model, num_classes=num_classes, class_names=class_names)
    preprocess = known.preprocess or (variant(name).preprocess if name else None)
    if preprocess is not None:
        preprocess = preprocess.with_channels(config.in_chans).replace(size=config.img_size)
        model.preprocess = preprocess
    names = known.class_names if num_classes is None else None
    return Pretrained(model, loaded, report, name, preprocess, names)


def _check_config(found: ModelConfig | None, name: str | None, source: str) -> ModelConfig:
    """The config of the file, checked to be that of the variant `name`; the variant's if the file has none."""
    if name is None:
        if found is None:
            raise ModelError(
                f"{source} does not specify the architecture of its weights: `vitrail train` takes it by --model, "
                "other commands take NAME --weights FILE, and vitrail.load model=NAME"
            )
        return found
    row = variant(name).config
    if found is None:
        return row
    if type(found) is not type(row):
        raise ModelError(f"{source} contains a {type(found).__name__.removesuffix('Config')}, not {name}")
    if field := _difference(found, name):
        raise ModelError(f"{source} is not {name}: its {field} is {getattr(found, field)}, not {getattr(row, field)}")
    return found


def _difference(config: ModelConfig, name: str) -> str | None:
    """A field in which `config` is another architecture than the variant `name`; None if there is none."""
    return min(differences(config, variant(name).config) - _MAY_DIFFER, default=None)
