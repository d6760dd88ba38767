"""What is compared: models with their recipes, shares of the training images and seeds; and the order of the trainings.

Importing this imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vitrail.errors import ConfigError
from vitrail.models.catalog import VARIANTS, Variant, variant
from vitrail.models.configs import SwinConfig
from vitrail.models.timm_compat import window_mismatch
from vitrail.training.config.automatic import DatasetStats, choose
from vitrail.training.config.recipes import find_recipe
from vitrail.training.config.schema import make_config

if TYPE_CHECKING:
    from vitrail.data.dataset import Dataset

BUDGET = "10m"  # of one training
SHARES = (25, 50, 100)
SEEDS = 3

_LIKE_COST = 4.0  # a Swin is compared by default if it costs at most so many times more, or less, than the ViT
_MAX_SEEDS = 100
# What belongs to one model or one training, and cannot be set for all.
_NOT_FOR_ALL = ("data", "model", "recipe", "seed", "weights", "probe", "teacher")


@dataclass(frozen=True)
class Contender:
    """A model with its recipe. label: as it was named, NAME or NAME@RECIPE. key: its part of folder names."""

    label: str
    model: str
    recipe: str | None
    key: str


@dataclass(frozen=True)
class Arm:
    """One training: of a model, on a share (percent) of the training images, with a seed."""

    contender: Contender
    share: int
    seed: int

    @property
    def key(self) -> str:
        """The name of its run folder."""
        return f"{self.contender.key}-{self.share}pct-seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.contender.label}, {self.share} % of the images, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """settings: what all trainings have in common, by config key: budget, input size, ..."""

    contenders: tuple[Contender, ...]
    shares: tuple[int, ...]
    seeds: int
    settings: Mapping[str, Any]

    @property
    def arms(self) -> list[Arm]:
        """In the order of training: seed by seed, so that an hour in which the machine is slow affects all models.

        Which model comes first changes from one share or seed to the next.
        """
        found = []
        for seed in range(self.seeds):
            for number, share in enumerate(self.shares):
                turn = (seed + number) % len(self.contenders)
                order = (*self.contenders[turn:], *self.contenders[:turn])
                found += [Arm(contender, share, seed) for contender in order]
        return found

    @property
    def length(self) -> str:
        """The length of one training, in words."""
        budget, epochs = self.settings.get("budget"), self.settings.get("epochs")
        parts = ([f"{budget:g} s"] if budget else []) + ([f"{epochs:g} epochs"] if epochs is not None else [])
        return " or ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: equal for equal plans."""
        return {
            "models": [contender.label for contender in self.contenders],
            "shares": list(self.shares),
            "seeds": self.seeds,
            "settings": {
                key: list(value) if isinstance(value, tuple) else value for key, value in self.settings.items()
            },
        }


def make_plan(
    dataset: Dataset,
    models: Sequence[str] | None = None,
    *,
    seeds: int = SEEDS,
    shares: Sequence[int] = SHARES,
    settings: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan for these images. models: each NAME or NAME@RECIPE; None: see `default_models`.

    All models take images of the same size: that of the settings, else the one that `train` would choose; pretrained
    ones the size of their weights.

    Raises:
        ConfigError: fewer than two models, one named twice, or a setting that is unknown or not for all models.
        ModelError: a model that the catalog does not have.
    """
    settings = {key: value for key, value in (settings or {}).items() if value is not None}
    for key in _NOT_FOR_ALL:
        if key in settings:
            raise ConfigError(f"{key} cannot be set for all models that are compared: leave it out")
    if "epochs" not in settings and "budget" not in settings:
        settings["budget"] = BUDGET
    config = make_config(settings)
    stats = DatasetStats(
        len(dataset.split("train")), dataset.sizes.median, dataset.sizes.uniform, bool(config.model.pretrained)
    )
    automatic = choose(stats, {}).values
    # Stated, so that no training starts from weights that another does not have.
    given = {**config.given, "pretrained": bool(config.model.pretrained)}
    if not given.get("img_size") and automatic["img_size"] and not config.model.pretrained:
        given["img_size"] = automatic["img_size"]
    if not 1 <= seeds <= _MAX_SEEDS:
        raise ConfigError(f"seeds must be 1 to {_MAX_SEEDS}, not {seeds}")
    names = models or default_models(automatic["model"], given.get("img_size"), bool(config.model.pretrained))
    return Plan(_contenders(names), _shares(shares), seeds, given)


def default_models(vit: str, size: tuple[int, int] | None, pretrained: bool) -> list[str]:
    """The ViT that `train` would choose, a Swin if one fits the input size, and the ResNet of the most similar cost.

    The cost is the number of operations at this input size; None: at the size of each. pretrained: only models with
    published weights. A Swin fits if its feature maps are whole numbers of windows, at up to four times the ViT's cost.
    The ResNets are those made for the most similar size, small or large images.
    """
    rows = [row for row in VARIANTS.values() if row.weights or not pretrained]

    def distance(row: Variant) -> float:
        return abs(math.log(_cost(row, size) / _cost(VARIANTS[vit], size)))

    swins = [
        row
        for row in rows
        if isinstance(row.config, SwinConfig)
        and window_mismatch(row.config, size or row.config.img_size) is None
        and distance(row) <= math.log(_LIKE_COST)
    ]
    side = max(size or VARIANTS[vit].config.img_size)
    resnets = [row for row in rows if row.family == "resnet"]
    nearest = min((_octaves(row, side) for row in resnets), default=0.0)
    resnets = [row for row in resnets if _octaves(row, side) == nearest]
    return [vit, *(min(found, key=distance).name for found in (swins, resnets) if found)]


def _octaves(row: Variant, side: int) -> float:
    """How far the input size that a model was made for is from this one, in powers of two."""
    return abs(math.log2(max(row.config.img_size) / side))


def _cost(row: Variant, size: tuple[int, int] | None) -> float:
    """1e9 operations at an input size, to which they are proportional but for attention."""
    return row.gmacs * math.prod(size or row.config.img_size) / math.prod(row.config.img_size)


def _contenders(names: Sequence[str]) -> tuple[Contender, ...]:
    found: list[Contender] = []
    for number, label in enumerate(names, 1):
        name, _, recipe = label.partition("@")
        variant(name)
        if recipe:
            find_recipe(recipe)
        if label in [each.label for each in found]:
            raise ConfigError(f"{label} is named twice: name each model once, or with another recipe ({name}@RECIPE)")
        slug = re.sub(r"[^\w.-]+", "-", label).strip("-.")
        found.append(Contender(label, name, recipe or None, f"{number}-{slug}"))
    if len(found) < 2:
        raise ConfigError(f"a comparison needs at least two models, not {len(found)}")
    return tuple(found)


def _shares(shares: Sequence[int]) -> tuple[int, ...]:
    """Ascending; the verdict is about all images, so 100 is always among them."""
    if not all(1 <= share <= 100 for share in shares):
        raise ConfigError(f"shares are percentages from 1 to 100, not {', '.join(map(str, shares))}")
    return tuple(sorted({*shares, 100}))
