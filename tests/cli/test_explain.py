"""`vitrail explain`: outputs that other tools read, files, and errors of one line."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.classifier import Classifier
from vitrail.cli import main
from vitrail.images.preprocess import Preprocess
from vitrail.models.build import build_model
from vitrail.models.catalog import variant
from vitrail.models.configs import ResNetConfig, SwinConfig


class Done(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Done]
NAMES = [f"digit {k}" for k in range(10)]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Done:
        with pytest.raises(SystemExit) as caught:
            main(["explain", *(str(argument) for argument in arguments)])
        out, err = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return Done(caught.value.code, out, err)

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    network = build_model(replace(variant("vit_nano_patch2_8").config, in_chans=1))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    preprocess = Preprocess(size=(8, 8), mean=(0.5,), std=(0.3,), channels=1)
    return Classifier(network, preprocess, NAMES).save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(random.integers(0, 256, (20, 30), np.uint8)).save(folder / f"{number}.png")
    return folder


def test_text(run: Run, model: Path, photos: Path) -> None:
    done = run(model, photos)
    assert (done.status, done.err) == (0, "")
    header, *rows, last = done.out.splitlines()
    assert header.split() == ["image", "target", "probability", "picture"]
    assert len(rows) == 4
    assert last.split() == ["gallery", "explanations/gallery.html"]
    assert Path("explanations/gallery.html").is_file()
    for number, row in enumerate(rows):
        assert row.startswith(str(photos / f"{number}.png"))
        picture = Path(row[row.index("explanations/") :].strip())
        assert picture.is_file()
        assert np.load(picture.with_suffix(".npy")).shape == (20, 30)


def test_json(run: Run, model: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    done = run(model, photos / "0.png", tmp_path / "broken.png", "--json", "--out", "new", "--score")
    first, second = map(json.loads, done.out.splitlines())
    assert done.status == 0
    assert list(first) == [
        *("path", "method", "target", "score", "is_against", "grid", "heatmap", "picture", "faithfulness")
    ]
    assert (first["method"], first["grid"]) == ("relevance", [4, 4])
    assert first["target"] in NAMES
    assert Path(first["heatmap"]).parent == Path("new")
    assert list(second) == ["path", "error"]
    assert "gallery" in done.err


def test_score_and_pair_in_the_table(run: Run, model: Path, photos: Path) -> None:
    done = run(model, photos / "0.png", "--score", "--baseline", "blur", "--target", "digit 1:digit 2")
    header, row, _ = done.out.splitlines()
    assert header.split() == ["image", "target", "logit", "difference", "faithfulness", "percentile", "picture"]
    assert "digit 1:digit 2" in row


def test_all_heads(run: Run, model: Path, photos: Path) -> None:
    done = run(model, photos / "0.png", "--method", "attention", "--head", "all", "--block", "-1", "--json")
    picture = json.loads(done.out)["picture"]
    one = run(model, photos / "0.png", "--method", "attention", "--head", "0", "--json")
    with Image.open(picture) as grid, Image.open(json.loads(one.out)["picture"]) as single:
        assert grid.width > single.width


@pytest.mark.parametrize("architecture", ["vit", "swin"])
def test_positions_need_no_image(run: Run, model: Path, tmp_path: Path, architecture: str) -> None:
    if architecture == "swin":
        config = SwinConfig(
            img_size=(32, 32), patch_size=4, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(2, 4), num_classes=3
        )
        clf = Classifier(build_model(config), Preprocess(size=(32, 32)), ["a", "b", "c"])
        model = clf.save(tmp_path / "swin")
    done = run(model, "--method", "positions")
    assert done.status == 0
    path = Path(done.out.split()[-1])
    with Image.open(path) as picture:
        assert min(picture.size) > 50


def test_benchmark(run: Run, model: Path, photos: Path) -> None:
    done = run(model, photos, "--benchmark", "--limit", "3")
    assert done.status == 0
    assert "3 images" in done.out
    for name in ("relevance", "gradcam", "rollout", "occlusion"):
        assert name in done.out
    rows = json.loads(run(model, photos, "--benchmark", "--limit", "2", "--json").out)
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    assert set(rows[0]) == {"method", "class_specific", "images", "score", "percentile", "sure", "seconds"}


def test_errors_are_one_line(run: Run, model: Path, photos: Path, tmp_path: Path) -> None:
    cnn = build_model(ResNetConfig(block="basic", layers=(1, 1), channels=(8, 8), img_size=(32, 32), num_classes=10))
    clf = Classifier(cnn, Preprocess(size=(32, 32)), NAMES)
    resnet = clf.save(tmp_path / "resnet")
    for arguments, fact in (
        ((model,), "image"),
        ((model, photos, "--method", "relevence"), "relevance"),
        ((resnet, photos, "--method", "rollout"), "gradcam"),
        ((resnet, "--method", "positions"), "ResNet"),
        ((model, photos, "--target", "digit 11"), "digit 1"),
        ((model, photos, "--head", "first", "--method", "attention"), "first"),
        ((model, photos, "--block", "0"), "block"),
        ((model, photos, "--baseline", "black", "--score"), "black"),
        ((model, photos, "--benchmark", "--method", "gradcam"), "--method"),
        ((model, photos, "--benchmark", "--out", "elsewhere"), "--out"),
        ((model, photos, "--limit", "3"), "--limit"),
        ((model, "--method", "positions", "--batch-size", "2"), "--batch-size"),
        ((model, tmp_path / "missing.png"), "missing.png"),
    ):
        done = run(*arguments)
        assert done.status == 2, arguments
        assert fact in done.err
        assert done.out == ""
        assert [line for line in done.err.splitlines() if "rror" in line][-1].startswith("error: ")
        assert not list(Path().glob("explanations/*"))
