"""Twelve kinds of image files and eight kinds of unreadable ones: every command succeeds and names all eight."""

import json
from pathlib import Path

import pytest

from data.make_folder import BROKEN, GOOD, make_folder
from vitrail.cli import main


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    assert isinstance(left.value.code, int)
    return left.value.code


def test_bad_images_stop_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_folder(tmp_path / "photos", classes=2, per_class=24)
    assert len(set(made.good.values())) == len(GOOD) == 12
    assert len(made.broken) == len(BROKEN) == 8
    bad = set(made.broken)

    options = ["--model", "vit_nano_patch2_8", "--img-size", "8", "--epochs", "2", "batch_size=8"]
    assert run("train", made.root, "--out", tmp_path / "run", *options) == 0
    err = capsys.readouterr().err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert {item["path"] for item in summary["skipped"]} == bad
    assert all(item["reason"] for item in summary["skipped"])
    assert all(f"skipped {path}: " in err for path in bad)

    assert run("evaluate", tmp_path / "run", made.root, "--split", "train", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert {item["path"] for item in record["skipped"]} == bad

    assert run("predict", tmp_path / "run", made.root, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["path"] for line in lines if "error" in line} == bad
    assert {line["path"] for line in lines if "label" in line} == set(made.good)
