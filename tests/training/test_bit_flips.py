"""One bit of any file of a run, flipped: noticed, or without effect; never another result.

250 flips of a run that was stopped, which is then resumed, and 250 of a finished one, whose model then predicts.
"""

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training import tiny
from training.runs import KEYS, outcome
from vitrail.classifier import Classifier, load
from vitrail.errors import VitrailError
from vitrail.training.checkpoints.run_folder import RunFolder
from vitrail.training.engine.trainer import Trainer
from vitrail.training.monitoring import report
from vitrail.training.run import train

FLIPS = 250
SETTINGS = {**KEYS, "epochs": 1.4, "checkpoint_every": 2}  # 7 steps, killed in the sixth


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A stopped run and a finished one, of the same settings."""
    folder, step = tmp_path_factory.mktemp("flips"), Trainer.step
    with pytest.MonkeyPatch.context() as patch:
        tiny.add_variant(patch)
        train(tiny.dataset(), out=folder / "finished", progress=False, **SETTINGS)

        def dies(self: Trainer, batch: Any) -> None:
            if self.state.steps == 5:
                raise Killed
            step(self, batch)

        with patch.context() as inner:
            inner.setattr(Trainer, "step", dies)
            with pytest.raises(Killed):
                train(tiny.dataset(), out=folder / "stopped", progress=False, **SETTINGS)
        # The page explains images, which takes most of a resumed run's time, and is not what is compared.
        patch.setattr("vitrail.training.run.write_report", lambda run: run.report)
        patch.setattr("vitrail.training.run.report_details", lambda *_: {})
        yield folder / "stopped", folder / "finished"


def flips(run: Path, count: int, seed: int) -> Iterator[tuple[Path, int, int]]:
    """File, byte and bit: each file equally often, and each byte of it with the same probability."""
    rng = np.random.default_rng(seed)
    files = sorted(path.relative_to(run) for path in run.rglob("*") if path.is_file() and path.stat().st_size)
    for index in range(count):
        name = files[index % len(files)]
        yield name, int(rng.integers((run / name).stat().st_size)), int(rng.integers(8))


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(bytes(content))


def assert_line(error: VitrailError) -> None:
    assert str(error).isprintable()
    assert len(str(error)) < 1000


@pytest.mark.slow
def test_a_stopped_run(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped, finished = runs
    expected = outcome(finished)
    noticed = fallen_back = unaffected = 0
    for index, (name, position, bit) in enumerate(flips(stopped, FLIPS, 1)):
        where, what = tmp_path / str(index), f"{name}, byte {position}, bit {bit}"
        shutil.copytree(stopped, where)
        flip(where / name, position, bit)
        capsys.readouterr()
        try:
            train(tiny.dataset(), resume=where, workers=0)
        except VitrailError as error:
            assert_line(error)
            noticed += 1
        else:
            found = outcome(where)
            for part, tensors in expected["tensors"].items():
                assert tiny.same(found["tensors"][part], tensors), what
            assert found["model"] == expected["model"], what
            assert found["metrics"] == expected["metrics"], what
            assert found["summary"] == expected["summary"], what
            told = "resuming from the older one" in capsys.readouterr().err
            assert told or "checkpoint" not in name.parts or "step-00000004" not in name.parts, what
            fallen_back += told
            unaffected += not told
        shutil.rmtree(where)
    assert noticed + fallen_back + unaffected == FLIPS
    assert noticed > 0  # the settings in config.toml
    assert fallen_back > FLIPS / 4
    print(f"{FLIPS} flips: {noticed} refused, {fallen_back} resumed from an older checkpoint, {unaffected} no effect")


def answers(classifier: Classifier) -> dict[str, Any]:
    """What a person gets from a classifier."""
    images = list(tiny.images(6, 3).images)
    return {
        "predictions": [each.to_dict() for each in classifier.predict(images)],
        "names": classifier.class_names,
        "report": classifier.report,
        "features": classifier.embed(images).tobytes(),
        "notes": classifier.notes,
    }


@pytest.mark.slow
def test_a_finished_run(runs: tuple[Path, Path], tmp_path: Path) -> None:
    _, finished = runs
    expected = answers(load(finished))
    page = json.dumps(report.report_values(RunFolder(finished)), default=str)
    noticed = unaffected = 0
    for index, (name, position, bit) in enumerate(flips(finished, FLIPS, 2)):
        where, what = tmp_path / str(index), f"{name}, byte {position}, bit {bit}"
        shutil.copytree(finished, where)
        flip(where / name, position, bit)
        told = 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found = answers(load(where))
            except VitrailError as error:
                assert_line(error)
                told += 1
            else:
                told += len(caught)
                assert caught or found == expected, what
        try:
            RunFolder(where).check()
            values = report.report_values(RunFolder(where))
        except VitrailError as error:
            assert_line(error)
            told += 1
        else:
            assert json.dumps(values, default=str).replace(str(where), str(finished)) == page, what
        noticed += bool(told)
        unaffected += not told
        shutil.rmtree(where)
    assert noticed > FLIPS / 4
    assert torch.isfinite(torch.tensor(expected["predictions"][0]["score"]))
    print(f"{FLIPS} flips: {noticed} noticed, {unaffected} without effect")
