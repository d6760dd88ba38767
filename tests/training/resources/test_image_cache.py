"""Runs with a cache of decoded images, and runs on shards and tables."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vitrail
from data.make_folder import picture
from data.make_shards import encoded, write_shard
from tolerance import LOSS
from training import tiny
from training.runs import assert_same, outcome
from vitrail.data.catalog import open_dataset
from vitrail.data.dataset import FileSplit
from vitrail.errors import ConfigError
from vitrail.images.preprocess import Preprocess
from vitrail.training.config.schema import make_config, read_config
from vitrail.training.config.values import byte_count
from vitrail.training.engine.interrupt import Stopped
from vitrail.training.engine.trainer import Trainer
from vitrail.training.resources import image_cache as cached
from vitrail.training.resources.image_cache import settle_cache
from vitrail.training.run import train
from vitrail.utils.text import format_bytes

KEYS: dict[str, Any] = {
    **tiny.PLAIN,
    "img_size": 8,
    "in_chans": 3,
    "epochs": 3,
    "batch_size": 8,
    "crop_scale": (0.3, 1.0),
    "flip": 0.5,
    "workers": 2,
    "progress": False,
}


@pytest.fixture(autouse=True)
def _set_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny.add_variant(monkeypatch)
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """36 images of three classes, JPEG and PNG."""
    for number in range(36):
        path = tmp_path / "photos" / f"class{number % 3}" / f"{number:02}.{('jpg', 'png')[number % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number % 3, number, (30, 41)).save(path)
    return tmp_path / "photos"


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the row of each of the 28 training images that is decoded from now on."""
    seen: list[int] = []
    real = FileSplit.image

    def image(self: FileSplit, i: int, at_least: Any = None) -> Image.Image:
        if len(self) == 28:
            seen.append(i)
        return real(self, i, at_least)

    monkeypatch.setattr(FileSplit, "image", image)
    return seen


@contextmanager
def stopping(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever trains in this block is told to stop after its fourth step, in its second epoch."""
    real = Trainer.step

    def step(self: Trainer, batch: Any) -> Any:
        done = real(self, batch)
        if self.state.steps == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        yield


def test_a_run_decodes_each_image_once(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = decoded(monkeypatch)
    train(photos, out=tmp_path / "one", **{**KEYS, "progress": True})
    assert len(seen) == len(set(seen)) >= 24  # 4 of them are left out in each epoch
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cache")]
    total = 3 * (28 * 16 * 22 + 4 * 64)  # 30x41 shrunk to a side of 2 x 8
    assert line.startswith(f"cache   {format_bytes(total)} of decoded images")
    assert "16 pixels" in line
    # Another run finds them decoded.
    del seen[:]
    train(photos, out=tmp_path / "two", **KEYS)
    assert seen == []
    assert_same(outcome(tmp_path / "one"), outcome(tmp_path / "two"))
    assert read_config(tmp_path / "one" / "config.toml").io.cache == "1MB"
    # The figures are those of the plain way: validation and test see exactly the same crops.
    result = vitrail.load(tmp_path / "one").evaluate(photos)
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert result.top1 == summary["top1"]
    assert result.loss == pytest.approx(summary["loss"], abs=LOSS)


def test_a_resumed_run_sees_the_same_pixels(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in its second epoch, and gone on with where there is no cache, and no disk to make one on."""
    train(photos, out=tmp_path / "whole", **KEYS)
    with stopping(monkeypatch), pytest.raises(Stopped):
        train(photos, out=tmp_path / "cut", **KEYS)
    monkeypatch.setenv("VITRAIL_CACHE", "/dev/null/no")
    for value in ("off", "auto", "2GB"):
        with pytest.raises(ConfigError, match="cache=1MB"):
            train(resume=tmp_path / "cut", progress=False, cache=value)
    train(resume=tmp_path / "cut", progress=False)
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))


