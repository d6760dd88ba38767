"""--show-batch: the picture is what the model would see, to the pixel, and nothing is trained."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from training import tiny
from training.runs import KEYS, run
from vitrail.cli import main
from vitrail.data.dataset import ArraySplit, Dataset, Sizes
from vitrail.errors import ConfigError
from vitrail.images.preprocess import Preprocess
from vitrail.training.engine.batch_augmenter import View
from vitrail.training.engine.trainer import Trainer
from vitrail.training.monitoring.batch_preview import _COLUMNS, _GAP, _LINE, draw, label_text, pixels, zoom_factor
from vitrail.training.run import train


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


class Seen(BaseException):
    """Ends a run at its first view."""


def first_view(monkeypatch: pytest.MonkeyPatch, out: Path, **keys: Any) -> View:
    """What a run with these keys really learns from first."""
    views: list[View] = []

    def learn(self: Trainer, view: View, *_: Any) -> None:
        views.append(view)
        raise Seen

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_accumulate_gradients", learn)
        with pytest.raises(Seen):
            run(out, **keys)
    return views[0]


def test_the_picture_is_what_the_model_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = first_view(monkeypatch, tmp_path / "run")
    train(tiny.dataset(), show_batch=tmp_path / "batch.png", out=tmp_path / "none", progress=False, **KEYS)
    sheet = np.asarray(Image.open(tmp_path / "batch.png").convert("L"))
    # mean 0.4 and deviation 0.3, by hand; 14 times as large: 8 x 14 = 112 pixels.
    expected = ((view.images.double().numpy() * 0.3 + 0.4) * 255).round().clip(0, 255)[:, 0]
    starts = np.flatnonzero((sheet != 255).any(axis=1))
    top = next(y for y in starts if np.array_equal(sheet[y : y + 112 : 14, _GAP : _GAP + 112 : 14], expected[0]))
    for number, image in enumerate(expected):
        y = top + number // _COLUMNS * (112 + 2 * _LINE + 2 + _GAP)
        x = _GAP + number % _COLUMNS * (112 + _GAP)
        assert np.array_equal(sheet[y : y + 112, x : x + 112], image.repeat(14, 0).repeat(14, 1)), number
    assert not (tmp_path / "none").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "batch.png"}


def test_a_taken_folder_does_not_matter(tmp_path: Path) -> None:
    """The command of a run that is there already still shows what it learnt from."""
    run(tmp_path / "run", epochs=0)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    classifier = run(tmp_path / "run", show_batch=tmp_path / "batch.png")
    assert (tmp_path / "batch.png").exists()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    assert classifier.class_names == ("one", "two", "three")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["train", "digits", "--show-batch", "b.png", "--model", "vit_nano_patch2_8", "batch_size=20", "--json"])
    out, err = capsys.readouterr()
    assert (left.value.code, out) == (0, "")
    assert "wrote 20 of the 20 images of the first batch to b.png" in " ".join(err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch\.txt.*\.png"):
        run(tmp_path / "run", show_batch=tmp_path / "batch.txt")
    with pytest.raises(ConfigError, match=r"probe.*--show-batch"):
        train(tiny.dataset(), probe=True, model=tiny.VARIANT.name, show_batch=tmp_path / "b.png", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_colour_images_and_large_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for side, shown, cell in ((40, 64, 80), (150, 32, 150), (512, 32, 256)):
        count = 70
        want = Preprocess(size=(side, side), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
        bytes_ = torch.from_numpy(rng.integers(0, 255, (count if side < 100 else 33, 3, side, side), np.uint8))
        view = View(want.normalize(bytes_), torch.zeros(len(bytes_), dtype=torch.int64), torch.arange(len(bytes_)), 0)
        assert np.array_equal(pixels(view.images, want), bytes_.numpy().transpose(0, 2, 3, 1))
        sheet, found = draw(view, want, ["a"])
        assert found == shown
        assert round(side * zoom_factor(side, side)) == cell
        assert sheet.width == _GAP + 8 * (cell + _GAP)


def test_labels_say_the_shares() -> None:
    names = ["cat", "dog", "bird"]
    assert label_text(torch.tensor(1), names) == ["dog"]
    assert label_text(torch.tensor([0.3, 0.7, 0.0]), names) == ["0.70 dog", "0.30 cat"]
    assert label_text(torch.tensor([0.0, 1.0, 0.0]), names) == ["dog"]


def test_names_of_any_kind_are_drawn() -> None:
    names = ["x" * 300, "日本語", "a\nb\x00", ""]
    split = ArraySplit(np.zeros((4, 8, 8), np.uint8), np.arange(4))
    data = Dataset("odd", tuple(names), {"train": split}, Sizes.of(np.full((4, 2), 8)), channels=1)
    want = Preprocess(size=(8, 8), mean=(0.5,), std=(0.5,), channels=1)
    images = want.normalize(torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
    mixed = torch.tensor([[0.6, 0.4, 0.0, 0.0]] * 4)
    for targets in (torch.arange(4), mixed):
        sheet, _ = draw(View(images, targets, torch.arange(4), 0), want, data.class_names, ["head " * 100])
        assert sheet.width == _GAP + 4 * (112 + _GAP)
