"""`vitrail export`: exit status, table and JSON."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import vitrail
from deploy.digit_models import digits_vit
from vitrail.cli import main


def call(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as status:
        main(["export", *arguments])
    out, err = capsys.readouterr()
    return int(status.value.code or 0), out, err


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(digits_vit().save(tmp_path_factory.mktemp("models") / "digits"))


def test_table_json_and_refusal(model: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vitrail.deploy.trials.CANDIDATES", ())
    options = ("--target", "onnx", "--precision", "fp32", "--check", "digits")
    status, out, err = call(capsys, model, *options, "--min-speedup", "0")
    assert status == 0, err
    assert "top-1, %" in out
    assert "kept" in out
    assert out.rstrip().endswith("page    exports/digits/export.html")
    assert vitrail.load(tmp_path / "exports" / "digits").record.source["name"] == model
    status, out, err = call(capsys, model, *options, "--min-speedup", "1000", "--json", "--out", "other")
    assert status == 3
    (row,) = json.loads(out)
    assert row["accepted"] is False
    assert row["path"] is None
    assert "1000x" in row["reason"]
    assert "refused" in err
    assert not (tmp_path / "other").exists()


def test_mistakes(model: str, tmp_path: Path, capsys: Any) -> None:
    for arguments, fact in (
        (("--precision", "int8"), "--data"),
        (("--target", "tflite"), "tflite"),
        (("epochs=3",), "--distill"),
        (("--out", str(tmp_path)), "not an export"),
        (("--check", "digitss"), "digits"),
    ):
        status, _, err = call(capsys, model, *(arguments if "--out" in arguments else ("--out", "x", *arguments)))
        assert (status, err.count("\n")) == (2, 1), err
        assert fact in err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM")
def test_sigterm_leaves_nothing(model: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vitrail", "export", model, "--check", "digits", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.*.tmp/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.iterdir()), "it has not begun"
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    assert list(tmp_path.iterdir()) == []
