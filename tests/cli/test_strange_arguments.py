"""Names that no file can have, folders that are none, and settings without sense: one line, exit status 2."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from data.make_folder import make_folder
from vitrail.cli import main

TINY = ["--model", "vit_nano_patch2_8", "--img-size", "8", "batch_size=8", "device=cpu", "--epochs", "1"]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("base")
    make_folder(base / "photos", classes=2, per_class=12, broken=False)
    assert run("train", base / "photos", "--out", base / "run", *TINY) == 0
    return base / "photos", base / "run" / "model"


def test_more_tokens_than_attention_can_take(trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """250,000 of patches of two pixels: refused before a step is tried."""
    data, _ = trained
    assert run("train", data, "--model", "vit_nano_patch2_8", "img_size=1000", "device=cpu", "--no-pretrained") == 2
    assert re.search(r"^error: .*250,000 tokens.*smaller img_size$", capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize("name", ["x" * 5000, "~nouser", "~nouser/photos", "wds:" + "x" * 5000, "wds:~nouser/a"])
@pytest.mark.parametrize(
    "command",
    [
        ["train", "NAME"],
        ["train", "DATA", "--out", "NAME"],
        ["train", "--resume", "NAME"],
        ["train", "DATA", "--recipe", "NAME"],
        ["train", "DATA", "--weights", "NAME"],
        ["train", "DATA", "--teacher", "NAME"],
        ["evaluate", "NAME", "DATA"],
        ["evaluate", "MODEL", "NAME"],
        ["predict", "NAME", "DATA"],
        ["predict", "MODEL", "NAME"],
        ["embed", "MODEL", "NAME"],
        ["explain", "MODEL", "NAME"],
        ["doctor", "NAME"],
        ["recommend", "NAME"],
        ["report", "NAME"],
    ],
)
def test_names(
    name: str, command: list[str], trained: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if "--out" in command:
        if not name.startswith("x"):
            pytest.skip("a folder may have this name")
        command = [*command, *TINY]
    words = {"NAME": name, "DATA": str(trained[0]), "MODEL": str(trained[1])}
    assert run(*[words.get(word, word) for word in command]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) >= 1
    assert "bug" not in lines[-1]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"crop_pct": 1e-300},
        {"size": [10**9, 10**9]},
        {"size": [1, 1]},
        {"size": [1, 8]},
        {"size": [8.5, 8]},
        {"mean": [1e300] * 3},
        {"std": [1e-300] * 3},
        {"channels": 10**6},
    ],
)
def test_preprocessing_without_sense(
    change: dict[str, object], trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(trained[1], folder)
    text = (folder / "config.json").read_text()
    config = json.loads(text)
    place = next(
        value
        for value in walk(config)
        if isinstance(value, dict) and {"mean", "std", "crop_pct", "size"} <= value.keys()
    )
    place |= change
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "SHA256SUMS").unlink()
    assert run("predict", folder, trained[0]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "bug" not in err
    assert len(err.splitlines()) < 30


def walk(value: object) -> list[object]:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value, *(found for each in inside for found in walk(each))]


def test_pipes_are_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "a.tar")
    os.mkfifo(tmp_path / "a.parquet")
    for data in (f"wds:{tmp_path}/a.tar", f"wds:{tmp_path}", f"wds:{tmp_path}/*.tar"):
        assert run("train", data) == 2
        assert "Traceback" not in capsys.readouterr().err
    os.makedirs(tmp_path / "d/ant")
    os.mkfifo(tmp_path / "d/ant/0.png")
    assert run("doctor", tmp_path / "d") == 2
    assert run("predict", "vit_nano_patch2_8", tmp_path / "d") == 2
