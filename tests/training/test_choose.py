"""What is chosen when nothing is said: it exists, it fits, and it says why."""

from pathlib import Path
from typing import Any

import pytest
import torch

from vitrail.models.catalog import VARIANTS
from vitrail.models.create import create_model
from vitrail.training.choose import MODELS, RECIPES, Facts, choose
from vitrail.training.config import check_options, read_toml
from vitrail.training.prepare import prepare


def facts(images: int = 1000, size: tuple[int, int] = (8, 8), uniform: bool = True, pretrained: bool = False) -> Facts:
    return Facts(images, size, uniform, pretrained)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda row: row.name)
def test_settings_are_valid(recipe: Any) -> None:
    check_options(recipe.settings)


def test_every_case_has_a_row() -> None:
    for table in (MODELS, RECIPES):
        for pretrained in (False, True):
            rows = [row.up_to for row in table if row.pretrained == pretrained]
            assert rows == sorted(rows)
            assert rows[-1] == float("inf")


@pytest.mark.parametrize(
    ("size", "uniform", "expected"),
    [((8, 8), True, (8, 8)), ((9, 7), True, (10, 8)), ((28, 28), True, (32, 32)), ((32, 30), True, (32, 32))],
)
def test_small_images_keep_their_size(size: tuple[int, int], uniform: bool, expected: tuple[int, int]) -> None:
    assert choose(facts(size=size, uniform=uniform), {}).values["img_size"] == expected


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.model)
def test_models_exist_and_take_their_size(row: Any) -> None:
    side = int(min(row.up_to, 500))
    assert row.model in VARIANTS
    if row.pretrained:  # in its own size, which is large
        return
    model = create_model(row.model, num_classes=2, in_chans=3, img_size=row.img_size((side, side), True))
    assert model.eval()(torch.zeros(1, 3, *model.config.img_size)).shape == (1, 2)


def test_photographs_from_scratch_are_made_small_and_with_weights_are_not() -> None:
    scratch = choose(facts(size=(480, 640), uniform=False), {})
    assert scratch.values["img_size"] == (64, 64)
    assert "--pretrained" in scratch.reasons[0]
    tuned = choose(facts(size=(480, 640), uniform=False, pretrained=True), {})
    assert tuned.values["img_size"] is None
    assert tuned.values["lr"] < scratch.values["lr"]


def test_what_is_given_is_left_alone_and_the_rest_fits_to_it() -> None:
    free = choose(facts(), {})
    given = choose(facts(), {"model": "resnet18", "batch_size": 4 * free.values["batch_size"], "epochs": 3})
    assert not {"model", "batch_size", "epochs"} & given.values.keys()
    assert given.values["lr"] == pytest.approx(2 * free.values["lr"], rel=1e-2)
    assert given.values["warmup_epochs"] == pytest.approx(0.3)
    assert len(given.reasons) == 1


def test_few_images_get_more_epochs_and_smaller_batches() -> None:
    few, many = choose(facts(images=40), {}).values, choose(facts(images=100_000), {}).values
    assert few["epochs"] > many["epochs"]
    assert few["batch_size"] < many["batch_size"]
    for count in range(1, 30):
        assert 1 <= choose(facts(images=count), {}).values["batch_size"] <= count


def test_a_budget_sets_no_epochs() -> None:
    assert "epochs" not in choose(facts(), {"budget": 60.0}).values


def test_every_decision_is_one_line() -> None:
    reasons = choose(facts(), {}).reasons
    assert len(reasons) == 2
    assert not [line for line in reasons if "\n" in line]


def test_the_recipe_of_the_digits_is_what_is_chosen_for_them() -> None:
    """So that its published figure is what `vitrail train digits` gives."""
    recipe = read_toml(Path(__file__).parents[2] / "recipes/digits.toml")
    chosen = prepare("digits", {}).config
    assert {key: getattr(chosen, key) for key in recipe} == recipe
