"""`vitrail recommend`: the table, the choice, the exit status."""

import json
from pathlib import Path
from typing import Any

import pytest

from vitrail.cli import main
from vitrail.recommendation import recommend as module
from vitrail.recommendation.measurement import Measurement, Subject
from vitrail.recommendation.recommend import recommend


@pytest.fixture(autouse=True)
def costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without measurements, which take seconds."""
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))

    def pretend(subject: Subject) -> Measurement:
        return Measurement(1.25 if subject.model == "vit_nano_patch2_8" else 0.75, 256.0)

    monkeypatch.setattr(module, "measure", pretend)


def call(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as status:
        main(["recommend", *arguments])
    out, err = capsys.readouterr()
    return int(status.value.code or 0), out, err


def test_text(capsys: Any) -> None:
    status, out, err = call(capsys, "digits")
    assert status == 0
    assert "vitrail train digits --model vit_nano_patch2_8 --img-size 8\n" in out
    assert "runner-up: resnet20_32 at 8x8: 0.75 ms" in out
    assert "measuring vit_nano_patch2_8" in err


def test_json_is_that_of_the_library(capsys: Any) -> None:
    status, out, _ = call(capsys, "digits", "--json", "--max-latency-ms", "1")
    assert status == 0
    assert json.loads(out) == recommend("digits", max_latency_ms=1).to_dict()
    assert json.loads(out)["choice"]["model"] == "resnet20_32"


def test_nothing_within_the_limits_is_status_3(capsys: Any) -> None:
    status, out, err = call(capsys, "digits", "--json", "--max-memory-mb", "10")
    assert status == 3
    assert json.loads(out)["choice"] is None
    assert [line for line in err.splitlines() if line.startswith("error: no candidate is within the limits")]
    assert call(capsys, "digits", "--max-latency-ms", "-1")[0] == 2
