"""pretrained=auto: photographs start from published weights where these can be had; a line says which, or why not."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from data.make_folder import picture
from vitrail.cli.app import main
from vitrail.errors import WeightsError
from vitrail.models.catalog import VARIANTS
from vitrail.pretrained.create import create_model
from vitrail.training import setup as module
from vitrail.training.config import automatic
from vitrail.training.config.automatic import ModelRow
from vitrail.training.config.schema import make_config
from vitrail.training.setup import Setup, prepare
from weights.hub_server import Hub, serving

TINY = "vit_tiny_patch16_224"  # stands for the larger model of the table
SCRATCH = "vit_small_patch8_64"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for number in range(24):
        (root / f"class{number % 2}").mkdir(exist_ok=True)
        picture(number % 2, number, (96, 128)).save(root / f"class{number % 2}" / f"{number}.jpg")
    return root


@pytest.fixture(scope="module")
def published() -> bytes:
    torch.manual_seed(0)
    return save(create_model(TINY).state_dict())


@pytest.fixture(autouse=True)
def _table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "MODELS", (*automatic.MODELS[:-1], ModelRow(float("inf"), True, TINY, "small")))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def hub(published: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that can be reached, and has the weights."""
    with serving() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.add(f"timm/{VARIANTS[TINY].weights[0].name}", {"model.safetensors": published})
        yield server


def made(photos: Any, may_download: bool = True, **given: Any) -> tuple[Setup, list[str]]:
    """The setup, and its lines on the start."""
    found = prepare(photos, make_config(given), may_download=may_download)
    return found, [line for line in found.reasons if line.startswith("start ")]


def test_offline_with_an_empty_cache_it_is_from_scratch_at_once(photos: Path) -> None:
    start = time.perf_counter()
    assert module.unobtainable(TINY, may_download=True) is not None
    assert time.perf_counter() - start < 3
    setup, lines = made(photos)
    assert (setup.config.model.model, setup.config.model.pretrained) == (SCRATCH, False)
    (line,) = lines
    assert f"from scratch, without the published weights of {TINY}" in line
    assert "offline mode is set" in line
    assert "--weights FILE" in line


def test_they_are_downloaded_where_the_hub_answers_and_then_in_the_cache(photos: Path, hub: Hub) -> None:
    record = VARIANTS[TINY].weights[0]
    for where in ("from the hub", "in the cache"):
        setup, lines = made(photos)
        assert (setup.config.model.model, setup.config.model.pretrained) == (TINY, True)
        assert setup.config.recipe == "finetune"
        told = f"start   weights of {TINY}, licence {record.licence}, 22.9 MB, {where}"
        assert lines == [f"{told}; --no-pretrained trains from scratch"]
        again = prepare(photos, setup.config.updated(setup.config.flat))  # as a resumed run
        assert (again.config.model.model, again.config.model.pretrained) == (TINY, True)


def test_nothing_is_downloaded_for_a_forecast(photos: Path, hub: Hub) -> None:
    setup, lines = made(photos, may_download=False)
    assert (setup.config.model.model, lines) == (SCRATCH, [])
    assert hub.requests == []


def test_a_download_that_fails_does_not_end_the_run(photos: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise WeightsError("the connection broke")

    monkeypatch.setattr(module, "_load", fails)
    setup, (line,) = made(photos)
    assert (setup.config.model.model, setup.config.model.pretrained) == (SCRATCH, False)
    assert "the connection broke" in line
    with pytest.raises(WeightsError, match="broke"):
        made(photos, pretrained=True)


@pytest.mark.parametrize(
    "given",
    [
        {"pretrained": False},
        {"img_size": 64},
        {"model": TINY, "img_size": 64},
        {"recipe": "small"},
    ],
)
def test_what_was_decided_stays(given: dict[str, Any], photos: Path, hub: Hub) -> None:
    setup, lines = made(photos, **given)
    assert (setup.config.model.pretrained, lines, hub.requests) == (False, [], [])


def test_small_images_are_trained_from_scratch(hub: Hub) -> None:
    setup, lines = made("digits")
    assert (setup.config.model.pretrained, lines, hub.requests) == (False, [], [])


@pytest.mark.parametrize("given", [{}, {"pretrained": "auto"}])
def test_a_model_by_name(given: dict[str, Any], photos: Path, hub: Hub) -> None:
    setup, (line,) = made(photos, model=TINY, **given)
    assert (setup.config.model.model, setup.config.model.pretrained) == (TINY, True)
    assert "from the hub" in line
    setup, (line,) = made(photos, model=SCRATCH, **given)
    assert (setup.config.model.model, setup.config.model.pretrained) == (SCRATCH, False)
    assert "there are none" in line


def test_another_input(photos: Path, hub: Hub) -> None:
    setup, _ = made(photos, img_size=96, in_chans=1)
    model = setup.config.model
    assert (model.model, model.pretrained, setup.preprocess.size, setup.preprocess.channels) == (
        TINY,
        True,
        (96, 96),
        1,
    )


@pytest.mark.parametrize(
    ("option", "expected"),
    [([], {}), (["--pretrained"], {"pretrained": True}), (["--no-pretrained"], {"pretrained": False})],
)
def test_the_options(option: list[str], expected: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def recorded(data: str, **given: Any) -> None:
        seen.append({key: value for key, value in given.items() if key != "command"})

    monkeypatch.setattr("vitrail.training.run.train", recorded)
    with pytest.raises(SystemExit, match="0"):
        main(["train", "photos/", *option])
    assert seen == [expected]
