"""Settings, names and tables of any content: one line, or a config that is the same when it is read back, or a run."""

import json
import string
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training import tiny
from vitrail.errors import ConfigError, VitrailError
from vitrail.pretrained.foreign_configs import read_config
from vitrail.training.config.schema import KEYS, make_config, parse_overrides, parse_toml, to_toml
from vitrail.training.config.stamp import read_run_toml, to_run_toml
from vitrail.training.monitoring.progress import Reporter
from vitrail.training.run import _run_to_end
from vitrail.weights.formats.detect import convert_names
from vitrail.weights.read import read_json, read_shards
from vitrail.weights.unwrap import unwrap

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
WORDS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["none", "auto", "off", "true", "0", "-1", "1e-3", "nan", "inf", "-0.0", "1e999", "10m", "4GB"]),
    st.from_regex(r"[0-9]{1,30}(\.[0-9]{1,9})?([eE][-+]?[0-9]{1,4})?[a-zA-Z%]{0,2}", fullmatch=True),
    st.integers().map(str),
    st.floats().map(str),
)
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20))
VALUES = st.one_of(WORDS, PLAIN, st.lists(PLAIN, max_size=3), st.integers(10**20, 10**400))
NAMES = st.one_of(st.sampled_from(KEYS), st.text(max_size=30), st.text("._-\x1b\n\u202e", max_size=5000))


def assert_line(error: VitrailError) -> None:
    text = str(error)
    assert not {unicodedata.category(c) for c in text} & {"Cc", "Cs", "Zl", "Zp"}, ascii(text)
    assert not set(text) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"), ascii(text)
    assert len(text) < 1500


@pytest.mark.slow
@settings(max_examples=600, deadline=None, suppress_health_check=QUIET, derandomize=True)
@given(st.dictionaries(st.one_of(st.sampled_from(KEYS), NAMES), VALUES, max_size=3))
def test_any_setting(values: dict[str, Any]) -> None:
    try:
        config = make_config(values)
    except ConfigError as error:
        return assert_line(error)
    again = parse_toml(to_toml(config), "x")
    assert to_toml(again) == to_toml(config)
    return None


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=QUIET, derandomize=True)
@given(st.lists(st.one_of(st.text(max_size=60), st.tuples(NAMES, WORDS).map("=".join)), max_size=4))
def test_any_arguments(arguments: list[str]) -> None:
    try:
        values = parse_overrides(arguments)
        make_config(values)
    except ConfigError as error:
        return assert_line(error)
    return None


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=QUIET, derandomize=True)
@given(st.data())
def test_any_text_of_a_config(data: st.DataObject) -> None:
    whole = to_toml(make_config({"data": "x", "model": "y"}))
    start = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.integers(0, 40))
    text = whole[:start] + data.draw(st.text(string.printable + "é\x00\x7f", max_size=30)) + whole[start + length :]
    try:
        parse_toml(text, "x")
    except ConfigError as error:
        assert_line(error)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=QUIET, derandomize=True)
@given(st.integers(0, 10**9), st.integers(0, 255))
def test_any_byte_of_a_runs_config(tmp_path: Path, place: int, byte: int) -> None:
    """Another value of a setting is noticed; a comment may change."""
    config = make_config({"data": "x", "model": "y", "lr": 0.01, "seed": 7})
    content = bytearray(to_run_toml(config, KEYS).encode())
    content[place % len(content)] = byte
    (tmp_path / "config.toml").write_bytes(bytes(content))
    try:
        found = read_run_toml(tmp_path / "config.toml")
    except ConfigError as error:
        return assert_line(error)
    assert to_toml(found) == to_toml(config)
    return None


