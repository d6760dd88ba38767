"""`vitrail embed`."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.classifier import Classifier, load
from vitrail.cli import main
from vitrail.images.preprocess import Preprocess
from vitrail.models.build import build_model
from vitrail.models.configs import ViTConfig

CONFIG = ViTConfig(img_size=(8, 8), patch_size=2, embed_dim=16, depth=1, num_heads=2, num_classes=2, in_chans=1)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, out, err


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    preprocess = Preprocess(size=(8, 8), mean=(0.5,), std=(0.3,), channels=1)
    return Classifier(build_model(CONFIG), preprocess, ["a", "b"]).save(tmp_path / "model")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "d.png"):
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(folder / name)
    (folder / "c.png").write_bytes(b"")
    return folder


def test_features_of_a_folder(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "embed", model, photos, "--device", "cpu")
    assert status == 0
    assert out == "3 images, 16 features each, in features.npy\n"
    assert re.fullmatch(f"skipped: {photos / 'c.png'} .*\n", err)
    paths = json.loads((tmp_path / "features.npy.json").read_text())["paths"]
    assert paths == [str(photos / name) for name in ("a.png", "b.png", "d.png")]
    assert np.array_equal(np.load(tmp_path / "features.npy"), load(model).embed(paths))


def test_a_stopped_command_continues(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitrail import feature_file as features

    monkeypatch.setattr(features, "_SHARD", 1)
    write, left = features.atomic_write_bytes, [2]

    def stop(path: Path, data: bytes) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(path, data)

    arguments = ("embed", model, photos, "--out", tmp_path / "f.parquet", "--batch-size", 1, "--device", "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(features, "atomic_write_bytes", stop)
        assert run(capsys, *arguments)[:2] == (130, "")
    status, out, err = run(capsys, *arguments)
    assert status == 0
    assert out.startswith("3 images, 16 features each")
    assert "2 of 4" in err
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert err.startswith(f"error: {tmp_path / 'f.parquet'} ")


def test_no_image_at_all(model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "embed", model, photos / "c.png", "--out", tmp_path / "f.npy")
    assert (status, out) == (2, "")
    assert re.search(f" 1 images .*{photos / 'c.png'}", err)
    status, out, err = run(capsys, "embed", "--help")
    assert "Example: vitrail embed " in out
