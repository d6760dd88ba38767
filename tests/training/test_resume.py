"""Runs that are stopped, in every way there is, and go on as if nothing had been."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from training import tiny
from training.runs import KEYS, assert_same, outcome, run
from vitrail.errors import ConfigError, RunError
from vitrail.training.checkpoints.checkpoint import load_checkpoint
from vitrail.training.engine.interrupt import Stopped
from vitrail.training.engine.trainer import Trainer
from vitrail.training.run import train
from vitrail.training.session import Session


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


def test_the_same_run_twice_is_the_same(tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(tmp_path / name)
    assert_same(outcome(tmp_path / "one"), outcome(tmp_path / "two"))


class Killed(BaseException):
    """Stands for the end of the process: nothing may tidy up after it but what tidies up after a kill, too."""


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int) -> None:
    """Raise Killed in the given call, from 1, of a method."""
    original, calls = getattr(owner, name), []

    def patched(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return original(self, *args)

    monkeypatch.setattr(owner, name, patched)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run leaves when nothing interrupts it."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tiny.add_variant(patch)
        run(folder)
    return outcome(folder)


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        *[(Trainer, "step", call) for call in (1, 4, 6, 12)],  # 12 steps in all; a checkpoint after each third
        *[(Session, "_validate", call) for call in (1, 3)],
        *[(Session, "_end_epoch", call) for call in (2, 3)],
        (Session, "save", 2),
        (Session, "final_evaluation", 1),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(
    owner: type, name: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_at(patch, owner, name, call)
        with pytest.raises(Killed):
            run(folder)
    assert not (folder / "summary.json").exists()
    train(tiny.dataset(), resume=folder, progress=False)
    assert_same(outcome(folder), whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_tells_how_to_go_on(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, before = tmp_path / "run", signal.getsignal(number)
    original = Trainer.step

    def step(self: Trainer, batch: Any) -> None:
        if self.state.steps == 6:
            os.kill(os.getpid(), number)
        original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(Stopped) as stopped:
            train(tiny.dataset(), out=folder, **KEYS)
    assert f"vitrail train --resume {folder}" in str(stopped.value)
    assert stopped.value.signal == number
    assert str(stopped.value) in capsys.readouterr().err.replace("\n", "")
    assert signal.getsignal(number) == before
    found = load_checkpoint(folder / "checkpoint")
    assert found is not None
    assert found.record["state"]["steps"] == 7
    train(tiny.dataset(), resume=folder, progress=False)
    assert_same(outcome(folder), whole)


def test_going_on_is_refused_where_it_would_be_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    with pytest.raises(RunError, match=r"config\.toml"):
        train(tiny.dataset(), resume=folder, progress=False)
    with monkeypatch.context() as patch:
        kill_at(patch, Trainer, "step", 5)
        with pytest.raises(Killed):
            run(folder)
    with pytest.raises(ConfigError, match=r"epochs=2\.4"):
        train(tiny.dataset(), resume=folder, epochs=5, progress=False)
    other = tiny.dataset()
    other.splits["train"] = tiny.images(53, 0)
    with pytest.raises(RunError, match=f"{folder}.*images"):
        train(other, resume=folder, progress=False)
    with pytest.raises(RunError, match=f"--resume {folder}"):
        run(folder)
    train(tiny.dataset(), resume=folder, progress=False, workers=1)
    with pytest.raises(RunError, match="is finished"):
        train(tiny.dataset(), resume=folder, progress=False)
    with pytest.raises(RunError, match="finished run"):
        run(folder)


@pytest.mark.parametrize(
    "change", [("lr = 0.01", "lr = 0.02"), ("seed = 0", "seed = 1"), ("mixup = 0.4", ""), ("# sha256", "# md5")]
)
def test_a_config_that_was_edited_is_refused(
    change: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_at(patch, Trainer, "step", 2)  # before the first checkpoint
        with pytest.raises(Killed):
            run(folder)
    text = (folder / "config.toml").read_text()
    assert change[0] in text
    (folder / "config.toml").write_text(text.replace(*change, 1))
    with pytest.raises(RunError, match=r"config\.toml was changed after the run was started") as error:
        train(tiny.dataset(), resume=folder, progress=False)
    assert str(error.value).isprintable()
    (folder / "config.toml").write_text(text.replace("peak learning rate", "a comment"))
    train(tiny.dataset(), resume=folder, progress=False, workers=1)


def test_a_damaged_checkpoint_is_told_and_the_older_one_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_at(patch, Trainer, "step", 8)
        with pytest.raises(Killed):
            run(folder)
    assert [path.name for path in sorted((folder / "checkpoint").iterdir())] == ["step-00000003", "step-00000006"]
    (folder / "checkpoint" / "step-abc").mkdir()
    path = folder / "checkpoint" / "step-00000006" / "ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # the lowest bits of a weight
    path.write_bytes(bytes(content))
    train(tiny.dataset(), resume=folder)
    told = capsys.readouterr().err.replace("\n", "")
    assert "ema.safetensors is damaged" in told
    assert "resuming from the older one of step 3" in told
    assert_same(outcome(folder), whole)


_VICTIM = """
import itertools, sys, threading
sys.path.insert(0, {tests!r})
from training import tiny
from training.runs import KEYS
from vitrail.training.engine.trainer import Trainer
from vitrail.training.run import train
tiny.VARIANTS[tiny.VARIANT.name] = tiny.VARIANT
keys = {{**KEYS, "epochs": 30, "checkpoint_every": 4}}
step = Trainer.step
calls = itertools.count(1)
def limited(self, batch):
    step(self, batch)
    if next(calls) == {limit!r}:
        threading.Event().wait()
Trainer.step = limited
if {resume!r}:
    train(tiny.dataset(), resume={out!r}, progress=False)
else:
    train(tiny.dataset(), out={out!r}, progress=False, **keys)
"""


@pytest.mark.slow
def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    """A process is killed, again and again until a run of 150 steps is finished. Each stops after 30 steps, so at
    least four are killed, however fast the machine is."""

    def start(out: Path, limit: int | None = None) -> subprocess.Popen[bytes]:
        resume = (out / "config.toml").exists()
        code = _VICTIM.format(tests=str(Path(__file__).parents[1]), out=str(out), resume=resume, limit=limit)
        with (tmp_path / "errors.txt").open("a") as errors:
            return subprocess.Popen([sys.executable, "-c", code], stderr=errors)

    assert start(tmp_path / "reference").wait() == 0
    draw, killed, folder = random.Random(0), 0, tmp_path / "run"
    while not (folder / "summary.json").exists():
        process, before = start(folder, limit=30), sorted(folder.glob("checkpoint/step-*"))
        while process.poll() is None and sorted(folder.glob("checkpoint/step-*")) == before:
            time.sleep(0.005)  # it has written a new checkpoint, so every start makes progress
        time.sleep(draw.random() * 0.5)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed > 3, (tmp_path / "errors.txt").read_text()
    assert_same(outcome(folder), outcome(tmp_path / "reference"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment(processes: int) -> None:
    """Of each kind of moment one: any, within a step, in a validation, in the writing of a checkpoint."""
    script = Path(__file__).parents[2] / "scripts" / "kill_and_resume.py"
    command = [sys.executable, str(script), "4", "--seed", "7", "--processes", str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "4 of 4 bit-identical"