TREES = st.recursive(
    PLAIN,
    lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(st.text(max_size=9), x, max_size=3)),
    max_leaves=8,
)
MODEL_KEYS = st.sampled_from(
    ["architecture", "model_type", "num_classes", "label_names", "model_args", "pretrained_cfg", "id2label", "size",
     "image_size", "patch_size", "hidden_size", "num_hidden_layers", "hidden_act", "vitrail", "input_size", "mean"]
)  # fmt: skip
KINDS = st.sampled_from(["vit", "deit", "dinov2", "dinov2_with_registers", "swin", "vit_base_patch16_224", "resnet18"])


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=QUIET, derandomize=True)
@given(
    st.dictionaries(MODEL_KEYS, st.one_of(TREES, KINDS), max_size=5),
    st.none() | st.dictionaries(MODEL_KEYS, TREES, max_size=3),
)
def test_any_table_of_a_model(config: dict[str, Any], processor: dict[str, Any] | None) -> None:
    try:
        read_config(config, processor, "config.json")
    except VitrailError as error:
        assert_line(error)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=QUIET, derandomize=True)
@given(st.dictionaries(st.text(max_size=20), st.one_of(st.text(max_size=20), PLAIN), max_size=4))
def test_any_index_of_shards(tmp_path: Path, table: dict[str, Any]) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": table}))
    try:
        assert read_json(tmp_path / "index.json")
        read_shards(tmp_path / "index.json")
    except VitrailError as error:
        assert_line(error)


TENSOR_NAMES = st.one_of(
    st.text(max_size=30),
    st.lists(
        st.sampled_from(["module", "model", "blocks", "0", "attn", "qkv", "weight", "head", "layers", "q"]), max_size=6
    ).map(".".join),
)


@pytest.mark.slow
@settings(max_examples=250, deadline=None, suppress_health_check=QUIET, derandomize=True)
@given(st.dictionaries(TENSOR_NAMES, st.lists(st.integers(0, 3), max_size=4), max_size=6))
def test_any_names_of_tensors(shapes: dict[str, list[int]]) -> None:
    try:
        convert_names(unwrap({name: torch.zeros(shape) for name, shape in shapes.items()}))
    except VitrailError as error:
        assert_line(error)


# What a small run can be asked for; out of range now and then.
RUN = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.floats(1e-9, 10),
        "weight_decay": st.floats(0, 1e3),
        "batch_size": st.integers(2, 60),
        "label_smoothing": st.floats(0, 1),
        "mixup": st.floats(0, 1e3),
        "cutmix": st.floats(0, 1e-3),
        "erase": st.floats(0, 1),
        "erase_area": st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)),
        "rotate": st.floats(0, 181),
        "shear": st.floats(0, 90),
        "zoom": st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)),
        "crop_scale": st.tuples(st.floats(0, 1), st.floats(0, 1)),
        "crop_ratio": st.tuples(st.floats(0.001, 1000), st.floats(0.001, 1000)),
        "rand_augment": st.floats(0, 10),
        "rand_augment_ops": st.integers(0, 40),
        "repeats": st.integers(1, 100),
        "pad_shift": st.integers(0, 100),
        "ema": st.floats(0, 1),
        "drop": st.floats(0, 1),
        "drop_path": st.floats(0, 1),
        "clip_grad": st.floats(1e-9, 1e9),
        "layer_decay": st.floats(0.001, 1),
        "warmup_epochs": st.floats(0, 2),
        "loss": st.sampled_from(["ce", "bce"]),
        "balance": st.sampled_from(["none", "sample", "loss"]),
        "accumulate": st.integers(1, 70),
        "img_size": st.sampled_from([1, 2, 7, 8, 12, "8x16", 10**9]),
    },
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=QUIET, derandomize=True)
@given(RUN)
def test_a_line_or_a_run(values: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        tiny.add_variant(patch)
        try:
            one = tiny.session(**values)
            _run_to_end(lambda: one.trainer.step(next(one.loader.epoch(0))), Reporter(False), lambda: "memory")
        except VitrailError as error:
            return assert_line(error)
        assert one.trainer.state.steps == 1
    return None
