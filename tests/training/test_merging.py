"""Training with merged tokens: what is trained, kept, resumed and refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

import vitrail
from tolerance import assert_near
from training import tiny
from training.runs import assert_same, outcome, run
from training.test_resume import Killed, kill_at
from vitrail.errors import ConfigError, ModelError
from vitrail.models.build import build_model, configure
from vitrail.training.config.schema import make_config, read_config
from vitrail.training.engine.trainer import Trainer
from vitrail.training.run import train


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


@pytest.mark.parametrize(
    ("given", "value"),
    [("8", 8), ("0.3", 0.3), ("8,4,0", (8, 4, 0)), ("none", None), (0, 0), ([3, 0], (3, 0)), (None, None)],
)
def test_merge_is_a_number_a_share_or_one_number_per_block(given: Any, value: Any) -> None:
    assert make_config({"merge": given}).model.merge == value


@pytest.mark.parametrize("given", ["-1", "1.5", "1.5,2", "many", "3,-1"])
def test_other_values_are_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="merge"):
        make_config({"merge": given})


def test_a_model_is_trained_kept_and_evaluated_with_merging(tmp_path: Path) -> None:
    clf = run(tmp_path / "run", merge=4, epochs=1)
    assert clf.model.config.merge == (4, 0)
    again = vitrail.load(tmp_path / "run")
    assert again.model.config.merge == (4, 0)
    assert again.evaluate(tiny.dataset(), "test").top1 == clf.report["top1"]
    assert read_config(tmp_path / "run" / "config.toml").model.merge == 4


def test_a_model_learns_with_merged_tokens() -> None:
    first, *_, last = tiny.learn(tiny.session(merge=0.5, epochs=30), 30)
    assert last < 0.6 * first


def test_a_killed_run_with_merging_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole", merge=5)
    with monkeypatch.context() as patch:
        kill_at(patch, Trainer, "step", 6)
        with pytest.raises(Killed):
            run(tmp_path / "killed", merge=5)
    train(resume=tmp_path / "killed", data=tiny.dataset(), progress=False)
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "killed"))


@pytest.mark.parametrize("key", ["grad_checkpointing", "compile"])
@pytest.mark.slow
def test_the_same_gradients_compiled_or_with_checkpointing(key: str) -> None:
    gradients = []
    for keys in ({}, {key: True}):
        one = tiny.session(merge=4, amp="off", **keys)
        one.trainer._accumulate_gradients(one.trainer.view(next(one.loader.epoch(0)), 0))
        gradients.append({name: p.grad for name, p in one.trainer.model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_near(gradients[1][name], gradient, name=name)


def test_weights_keep_their_merging_unless_another_is_given(tmp_path: Path) -> None:
    run(tmp_path / "first", merge=4, epochs=1)
    for given, expected in (({}, (4, 0)), ({"merge": 2}, (2, 0)), ({"merge": 0}, ())):
        keys = {**tiny.PLAIN, "weights": str(tmp_path / "first"), **given}
        model = tiny.prepare(tiny.dataset(), make_config(keys)).model
        assert model.config.merge == expected


def test_merging_is_refused_where_it_has_no_effect() -> None:
    model = build_model(tiny.CONFIG)
    with pytest.raises(ConfigError, match="merge applies to models made by name"):
        train(tiny.dataset(), model=model, merge=4, progress=False)
    with pytest.raises(ModelError, match="no option 'merge'"):
        tiny.session(model="resnet20_32", img_size=32, merge=4)
    with pytest.raises(ModelError, match="merge=9 in block 0"):
        tiny.session(merge=9)


def test_a_model_object_brings_its_own_merging(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(configure(tiny.CONFIG, merge=4))
    keys = {key: value for key, value in tiny.PLAIN.items() if key not in ("model", "drop_path")}
    assert train(tiny.dataset(), model=model, out=tmp_path / "run", progress=False, **keys).model.config.merge == (4, 0)
