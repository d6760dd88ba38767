"""CIFAR-10 fine-tuning from the command line, on a small archive of its format from localhost and random weights."""

import dataclasses
import functools
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from data.test_catalog import cifar_files, tar
from vitrail.cli import main
from vitrail.data.catalog import DATASETS, DatasetFile
from vitrail.pretrained.create import create_model
from vitrail.training.config.schema import read_config

RECIPE = Path(__file__).parents[2] / "recipes" / "cifar10-vit-small.toml"
# The recipe's peak rate is that of the head; each layer below it learns at three quarters of the one above.
DEEPEST = 13  # 12 blocks, and above them the last norm and the head


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A hundred and twenty images under CIFAR-10's name, where the network has them."""
    served = tmp_path / "served"
    served.mkdir()
    row = DATASETS["cifar10"]
    tar(served / row.files[0].name, cifar_files("cifar10")[0])
    content = (served / row.files[0].name).read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(served)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    file = DatasetFile(
        name=row.files[0].name,
        urls=(f"http://127.0.0.1:{server.server_port}/{row.files[0].name}",),
        md5=hashlib.md5(content).hexdigest(),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    monkeypatch.setitem(DATASETS, "cifar10", dataclasses.replace(row, files=(file,)))
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def weights(folder: Path, model: str, size: int) -> Path:
    """Random weights for ImageNet's classes, as a checkpoint has them."""
    path = folder / f"{model}.safetensors"
    save_file(create_model(model, num_classes=1000, img_size=size).state_dict(), path)
    return path


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[str, str]:
    """What a command that succeeds prints on stdout and stderr."""
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert left.value.code == 0, err
    return out, err


def from_train_to_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, size: int) -> str:
    """Train by the recipe, evaluate, predict; returns what training said."""
    out, picture = tmp_path / "run", tmp_path / "a.png"
    start = ["--weights", weights(tmp_path, model, size)]
    small = [
        "--epochs",
        0.3,
        "--img-size",
        size,
        "batch_size=8",
        "workers=0",
        "warmup_epochs=0",
        "device=cpu",
        "--verbose",
    ]
    _, said = command(capsys, "train", "--recipe", RECIPE, "--out", out, "--model", model, *start, *small)
    summary = json.loads((out / "summary.json").read_text())
    printed, _ = command(capsys, "evaluate", out, "cifar10", "--json")
    judged = json.loads(printed)
    assert (judged["split"], judged["images"]) == ("test", 20)
    assert judged["top1"] == summary["top1"]
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(picture)
    printed, _ = command(capsys, "predict", out, picture, "--json")
    assert json.loads(printed)["label"] in DATASETS["cifar10"].class_names
    return said


def check_rates(said: str, out: Path, deepest: int) -> None:
    """The peak rates that were printed, group by group, are the recipe's, scaled to the batch as the config says."""
    recipe, config = read_config(RECIPE).given, read_config(out / "config.toml")
    optimizer = config.optimizer
    assert optimizer.layer_decay == recipe["layer_decay"] == 0.75
    assert optimizer.head_lr / optimizer.backbone_lr == pytest.approx(
        recipe["head_lr"] / recipe["backbone_lr"], rel=1e-2
    )
    scale = (config.schedule.batch_size / recipe["batch_size"]) ** 0.5
    assert optimizer.head_lr == pytest.approx(recipe["head_lr"] * scale, rel=1e-2)
    printed = re.findall(r"^group +(head|backbone) layer (\d+)(?:, no decay)? .* lr (\S+) ", said, re.MULTILINE)
    assert len(printed) > 2 * deepest
    for part, layer, rate in printed:
        peak = recipe["head_lr"] if part == "head" else recipe["backbone_lr"]
        assert float(rate) == pytest.approx(peak * scale * 0.75 ** (deepest - int(layer)), rel=2e-2), (part, layer)
    assert {int(layer) for part, layer, _ in printed if part == "head"} == {deepest}


def test_the_recipe_is_for_vit_small_and_names_what_it_needs() -> None:
    recipe = read_config(RECIPE).given
    assert (recipe["model"], recipe["data"], recipe["pretrained"]) == ("vit_small_patch16_224", "cifar10", True)
    assert recipe["img_size"] == (224, 224)
    assert recipe["head_lr"] > recipe["backbone_lr"]


def test_end_to_end_with_a_small_model(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = from_train_to_predict(tmp_path, capsys, "vit_tiny_patch16_224", 48)
    check_rates(said, tmp_path / "run", DEEPEST)


@pytest.mark.slow
def test_end_to_end(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = from_train_to_predict(tmp_path, capsys, "vit_small_patch16_224", 224)
    check_rates(said, tmp_path / "run", DEEPEST)
    assert "21,669,514 parameters" in said, "22,050,664 with ImageNet's 1000 classes"
