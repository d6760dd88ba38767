"""Recipes: settings that belong together, by name or from a file.

The named ones are the TOML files in `named_recipes/`, whose first lines say where they come from and what differs
there. A named recipe is whole: what it does not name is off. A file of a person's own says some things, and the rest
is chosen for the images; or it begins with `recipe = "deit"`, and says what is different.

Importing this imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from vitrail.errors import VitrailError, did_you_mean
from vitrail.training.config.schema import SECTION_OF, Use, keys_for, read_config

_FOLDER = files("vitrail.training.config") / "named_recipes"


@dataclass(frozen=True)
class Recipe:
    """Settings by config key.

    whole: there is nothing to add to them; else the rest is chosen for the images. keeps_batch: its batch size was
    meant for these images, and is not made smaller where they are few.
    """

    name: str
    settings: Mapping[str, Any]
    whole: bool = True
    keeps_batch: bool = False

    @property
    def fixed(self) -> dict[str, Any]:
        """What counts as if a person had given it: all but what `flexible` has; and which recipe it is."""
        return {key: value for key, value in self.settings.items() if key not in self.flexible} | {"recipe": self.name}

    @property
    def flexible(self) -> dict[str, Any]:
        """What follows the images and the batch size: all settings of a whole recipe; of a file, batch size and rates
        that belong to it.
        """
        if self.whole:
            return {k: v for k, v in self.settings.items() if SECTION_OF.get(k) not in ("data", "model")}
        has_rate = bool(self.settings.get("batch_size")) and "lr" in self.settings
        return {k: v for k, v in self.settings.items() if has_rate and k in ("batch_size", *keys_for(Use.RATE))}


def rates_for(batch_size: int, settings: Mapping[str, Any]) -> dict[str, float]:
    """The learning rates of some settings for another batch size: Adam's go with its root (Malladi et al., 2022,
    https://arxiv.org/abs/2205.10287).
    """
    factor = (batch_size / settings["batch_size"]) ** 0.5
    rates = {key: rate for key in keys_for(Use.RATE) if (rate := settings.get(key)) is not None}
    return rates if factor == 1 else {key: float(f"{rate * factor:.3g}") for key, rate in rates.items()}


@cache
def recipe_names() -> tuple[str, ...]:
    """The names of the recipes that come with vitrail."""
    names = (entry.name for entry in _FOLDER.iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


@cache
def named_recipe(name: str) -> Recipe:
    """One of them."""
    with as_file(_FOLDER / f"{name}.toml") as path:
        return Recipe(name, read_config(path).given)


def find_recipe(word: str | Path) -> Recipe:
    """A recipe by name, or from a TOML file by path.

    Raises:
        VitrailError: neither a name nor a file, or a file with a key or value that there is not.
    """
    text = str(word)
    if text in recipe_names():
        return named_recipe(text)
    path = Path(word).expanduser()
    if path.suffix.lower() != ".toml" and not path.is_file():
        raise VitrailError(f"there is no recipe {text!r}{_nearest(text)}, or a TOML file's path")
    settings = read_config(path).given
    keeps = "batch_size" in settings
    if not settings.get("recipe"):
        return Recipe(text, settings, whole=False, keeps_batch=keeps)
    if settings["recipe"] not in recipe_names():
        raise VitrailError(f"{path}: there is no recipe {settings['recipe']!r}{_nearest(settings['recipe'])}")
    return Recipe(text, {**named_recipe(settings["recipe"]).settings, **settings}, keeps_batch=keeps)


def _nearest(word: str) -> str:
    return f"{did_you_mean(word, recipe_names())}: use {', '.join(recipe_names())}"
