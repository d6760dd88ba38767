"""The config: every key is checked, stored, read, and does something."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tolerance import assert_near
from training import tiny
from vitrail.data.augment.settings import Augment
from vitrail.errors import ConfigError
from vitrail.training.config.schema import (
    FIELDS,
    KEYS,
    SECTIONS,
    Use,
    keys_for,
    make_config,
    parse_overrides,
    read_config,
    to_toml,
)
from vitrail.training.run import train
from vitrail.utils.settings import Settings


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


def test_words_are_read_by_type() -> None:
    words = parse_overrides(
        ["lr=1e-3", "img-size=32x48", "betas=0.9,0.95", "budget=1h30m", "ema-warmup=no", "drop_path=none", "workers=2"]
    )
    assert make_config(words).given == {
        "lr": 1e-3,
        "img_size": (32, 48),
        "betas": (0.9, 0.95),
        "budget": 5400.0,
        "ema_warmup": False,
        "drop_path": None,
        "workers": 2,
    }
    words = parse_overrides(["img_size=64", "crop_scale=0.3:1"])
    assert make_config(words).given == {"img_size": (64, 64), "crop_scale": (0.3, 1.0)}


@pytest.mark.parametrize(
    ("text", "expected"), [("90", 90.0), ("90s", 90.0), ("10m", 600.0), ("1.5h", 5400.0), ("2m30", 150.0)]
)
def test_durations(text: str, expected: float) -> None:
    assert make_config({"budget": text}).schedule.budget == expected


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("warmup_epoch=3", "did you mean 'warmup_epochs'"),
        ("lr=-1", "greater than 0"),
        ("lr=nan", "finite"),
        ("img_size=large", "integer"),
        ("budget=10x", "number"),
        ("amp=fp16", "'auto', 'bf16' or 'off'"),
        ("drop=1", "less than 1"),
        ("workers=-1", "greater than or equal to 0"),
        ("lr", "lr=1e-3"),
    ],
)
def test_bad_words_are_one_line(word: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_config(parse_overrides([word]))
    assert hint in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", [["lr=1", "lr=2"], ["lr=1", "lr=1"], ["img-size=8", "img_size=8"]])
def test_a_key_that_is_given_twice(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="is given twice"):
        parse_overrides(words)


@pytest.mark.parametrize(
    "word",
    [
        "threads=99999999999", "img_size=100000", "rand_augment_ops=100000", "seed=99999999999999999999",
        "epochs=1e300", "batch_size=9999999999", f"seed={'9' * 5000}", f"lr={'9' * 400}", f"{'x' * 5000}=1",
        f"cache={'9' * 400}GB", f"model={'x' * 5000}\x1b[2J=", "workers=99999999999", "track=\x1b[2J",
    ],
)  # fmt: skip
def test_a_value_out_of_every_bound_is_one_line(word: str) -> None:
    if word.startswith("model"):
        assert make_config(parse_overrides([word])).model.model
        return
    with pytest.raises(ConfigError) as error:
        make_config(parse_overrides([word]))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "text",
    ["a = " + "[" * 20_000, f"seed = {'9' * 5000}", "a." * 100_000 + "a = 1", "\0", "[" * 30_000, "a = {" * 5000],
)
def test_a_file_that_is_no_config_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_config(tmp_path / "c.toml")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


def test_toml_and_back(tmp_path: Path) -> None:
    config = make_config({"data": 'a "folder"\\\x7f ü', "model": "m", "budget": "2m", "betas": [0.8, 0.9], "lr": 1e-7})
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert read_config(file) == config
    assert set(read_config(file).given) == set(KEYS)


@pytest.mark.parametrize("text", ["lr = ", "lrr = 1", "lr = 'much'", "[part]\nlr = 1", "[data]\nlr = 1"])
def test_bad_toml(tmp_path: Path, text: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"recipe\.toml"):
        read_config(file)
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        read_config(tmp_path / "missing.toml")


def test_flat_toml_is_read_too(tmp_path: Path) -> None:
    """As versions before sections wrote it; `data` and `model` are a key there and a section here."""
    flat, sections = tmp_path / "flat.toml", tmp_path / "sections.toml"
    flat.write_text('data = "digits"\nmodel = "vit_nano_patch2_8"\nlr = 2e-3\nseed = 3\nzoom = [0.9, 1.1]\n')
    sections.write_text(
        'seed = 3\n[data]\ndata = "digits"\n[model]\nmodel = "vit_nano_patch2_8"\n'
        "[optimizer]\nlr = 2e-3\n[augment]\nzoom = [0.9, 1.1]\n"
    )
    assert read_config(flat) == read_config(sections)
    assert read_config(flat).given == read_config(sections).given


def test_a_key_in_another_section_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("[schedule]\nlr = 1e-3\n")
    with pytest.raises(ConfigError, match=r"recipe\.toml: lr .*\[optimizer\]"):
        read_config(file)
    file.write_text("[optimiser]\nlr = 1e-3\n")
    with pytest.raises(ConfigError, match=r"\[optimiser\].*did you mean 'optimizer'"):
        read_config(file)


def test_a_config_knows_what_was_given() -> None:
    config = make_config({"lr": 1e-3, "flip": 0.5})
    assert config.given == {"lr": 1e-3, "flip": 0.5}, "the default of lr, but given"
    other = config.updated({"seed": 3, "betas": (0.8, 0.9)})
    assert other.given == {**config.given, "seed": 3, "betas": (0.8, 0.9)}
    assert (config.seed, config.optimizer.betas) == (0, (0.9, 0.999))
    assert config.updated(config.flat).given == config.flat


def test_keys_are_unique_and_described() -> None:
    assert len(KEYS) == sum(len(section.model_fields) for section in SECTIONS.values()) + 2
    assert not [key for key, field in FIELDS.items() if not field.description]


def test_uses_of_keys() -> None:
    """What the hand-kept lists of earlier versions named."""
    assert set(keys_for(Use.RATE)) == {"lr", "backbone_lr", "head_lr", "min_lr"}
    assert set(keys_for(Use.HELD_OUT)) == {"val_fraction", "test_fraction", "split_seed", "group_duplicates"}
    assert set(keys_for(Use.BUILD)) == {"drop", "drop_path", "attn_drop"}
    assert set(Augment.model_fields) < set(keys_for(Use.VIEWS))
    assert not set(keys_for(Use.RESUME)) & set(keys_for(Use.VIEWS)), "views never change in a run"


def test_every_key_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read = set()

    def note(self: Settings, name: str) -> Any:
        if sys._getframe(1).f_code.co_name not in ("_group", "flat", "<dictcomp>", "active"):
            read.add(name)
        return object.__getattribute__(self, name)

    monkeypatch.setattr(Settings, "__getattribute__", note, raising=False)
    train(tiny.dataset(), out=tmp_path / "run", progress=False, **{**tiny.PLAIN, "ema": 0.5, "epochs": 1.2})
    by_use = {*keys_for(Use.BUILD), *keys_for(Use.HELD_OUT)}
    only_with_another = {key for key in _CHANGES_OF_CHANGES if key in Augment.model_fields} - {"crop_ratio"}
    assert set(KEYS) - read - by_use - only_with_another == set()


def test_data_keys_reach_the_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    from vitrail.training import setup as prepare

    seen: dict[str, Any] = {}

    def opened(data: str, **options: Any) -> Any:
        seen.update(options, data=data)
        return tiny.dataset()

    monkeypatch.setattr(prepare, "open_dataset", opened)
    asked = {"data_dir": "/there", "val_fraction": 0.2, "test_fraction": 0.3, "split_seed": 5}
    asked |= {"group_duplicates": True}
    prepare.prepare("digits", make_config({**tiny.PLAIN, **asked}))
    assert seen == {**asked, "data": "digits"}


BASE: dict[str, torch.Tensor] = {}

_CHANGES = {
    "optimizer": "muon",
    "img_size": 12,
    "in_chans": 3,
    "merge": 4,
    "epochs": 0.6,
    "batch_size": 12,
    "lr": 2e-2,
    "backbone_lr": 1e-3,
    "head_lr": 1e-3,
    "layer_decay": 0.5,
    "min_lr": 5e-3,
    "warmup_epochs": 0.5,
    "weight_decay": 0.5,
    "betas": (0.5, 0.9),
    "clip_grad": 0.1,
    "loss": "bce",
    "label_smoothing": 0.2,
    "balance": "sample",
    "drop": 0.3,
    "drop_path": 0.5,
    "attn_drop": 0.3,
    "crop_scale": (0.3, 0.6),
    "flip": 0.5,
    "vflip": 0.5,
    "pad_shift": 1,
    "rotate": 30.0,
    "shear": 10.0,
    "zoom": (0.7, 1.3),
    "shift": 0.2,
    "rand_augment": 9.0,
    "repeats": 3,
    "brightness": 0.3,
    "contrast": 0.3,
    "erase": 0.9,
    "mixup": 0.5,
    "cutmix": 0.5,
    "ema": 0.9,
    "amp": "bf16",
    "seed": 3,
}

# Keys that only change what another one does.
_CHANGES_OF_CHANGES = {
    "momentum": ({"optimizer": "muon"}, 0.5),
    "crop_ratio": ({"crop_scale": (0.3, 0.6)}, (2.0, 3.0)),
    "bce_threshold": ({"loss": "bce", "mixup": 0.8}, 0.3),
    "edge": ({"pad_shift": 2}, "reflect"),
    "rand_augment_ops": ({"rand_augment": 5.0}, 3),
    "rand_augment_std": ({"rand_augment": 5.0}, 2.0),
    "erase_area": ({"erase": 1.0}, (0.5, 0.9)),
    "erase_ratio": ({"erase": 1.0}, (3.0, 5.0)),
    "erase_fill": ({"erase": 1.0}, "mean"),
    "mix_prob": ({"mixup": 0.5}, 0.3),
    "switch": ({"mixup": 0.5, "cutmix": 0.5}, 1.0),
    "ema_warmup": ({"ema": 0.9}, False),
}


@pytest.mark.parametrize("key", sorted(_CHANGES))
def test_a_key_changes_the_weights(key: str) -> None:
    BASE.update({} if BASE else tiny.trained())
    assert not tiny.same(tiny.trained(**{key: _CHANGES[key]}), BASE)


@pytest.mark.parametrize("key", sorted(_CHANGES_OF_CHANGES))
def test_a_key_changes_what_another_does(key: str) -> None:
    others, value = _CHANGES_OF_CHANGES[key]
    assert not tiny.same(tiny.trained(**others, **{key: value}), tiny.trained(**others))


@pytest.mark.parametrize("key", ["grad_checkpointing", "accumulate"])
def test_memory_is_saved_without_changing_the_result(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to rounding: the same gradients. (Without batch norm, which sees its part of the batch alone.)

    Gradients and not weights: the first updates of AdamW are g / |g|, which enlarges the rounding of a small gradient.
    """
    from dataclasses import replace

    plain = replace(tiny.VARIANT, config=replace(tiny.CONFIG, stem="patch"))
    monkeypatch.setitem(tiny.VARIANTS, tiny.VARIANT.name, plain)
    gradients = []
    for keys in ({}, {key: 3 if key == "accumulate" else True}):
        one = tiny.session(**keys)
        batch = next(one.loader.epoch(0))
        one.trainer._accumulate_gradients(one.trainer.view(batch, 0))
        gradients.append({name: p.grad for name, p in one.trainer.model.named_parameters()})
    base, changed = gradients
    for name in base:
        assert_near(changed[name], base[name], name=name)


def test_every_key_that_decides_the_training_is_changed_above() -> None:
    """A new key of augmentation or regularisation that nothing reads is found by the tests above, if it is there."""
    sections = ("optimizer", "schedule", "augment", "regularize")
    keys = {key for name in sections for key in SECTIONS[name].model_fields}
    elsewhere = {
        "saturation",
        "balance",
        "budget",
        "eval_every",
        "patience",
    }  # of colour images; of uneven classes; of time; of validations (test_callbacks.py)
    assert keys - _CHANGES.keys() - _CHANGES_OF_CHANGES.keys() - elsewhere == set()