def test_a_run_without_a_cache(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = decoded(monkeypatch)
    train(photos, out=tmp_path / "off", **KEYS, cache="off")
    assert len(seen) >= 3 * 24
    assert not (tmp_path / "cache" / "decoded").exists()
    assert 'cache = "off"' in (tmp_path / "off" / "config.toml").read_text()


def settled(photos: Path, **keys: Any) -> tuple[str, list[str]]:
    dataset = open_dataset(photos)
    config = make_config({"data": "x", "model": "y", "crop_scale": (0.3, 1), "epochs": 3, **keys})
    config, lines = settle_cache(config, dataset, Preprocess(size=(8, 8)))
    return config.io.cache, lines


def test_auto_is_on_where_it_helps(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settled(photos)[0] == "1MB"
    assert settled(photos, epochs=None, budget=5)[0] == "1MB"
    assert settled(photos, epochs=1)[0] == "off"
    assert settled(photos, epochs=1, cache="3GB")[0] == "3GB"
    value, (line,) = settled(photos, cache="0.01MB")
    assert value == "0.01MB"
    assert "10 kB of 30.3 kB" in line
    assert "6.14 kB" in settled(photos, crop_scale=None)[1][0]
    assert settled(photos, probe=True) == ("off", [])
    assert settled(photos, cache="off") == ("off", [])
    monkeypatch.setattr(cached, "max_total_size", lambda: 20_000)
    value, (line,) = settled(photos)
    assert value == "off"
    assert all(fact in line for fact in ("30.3 kB", "20 kB", "cache=20GB"))


def test_arrays_need_none() -> None:
    for value, lines in (("auto", 0), ("2GB", 1)):
        config = make_config({"data": "x", "model": "y", "cache": value})
        config, found = settle_cache(config, tiny.dataset(), Preprocess(size=(8, 8)))
        assert (config.io.cache, len(found)) == ("off", lines)


def test_sizes() -> None:
    assert [byte_count(text) for text in ("12", "4GB", "500 mb", "1.5T", "3k")] == [
        12,
        4 * 10**9,
        5 * 10**8,
        15 * 10**11,
        3000,
    ]
    keys = {"data": "x", "model": "y"}
    for value, kept in ((True, "auto"), (False, "off"), ("OFF", "off"), ("none", "off"), ("0", "off"), ("4gb", "4gb")):
        assert make_config({**keys, "cache": value}).io.cache == kept
    for wrong in ("many", "-3GB", "4PB", ""):
        if wrong:
            with pytest.raises(ConfigError, match="cache"):
                make_config({**keys, "cache": wrong})


def shards(tmp_path: Path) -> str:
    for number in range(3):
        write_shard(tmp_path / "shards" / f"{number}.tar", range(12 * number, 12 * number + 12))
    return f"wds:{tmp_path}/shards/{{0..2}}.tar"


def parquet(tmp_path: Path) -> str:
    pa = pytest.importorskip("pyarrow")
    rows = [{"bytes": encoded(n % 3, n), "path": None} for n in range(36)]
    (tmp_path / "table").mkdir()
    table = pa.table({"image": rows, "label": [n % 3 for n in range(36)]})
    pa.parquet.write_table(table, tmp_path / "table" / "a.parquet")
    return f"hf-dataset:{tmp_path}/table"


@pytest.mark.parametrize("make", [shards, parquet])
def test_shards_and_tables_in_every_command(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, stopping and going on, judging, and probing."""
    if make is parquet:
        pytest.importorskip("pyarrow.parquet")
    data = make(tmp_path)
    whole = train(data, out=tmp_path / "whole", **KEYS)
    assert whole.report["images"] == 4
    assert whole.report["data"] == data
    with stopping(monkeypatch), pytest.raises(Stopped):
        train(data, out=tmp_path / "cut", **KEYS)
    monkeypatch.chdir("/")
    train(resume=tmp_path / "cut", progress=False)
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))
    result = vitrail.load(tmp_path / "whole").evaluate(data)
    assert result.top1 == whole.report["top1"]
    keys = {"model": tiny.VARIANT.name, "img_size": 8, "in_chans": 3, "progress": False}
    probe = train(data, probe=True, out=tmp_path / "probe", **keys)
    assert probe.report["images"] == 4
    assert np.isfinite(probe.report["loss"])
