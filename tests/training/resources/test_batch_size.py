"""The batch that suits the machine: the search on made-up machines, and a run on this one."""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from training import tiny
from training.runs import KEYS, assert_same, outcome
from vitrail.errors import ConfigError, DeviceError
from vitrail.training.config.schema import make_config, parse_overrides, read_config
from vitrail.training.engine.trainer import Trainer
from vitrail.training.resources import batch_size as fit
from vitrail.training.resources import trial
from vitrail.training.resources.batch_size import (
    Rates,
    candidate_sizes,
    fastest,
    fit_batch_size,
    largest,
    memory_advice,
)
from vitrail.training.run import train
from vitrail.training.setup import prepare


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


def test_the_sizes_that_are_tried() -> None:
    assert candidate_sizes(8, 100) == [8, 12, 16, 24, 32, 48, 64, 96]
    assert candidate_sizes(8, 8) == [8]
    assert candidate_sizes(5, 5) == [5]


@pytest.mark.parametrize("capacity", [1, 8, 11, 12, 31, 95, 96, 1000])
def test_the_largest_that_fits_is_found_in_few_tries(capacity: int) -> None:
    tried = []

    def holds(size: int) -> bool:
        tried.append(size)
        return size <= capacity

    sizes = candidate_sizes(8, 100)
    assert largest(sizes, holds) == max([8, *(size for size in sizes if size <= capacity)])
    assert len(tried) <= 3


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (lambda size: 100.0, 32),  # all the same: the recipe's
        (lambda size: min(size, 128), 128),  # faster up to 128
        (lambda size: float(size), 256),  # ever faster: eight times the recipe's at most
        (lambda size: 1 / size, 4),  # ever slower: an eighth at least
        (lambda size: 1 - abs(math.log2(size / 16)) / 10, 16),
        (lambda size: 1.04 ** math.log2(size), 32),  # a gain too small to leave the recipe's for
    ],
)
def test_the_fastest_is_found_from_the_recipes_own(rate: Any, expected: int) -> None:
    assert fastest(32, 256, rate, lambda size: True) == expected


def test_memory_and_the_number_of_images_bound_the_search() -> None:
    assert fastest(32, 64, float, lambda size: True) == 64
    assert fastest(32, 256, float, lambda size: size < 100) == 64
    assert fastest(32, 256, float, lambda size: size < 20) == 16, "also the recipe's own may be too large"


def test_no_size_is_measured_twice_or_when_the_time_is_up() -> None:
    calls: list[int] = []
    rates = Rates(lambda size: calls.append(size) or float(size))
    assert (rates(8), rates(8), rates(16)) == (8.0, 8.0, 16.0)
    assert calls == [8, 16]
    late = Rates(lambda size: float(size), seconds=0.0)
    assert (late(8), late(16)) == (8.0, 0.0), "the first is always measured"


def test_the_fastest_of_some_steps_counts_and_the_first_never(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that steps move on: 9 s, then 0.4, 0.2, 0.3; and where they are slow, until five seconds are over."""
    now, durations = [0.0], iter([9.0, 0.4, 0.2, 0.3])
    session = tiny.session()
    monkeypatch.setattr(trial, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def step(batch: Any) -> None:
        now[0] += next(durations)

    monkeypatch.setattr(session.trainer, "step", step)
    assert fit._images_per_second(session.trainer, session.setup.preprocess, 10) == pytest.approx(10 / 0.2)
    durations = iter([9.0, 4.0, 3.0])
    assert fit._images_per_second(session.trainer, session.setup.preprocess, 10) == pytest.approx(10 / 3)
    assert next(durations, None) is None


def test_a_fitted_run_is_the_run_with_that_batch_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so it resumes without being fitted again."""
    monkeypatch.setattr(fit, "_images_per_second", lambda trainer, preprocess, size: min(size, 16.0))
    keys = {key: value for key, value in KEYS.items() if key not in ("batch_size", "lr")}
    train(tiny.dataset(), out=tmp_path / "auto", progress=False, batch_size="auto", **keys)
    config = read_config(tmp_path / "auto" / "config.toml")
    usual = prepare(tiny.dataset(), make_config(keys)).config
    assert usual.schedule.batch_size == 8, "of fifty images"
    assert config.schedule.batch_size == 8, "an epoch has eight steps or nearly"
    monkeypatch.setattr(fit, "limit_batch_size", lambda usual, images: 32)
    train(tiny.dataset(), out=tmp_path / "larger", progress=False, batch_size="auto", **keys)
    config = read_config(tmp_path / "larger" / "config.toml")
    assert config.schedule.batch_size == 16
    assert config.optimizer.lr == pytest.approx(usual.optimizer.lr * 2**0.5, rel=1e-2)
    train(tiny.dataset(), out=tmp_path / "named", progress=False, batch_size=16, **keys)
    assert read_config(tmp_path / "named" / "config.toml") == config
    assert_same(outcome(tmp_path / "larger"), outcome(tmp_path / "named"))


def test_a_rate_that_was_named_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "_images_per_second", lambda trainer, preprocess, size: float(size))
    monkeypatch.setattr(fit, "limit_batch_size", lambda usual, images: 32)
    keys = {**KEYS, "batch_size": "auto", "epochs": 0}
    train(tiny.dataset(), out=tmp_path / "run", progress=False, **keys)
    config = read_config(tmp_path / "run" / "config.toml")
    assert (config.schedule.batch_size, config.optimizer.lr) == (32, KEYS["lr"])


