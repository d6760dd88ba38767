"""`vitrail train` on signals and on a full disk: the run is saved, and the exit status is that of the signal."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitrail.training.checkpoints.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow
TRAIN = [sys.executable, "-m", "vitrail", "train"]


def stopped_by(number: int, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [*TRAIN, "digits", "--out", str(folder), "--epochs", "500", "checkpoint_every=2", "device=cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 120
        while not list(folder.glob("checkpoint/step-*")) and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(command, process.returncode, "", err)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_run_and_sets_the_exit_status(number: int, status: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = stopped_by(number, folder)
    assert done.returncode == status, done.stderr
    assert f"vitrail train --resume {folder}" in done.stderr.replace("\n", "")
    assert "Traceback" not in done.stderr
    assert load_checkpoint(folder / "checkpoint") is not None
    assert not (folder / "summary.json").exists()


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_space(tmp_path: Path) -> None:
    """The disk is full from the second checkpoint on: files may not grow beyond the first one's size."""
    folder = tmp_path / "run"
    code = (
        "import resource, signal, sys\n"
        "from vitrail.cli import main\n"
        "from vitrail.training.session import Session\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "save, calls = Session.save, []\n"
        "def limited(self):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))\n"
        "    save(self)\n"
        "Session.save = limited\n"
        f"main(['train', 'digits', '--out', {str(folder)!r}, '--epochs', '3', 'checkpoint_every=5', 'device=cpu'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert f"cannot write {folder}" in errors[0]
    assert "Traceback" not in done.stderr
    found = load_checkpoint(folder / "checkpoint")
    assert found is not None
    assert found.record["state"]["steps"] == 5
    again = subprocess.run([*TRAIN, "--resume", str(folder)], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "resumed at epoch" in again.stderr
    assert (folder / "summary.json").exists()


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A file system of two megabytes in memory, where one can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        command = [*TRAIN, "digits", "--out", str(disk / "run"), "--epochs", "3", "checkpoint_every=5", "device=cpu"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert [line for line in done.stderr.splitlines() if "error: " in line and "the disk is full" in line]
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        resume = [*TRAIN, "--resume", str(disk / "run")]
        again = subprocess.run(resume, capture_output=True, text=True, check=False)
        assert again.returncode == 0, again.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)
