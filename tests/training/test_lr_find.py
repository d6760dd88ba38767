"""The learning rate range test: planted curves, a network whose best rate is known, and nothing left behind."""

import copy
import json
import math
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest

from training import tiny
from vitrail.cli import main
from vitrail.errors import ConfigError, RunError
from vitrail.training.lr_find import RangeTest, find_lr, smoothed, suggest, write_plot
from vitrail.training.run import train


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


def test_the_suggestion_is_a_tenth_of_the_rate_with_the_lowest_loss() -> None:
    rates = np.logspace(-6, 0, 61)
    losses = (np.log10(rates) + 2) ** 2  # lowest at 1e-2
    assert suggest(rates, losses) == 1e-3
    noisy = losses + np.random.default_rng(0).normal(scale=0.05, size=61)
    assert 5e-4 < suggest(rates, smoothed(noisy)) < 2e-3
    assert smoothed([1.0] * 3 + [8.0] + [1.0] * 3)[3] == 2.0
    assert smoothed([5.0]) == [5.0]


def test_it_leaves_the_session_as_it_was() -> None:
    one, other = tiny.session(epochs=2, ema=0.9), tiny.session(epochs=2, ema=0.9)
    before, schedule = copy.deepcopy(one.trainer.state), one.trainer.schedule
    find_lr(one)
    assert one.trainer.state == before
    assert one.trainer.schedule is schedule
    assert tiny.learn(one, 2) == tiny.learn(other, 2)
    assert tiny.same(one.trainer.eval_model.state_dict(), other.trainer.eval_model.state_dict())


def test_rates_grow_exponentially_whatever_lr_is() -> None:
    found = find_lr(tiny.session(lr=3e-2, head_lr=0.3))
    assert found.rates[0] == pytest.approx(1e-7)
    steps = np.diff(np.log(found.rates))
    assert steps == pytest.approx(steps[0])
    assert math.exp(steps[0]) == pytest.approx(1e8 ** (1 / 99))
    assert found.suggestion in (1e-4, 1e-3, 1e-2) or 1e-4 < found.suggestion < 0.3


def test_the_suggested_rate_learns_better_than_one_far_below_or_above() -> None:
    rate = find_lr(tiny.session()).suggestion
    below, at, above = (tiny.learn(tiny.session(lr=factor * rate, epochs=12), 12)[-1] for factor in (1e-3, 1, 1e3))
    assert at < below - 0.1
    assert not above < at


def test_a_loss_that_is_not_finite_ends_it() -> None:
    one = tiny.session()
    one.trainer.model.head.weight.data.fill_(float("nan"))
    with pytest.raises(RunError, match="not finite"):
        find_lr(one)


def test_the_plot_is_an_svg_by_itself(tmp_path: Path) -> None:
    rates = tuple(np.logspace(-7, 1, 50).tolist())
    test = RangeTest(rates, tuple((math.log10(rate) + 2) ** 2 for rate in rates), 1e-3)
    line = write_plot(test, tmp_path / "lr.svg", "a <title>")
    assert "lr=0.001" in line
    root = xml.etree.ElementTree.parse(tmp_path / "lr.svg").getroot()
    texts = [element.text for element in root.iter() if element.text]
    assert "log10 of the learning rate" in texts
    assert "lr=0.001" in texts
    assert "href" not in (tmp_path / "lr.svg").read_text()


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["train", "digits", "--lr-find", "lr.svg", "batch_size=32", "device=cpu"]
    with pytest.raises(SystemExit) as ended:
        main([*options, "--json"])
    assert ended.value.code in (0, None)
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert f"suggested: lr={found['suggestion']:g}" in err
    assert 1e-4 < found["suggestion"] < 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["lr.svg"], "no run is left"
    for more in (["--lr-find", "lr.txt"], ["--lr-find", "a.svg", "--resume", "x"], ["--lr-find", "a.svg", "--probe"]):
        with pytest.raises(SystemExit) as ended:
            main(["train", "digits", *more])
        assert ended.value.code == 2, more


def test_in_python(tmp_path: Path) -> None:
    clf = train(tiny.dataset(), lr_find=tmp_path / "lr.svg", out=tmp_path / "run", progress=False, **tiny.PLAIN)
    assert clf.report["suggestion"] == suggest(clf.report["rates"], clf.report["losses"])
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"\.svg"):
        train(tiny.dataset(), lr_find=tmp_path / "lr.jpg", progress=False, **tiny.PLAIN)