def test_on_a_device_of_its_own_the_largest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up device: a step needs a gigabyte for eight images, and there are ten."""
    session = tiny.session(batch_size=16)
    session.trainer.device = torch.device("cuda")
    monkeypatch.setattr(fit, "limit_batch_size", lambda usual, images: usual)
    monkeypatch.setattr(fit, "available_memory", lambda device: 10 * 2**30)
    needed: list[int] = []

    def fits(trainer: Trainer, batch: Any) -> bool:
        needed.append(len(batch) * 2**27)
        return needed[-1] <= 10 * 2**30

    for name, stand_in in {
        "fits_in_memory": fits,
        "reset_peak_memory": lambda device: None,
        "peak_memory": lambda device: needed[-1],
        "preserve_state": lambda trainer: __import__("contextlib").nullcontext(),
    }.items():
        monkeypatch.setattr(fit, name, stand_in)
    size, reason = fit_batch_size(session.trainer, session.setup.preprocess, len(session.loader.split))
    assert size == 64, "72 images would take nine tenths, 96 all of it and more"
    assert "10.7 GB" in reason


def no_memory_above(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of more images at once finds no memory."""
    original = Trainer.step

    def step(self: Trainer, batch: Any, *others: Any) -> None:
        if len(batch) / self.config.machine.accumulate > images:
            torch.empty(2**60)
        original(self, batch, *others)

    monkeypatch.setattr(Trainer, "step", step)


def test_a_batch_that_does_not_fit_is_told_in_parts_that_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_memory_above(3, monkeypatch)
    monkeypatch.setattr(
        fit, "estimate_peak_memory", lambda trainer, preprocess, size: size // trainer.config.machine.accumulate * 2**20
    )
    monkeypatch.setattr(fit, "available_memory", lambda device: 4 * 2**20)
    keys = {**KEYS, "batch_size": 12}
    with pytest.raises(DeviceError, match=r" 12 images .*4\.19 MB.*accumulate=4") as error:
        train(tiny.dataset(), out=tmp_path / "run", progress=False, **keys)
    assert "\n" not in str(error.value)
    train(tiny.dataset(), out=tmp_path / "parts", progress=False, accumulate=4, **keys)
    monkeypatch.setattr(fit, "available_memory", lambda device: 1)
    with pytest.raises(DeviceError, match="single image"):
        train(tiny.dataset(), out=tmp_path / "other", progress=False, **keys)


def test_auto_is_a_size_that_was_seen_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an estimate says that everything fits, and steps of more than three images find no memory."""
    session = tiny.session(batch_size=12)
    original, most = Trainer.step, [3]

    def step(self: Trainer, batch: Any, *others: Any) -> None:
        if len(batch) > most[0]:
            torch.empty(2**60)
        original(self, batch, *others)

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(fit, "_MIN_SECONDS", 0.0)
    monkeypatch.setattr(fit, "_SEARCH_SECONDS", 0.0)  # also when the time is up
    size, reason = fit_batch_size(session.trainer, session.setup.preprocess, len(session.loader.split))
    assert size == 3
    assert "12" not in reason
    most[0] = 0
    with pytest.raises(DeviceError, match="single image") as error:
        fit_batch_size(session.trainer, session.setup.preprocess, len(session.loader.split))
    assert "\n" not in str(error.value)


def test_the_advice_is_a_number_that_was_seen_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where memory does not suffice for the estimate."""
    session = tiny.session(batch_size=12)
    no_memory_above(3, monkeypatch)
    assert "accumulate=4" in memory_advice(session.trainer, session.setup.preprocess)
    monkeypatch.setattr(fit, "estimate_peak_memory", lambda *_: torch.empty(2**60))
    assert "single image" in memory_advice(session.trainer, session.setup.preprocess)


def test_the_word_auto() -> None:
    assert make_config(parse_overrides(["batch_size=auto"])).given == {"batch_size": 0}
    assert make_config(parse_overrides(["batch_size=12"])).given == {"batch_size": 12}
    with pytest.raises(ConfigError, match=r"batch_size .*'most'"):
        make_config({"batch_size": "most"})
    with pytest.raises(ConfigError, match=r"batch_size .*-1"):
        make_config({"batch_size": -1})


@pytest.mark.slow
def test_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("digits", out=tmp_path / "run", batch_size="auto", epochs=1)
    config = read_config(tmp_path / "run" / "config.toml")
    assert 16 <= config.schedule.batch_size <= 128
    size = config.schedule.batch_size
    assert re.search(rf"size {size}: images/s .* with {size}\b", capsys.readouterr().err)


@pytest.mark.gpu
def test_on_cuda(tmp_path: Path) -> None:
    setup = prepare("digits", make_config({"model": "vit_tiny_patch16_224", "img_size": 224, "batch_size": "auto"}))
    from vitrail.training.monitoring.progress import Reporter
    from vitrail.training.session import Session

    session = Session(setup, Reporter(False), torch.device("cuda"))
    size, _ = fit_batch_size(session.trainer, session.setup.preprocess, len(session.loader.split))
    assert fit.fits_in_memory(session.trainer, fit.blank_batch(size, setup.preprocess))
