"""Names that users of other libraries type."""

import re

import pytest

from vitrail.errors import ConfigError
from vitrail.training.config.aliases import ALIASES, UNSUPPORTED, by_key, key_of
from vitrail.training.config.recipes import recipe_names
from vitrail.training.config.schema import KEYS, make_config, parse_overrides


@pytest.mark.parametrize(
    ("name", "value", "key", "read"),
    [
        ("learning_rate", "1e-3", "lr", 1e-3),  # transformers
        ("lr0", "0.01", "lr", 0.01),  # ultralytics
        ("bs", "32", "batch_size", 32),  # fastai
        ("wd", "0.1", "weight_decay", 0.1),  # fastai
        ("dropout", "0.2", "drop", 0.2),  # ultralytics
        ("imgsz", "64", "img_size", (64, 64)),  # ultralytics
        ("smoothing", "0.1", "label_smoothing", 0.1),  # timm
        ("model_ema_decay", "0.99", "ema", 0.99),  # timm
        ("num-workers", "3", "workers", 3),
    ],
)
def test_another_librarys_name(name: str, value: str, key: str, read: object) -> None:
    assert make_config(parse_overrides([f"{name}={value}"])).flat[key] == read


def test_every_alias_names_a_setting() -> None:
    assert not ALIASES.keys() & set(KEYS)
    for name, key in ALIASES.items():
        assert key_of(name, KEYS) == key


@pytest.mark.parametrize("name", sorted(UNSUPPORTED.keys() - set(KEYS)))
def test_an_unsupported_name_says_so_and_names_settings_that_exist(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is not supported: ") as error:
        key_of(name, KEYS)
    text = str(error.value).partition(": ")[2]
    assert "did you mean" not in text
    assert set(re.findall(r"(\w+)=", text)) <= {*KEYS}
    assert set(re.findall(r"--recipe (\w+)", text)) <= set(recipe_names())
    for word in re.findall(r"\b\w+_\w+\b", text):  # names of settings in running text
        assert word in KEYS


def test_two_names_of_one_setting() -> None:
    with pytest.raises(ConfigError, match="lr is given twice: as learning_rate and as lr0"):
        by_key({"learning_rate": 1, "lr0": 2}, KEYS)
    with pytest.raises(ConfigError, match="batch_size is given twice"):
        parse_overrides(["bs=1", "batch_size=2"])


def test_a_typing_error_of_an_alias_leads_to_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"'lerning_rate' \(did you mean 'lr'\?\)"):
        key_of("lerning_rate", KEYS)


def test_no_stranger_is_offered() -> None:
    with pytest.raises(ConfigError) as error:
        key_of("zebra", KEYS)
    assert "did you mean" not in str(error.value)
