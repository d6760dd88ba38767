"""The whole of a comparison: order, files, result, page, and going on after a kill."""

import json
from pathlib import Path
from typing import Any

import pytest

import vitrail
from comparison import comparing
from training import tiny
from training.page import assert_self_contained, parse
from vitrail.comparison import run as running
from vitrail.errors import ConfigError, ModelError, RunError
from vitrail.models.catalog import VARIANTS
from vitrail.training.engine.interrupt import Stopped
from vitrail.training.session import Session

KEYS = {"models", "best", "difference", "ci95", "p_value", "verdict", "images_needed", "curve"}
MODEL_KEYS = {"name", "family", "top1", "seconds", "latency_ms", "params"}


@pytest.fixture(autouse=True)
def _variants(monkeypatch: pytest.MonkeyPatch) -> None:
    comparing.add_variants(monkeypatch)
    comparing.quick(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    folder, lines = tmp_path_factory.mktemp("whole") / "out", []
    with pytest.MonkeyPatch.context() as patch:
        comparing.add_variants(patch)
        comparing.quick(patch)
        result = comparing.run(folder, log=lines.append, command="vitrail compare tiny")
    return folder, result, lines


def timeless(result: dict[str, Any]) -> dict[str, Any]:
    """The result without what the clock says, and where it lies."""
    clocks = {"seconds", "images_per_second", "latency_ms", "resolution"}
    models = [{key: value for key, value in model.items() if key not in clocks} for model in result["models"]]
    return {key: value for key, value in result.items() if key not in ("folder", "paragraph", "command")} | {
        "models": models
    }


def test_the_public_name() -> None:
    assert vitrail.compare is running.compare


def test_the_result_has_the_documented_keys(whole: Any) -> None:
    folder, result, _ = whole
    assert set(result) >= KEYS
    assert json.loads((folder / "compare.json").read_text()) == json.loads(json.dumps(result))
    for model in result["models"]:
        assert set(model) >= MODEL_KEYS
        assert model["top1"]["n"] == 2
        assert 0 <= model["top1"]["mean"] <= 100
        assert model["latency_ms"] > 0
        assert [row["scale"] for row in model["resolution"]] == [1.0, 1.5, 2.0]
        assert set(model["corruptions"]) == {
            "noise", "blur", "brightness", "contrast", "jpeg", "occlusion", "rotation",
        }  # fmt: skip
    assert [model["family"] for model in result["models"]] == ["vit", "resnet"]
    assert result["verdict"] in ("a", "b", "cannot tell")
    assert [(point["share"], point["images"]) for point in result["curve"][:2]] == [(50, 25), (100, 50)]
    mean = {model["name"]: model["top1"]["mean"] for model in result["models"]}
    assert result["difference"] == pytest.approx(mean[result["a"]] - mean[result["b"]])


def test_arms_are_run_folders_with_the_accuracy_that_was_measured(whole: Any) -> None:
    folder, _, lines = whole
    measured = {path.stem: json.loads(path.read_text()) for path in (folder / "measured").glob("[0-9]*.json")}
    assert len(measured) == 8
    for key, record in measured.items():
        summary = json.loads((folder / "arms" / key / "summary.json").read_text())
        assert summary["top1"] == pytest.approx(record["top1"])
        assert summary["seed"] == record["seed"]
        assert record["correct"].count("1") / len(record["correct"]) == pytest.approx(record["top1"] / 100)
    assert sum("/8" in line for line in lines) == 8
    assert lines[-1].startswith("timing")


def test_the_page_is_self_contained_and_says_the_verdict(whole: Any) -> None:
    folder, result, _ = whole
    text = (folder / "compare.html").read_text()
    assert_self_contained(text)
    page = parse(text)
    assert " ".join(result["paragraph"].split()) in page.text
    assert len(page.all("polyline")) == 4
    assert len(page.section("Robustness").rows()) == 8


def test_running_again_trains_nothing(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, result, _ = whole
    monkeypatch.setattr(running, "train_arm", None)  # would fail
    assert timeless(comparing.run(folder)) == timeless(result)


def test_other_settings_are_refused(whole: Any) -> None:
    folder, _, _ = whole
    with pytest.raises(RunError, match=r"other settings .*seeds 2, now 3"):
        comparing.run(folder, seeds=3)
    with pytest.raises(RunError, match="no comparison"):
        comparing.run(folder / "arms")


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("where", ["_end_epoch", pytest.param("final_evaluation", marks=pytest.mark.slow)])
def test_a_killed_comparison_goes_on(where: str, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the third arm: two are kept, the third is resumed, and the result is that of an undisturbed one."""
    original, calls = getattr(Session, where), []

    def killed(self: Any, *args: Any) -> Any:
        calls.append(self)
        if len(calls) == 3:
            raise Killed
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Session, where, killed)
        with pytest.raises(Killed):
            comparing.run(tmp_path / "out")
    kept = sorted((tmp_path / "out" / "measured").iterdir())
    before = [path.stat().st_mtime_ns for path in kept]
    assert len(kept) == 2
    assert timeless(comparing.run(tmp_path / "out")) == timeless(whole[1])
    assert [path.stat().st_mtime_ns for path in kept] == before
    (third,) = (tmp_path / "out" / "arms").glob("*resnet_test_8-100pct-seed0")
    assert len((third / "sessions.jsonl").read_text().splitlines()) == 2


def test_the_same_model_twice_is_not_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "twin", tiny.VARIANT)
    result = comparing.run(tmp_path, models=(tiny.VARIANT.name, "twin"), seeds=1, shares=(100,))
    assert (result["verdict"], result["best"], result["difference"]) == ("cannot tell", None, 0)
    assert "no difference was seen" in result["paragraph"]


@pytest.mark.slow
def test_a_model_that_learns_beats_one_that_does_not(tmp_path: Path) -> None:
    """The planted winner: the other one is trained with a learning rate that changes nothing."""
    recipe = tmp_path / "still.toml"
    recipe.write_text('recipe = "tiny"\nlr = 1e-12\n')
    name = tiny.VARIANT.name
    models = [f"{name}@tiny", f"{name}@{recipe}"]
    settings = {"lr": None, "epochs": 12}
    result = comparing.run(tmp_path / "out", models=models, shares=(100,), **settings)
    assert result["best"] == models[0]
    assert result["verdict"] == "a"
    assert result["ci95"][0] > 0
    assert "is more accurate." in result["paragraph"]


@pytest.mark.parametrize(
    ("options", "error", "fact"),
    [
        ({"models": ["resnet_test_8"]}, ConfigError, "at least two"),
        ({"models": ["resnet_test_8", "resnet_test_8"]}, ConfigError, "named twice"),
        ({"models": ["resnet_test_8", "resnet_tset"]}, ModelError, "resnet_tset"),
        ({"models": ["resnet_test_8", "vit_test_patch2_8@tyni"]}, ConfigError, "tyni"),
        ({"shares": (0, 100)}, ConfigError, "shares"),
        ({"seeds": 0}, ConfigError, "seeds"),
        ({"seed": 1}, ConfigError, "seed cannot be set"),
        ({"lerning_rate": 1}, ConfigError, "lerning_rate"),
    ],
)
def test_mistakes_are_refused_before_anything_is_trained(
    options: dict[str, Any], error: type[Exception], fact: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=fact):
        comparing.run(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_a_comparison_that_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise Stopped("stopped", 2)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "_end_epoch", stop)
        with pytest.raises(Stopped):
            comparing.run(tmp_path, seeds=1, shares=(100,))
    assert comparing.run(tmp_path, seeds=1, shares=(100,))["plan"]["seeds"] == 1
