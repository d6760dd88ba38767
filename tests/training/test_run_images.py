"""Images and a run: what resuming checks of them, and what evaluation says of images that were changed since."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from data.make_folder import picture
from vitrail.classifier import Classifier, load
from vitrail.errors import DataError, RunError
from vitrail.training.engine.trainer import Trainer
from vitrail.training.run import train

KEYS: dict[str, Any] = {
    "model": "vit_nano_patch2_8",
    "img_size": 8,
    "batch_size": 8,
    "epochs": 2,
    "device": "cpu",
    "checkpoint_every": 1,
    "cache": "off",
}


def write(root: Path, count: int = 12, kind: str = "bmp") -> Path:
    for c, name in enumerate(("ant", "bee")):
        (root / name).mkdir(parents=True)
        for number in range(count):
            picture(c, number, (12, 16)).save(root / name / f"{number}.{kind}")
    return root


class Killed(Exception):
    pass


def unfinished(root: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer.step

    def step(self: Trainer, batch: Any) -> None:
        if self.state.steps == 2:
            raise Killed
        original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(Killed):
            train(root, out=out, progress=False, **KEYS)


def test_resuming_checks_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All files have the same size, so only contents tell the classes apart."""
    root = write(tmp_path / "photos")
    out = tmp_path / "run"
    unfinished(root, out, monkeypatch)
    shutil.copytree(root, tmp_path / "kept")

    (root / "ant").rename(root / "x")
    (root / "bee").rename(root / "ant")
    (root / "x").rename(root / "bee")
    with pytest.raises(RunError, match=r"images are not the same.*contents"):
        train(resume=out, progress=False)

    shutil.rmtree(root)
    write(root, kind="png")
    for path in root.rglob("*.png"):
        path.rename(path.with_suffix(".bmp"))
    with pytest.raises(RunError, match=r"images are not the same.*sizes"):
        train(resume=out, progress=False)

    shutil.rmtree(root)
    shutil.copytree(tmp_path / "kept", root, copy_function=shutil.copyfile)
    capsys.readouterr()
    train(resume=out)
    err = capsys.readouterr().err.replace("\n", " ")
    assert re.search(r"images as before: names, labels and sizes of (\d+), contents of \1 of them", err)
    assert "newer or older" in err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("trained")
    write(base / "photos")
    with contextlib.chdir(base):
        train("photos", out=base / "run", progress=False, **KEYS)
    return base / "photos", base / "run"


@pytest.mark.parametrize("absolute", [False, True])
def test_evaluation_on_images_that_were_renamed(
    absolute: bool, trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The relative path of the training and the absolute one are the same data; another folder is not."""
    root, run = trained
    monkeypatch.chdir(root.parent)
    data = str(root) if absolute else "photos"
    clf = load(run / "model")
    assert isinstance(clf, Classifier)
    clf.evaluate(data)  # without a warning, which would be an error
    shutil.copytree(root, tmp_path / "other")
    for number in range(12):
        (root / f"ant/{number}.bmp").rename(root / f"ant/renamed{number}.bmp")
    try:
        with pytest.warns(UserWarning, match=r"not the same as in training.*other names"):
            clf.evaluate(data)
        (root / "bee/3.bmp").rename(tmp_path / "3.bmp")
        with pytest.warns(UserWarning, match="not the same as in training.*now"):
            clf.evaluate(data)
        (tmp_path / "other/ant/1.bmp").unlink()
        clf.evaluate(tmp_path / "other")
    finally:
        shutil.rmtree(root)
        write(root)


def test_a_run_is_not_written_into_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "photos")
    for out in (root / "run", root / "ant/run", root):
        with pytest.raises((DataError, RunError)):
            train(root, out=out, progress=False, **KEYS)
    monkeypatch.chdir(root)
    with pytest.raises(DataError, match="--out"):
        train(".", progress=False, **KEYS)
    assert sorted(path.name for path in root.iterdir()) == ["ant", "bee"]


def test_training_on_a_class_whose_name_is_not_utf8(tmp_path: Path) -> None:
    root = write(tmp_path / "photos")
    os.rename(root / "ant", os.path.join(os.fsencode(root), b"caf\xe9"))
    with pytest.warns(UserWarning, match="as café"):
        clf = train(root, out=tmp_path / "run", progress=False, **KEYS)
    assert clf.class_names == ("bee", "café")
    again = load(tmp_path / "run/model")
    assert again.class_names == ("bee", "café")
    with pytest.warns(UserWarning, match="as café"):
        again.evaluate(root)
    folder = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"photos\xe9"))
    os.rename(root, folder)
    with pytest.warns(UserWarning, match="as café"), pytest.raises(DataError, match="UTF-8"):
        train(folder, out=tmp_path / "run2", progress=False, **KEYS)


def test_thin_images_do_not_end_a_run(tmp_path: Path) -> None:
    from PIL import Image

    root = write(tmp_path / "photos")
    for name in ("ant", "bee"):
        for number in range(4):
            Image.new("RGB", (1, 500_000), (9, 9, 9 * number)).save(root / name / f"thin{number}.png")
    clf = train(root, out=tmp_path / "run", progress=False, **{**KEYS, "epochs": 1, "img_size": 32})
    assert all(each.error is None for each in clf.predict(root))


def test_memory_that_does_not_suffice_for_an_image_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path / "photos")
    from vitrail.images import preprocess

    original = preprocess.Preprocess.crop
    calls = []

    def crop(self: preprocess.Preprocess, image: Any) -> Any:
        calls.append(1)
        if len(calls) % 3 == 0:
            raise MemoryError
        return original(self, image)

    monkeypatch.setattr(preprocess.Preprocess, "crop", crop)
    clf = train(root, out=tmp_path / "run", progress=False, **KEYS, crop_scale="none")
    errors = [each.error for each in clf.predict(root)]
    assert {error for error in errors if error} == {"does not fit in memory"}
    assert any(error is None for error in errors)
    assert {item["reason"] for item in clf.evaluate(root, "train").skipped} == {"does not fit in memory"}


def test_data_is_given_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vitrail.cli import main

    with pytest.raises(SystemExit) as left:
        main(["train", str(tmp_path), "data=other"])
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert "twice" in err
    assert "Traceback" not in err
