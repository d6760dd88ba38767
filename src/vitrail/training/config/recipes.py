"""Recipes: settings that belong together, by name or from a file.

The named ones are the TOML files in `named_recipes/`; their headers state the source and the differences from it. A
named recipe is complete: settings that it does not have are at their defaults. A user's file has some settings, and the
rest is chosen for the images; or it starts with `recipe = "deit"` and overrides some of that recipe's.

Importing this imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from vitrail.errors import ConfigError, did_you_mean
from vitrail.training.config.schema import SECTION_OF, Use, keys_for, read_config
from vitrail.utils.files import user_path

_FOLDER = files("vitrail.training.config") / "named_recipes"


@dataclass(frozen=True)
class Recipe:
    """Settings by config key.

    complete: nothing is chosen for the images in addition. keeps_batch_size: it is not reduced for few images.
    """

    name: str
    settings: Mapping[str, Any]
    complete: bool = True
    keeps_batch_size: bool = False

    @property
    def fixed(self) -> dict[str, Any]:
        """Settings that count as given: all but `flexible`, and the name of the recipe."""
        return {key: value for key, value in self.settings.items() if key not in self.flexible} | {"recipe": self.name}

    @property
    def flexible(self) -> dict[str, Any]:
        """Settings that are adapted to dataset and batch size: all of a complete recipe; of a file, the batch size and
        the learning rates stated with it.
        """
        if self.complete:
            return {k: v for k, v in self.settings.items() if SECTION_OF.get(k) not in ("data", "model")}
        has_rate = bool(self.settings.get("batch_size")) and "lr" in self.settings
        return {k: v for k, v in self.settings.items() if has_rate and k in ("batch_size", *keys_for(Use.RATE))}


def rates_for(batch_size: int, settings: Mapping[str, Any]) -> dict[str, float]:
    """The learning rates scaled to another batch size: by its square root for Adam (Malladi et al., 2022,
    https://arxiv.org/abs/2205.10287), in proportion for SGD (Goyal et al., 2017, https://arxiv.org/abs/1706.02677).
    """
    factor = (batch_size / settings["batch_size"]) ** (1 if settings.get("optimizer") == "sgd" else 0.5)
    rates = {key: rate for key in keys_for(Use.RATE) if (rate := settings.get(key)) is not None}
    return rates if factor == 1 else {key: float(f"{rate * factor:.3g}") for key, rate in rates.items()}


_OWN = {"sgd": {"lr": "0.1", "weight_decay": "5e-4"}, "lamb": {"lr": "5e-3"}}  # not to be taken from AdamW's recipes


def check_optimizer(given: Mapping[str, Any], recipe: Recipe | None) -> None:
    """Raise ConfigError if the optimizer needs settings that are neither given nor in a recipe for it."""
    ours = recipe.settings if recipe else {}
    name = given.get("optimizer") or ours.get("optimizer", "adamw")
    needed = {"lr": "1e-3"} if name == "adamw" != ours.get("optimizer", name) else _OWN.get(name, {})
    stated = {*given, *(ours if ours.get("optimizer") == name else ())}
    if missing := {key: value for key, value in needed.items() if key not in stated}:
        example = " ".join(f"{key}={value}" for key, value in missing.items())
        raise ConfigError(
            f"optimizer={name} needs {' and '.join(missing)}, as the recipe's are for another: for example {example}"
        )


@cache
def recipe_names() -> tuple[str, ...]:
    """The names of the recipes that come with vitrail."""
    names = (entry.name for entry in _FOLDER.iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


@cache
def named_recipe(name: str) -> Recipe:
    """The recipe of this name."""
    with as_file(_FOLDER / f"{name}.toml") as path:
        return Recipe(name, read_config(path).given)


def find_recipe(source: str | Path) -> Recipe:
    """A recipe by name, or from a TOML file by path.

    Raises:
        ConfigError: neither a name nor a file, or a file with an unknown key or a value out of its range.
    """
    name = str(source)
    if name in recipe_names():
        return named_recipe(name)
    path = user_path(source)
    if path.suffix.lower() != ".toml" and not path.is_file():
        raise ConfigError(_unknown(name))
    settings = read_config(path).given
    keep = "batch_size" in settings
    base = settings.get("recipe")
    if not base:
        return Recipe(name, settings, complete=False, keeps_batch_size=keep)
    if base not in recipe_names():
        raise ConfigError(f"{path}: {_unknown(base)}")
    return Recipe(name, {**named_recipe(base).settings, **settings}, keeps_batch_size=keep)


def _unknown(name: str) -> str:
    names = recipe_names()
    return f"unknown recipe {name!r}{did_you_mean(name, names)}: use a TOML file or one of {', '.join(names)}"
