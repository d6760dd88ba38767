"""What is printed: no control characters from outside; and no stream behind it ends a run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from vitrail.cli import main
from vitrail.training.checkpoints.checkpoint import load_checkpoint
from vitrail.utils.console import PlainConsole
from vitrail.utils.streams import lossy

EVIL = "\x1b]0;owned\x07\x9b31m\u202egnp"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")
TINY = ["--model", "vit_nano_patch2_8", "--img-size", "8", "batch_size=8", "device=cpu"]
VITRAIL = [sys.executable, "-m", "vitrail"]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, one with an evil name, evil file names, and an unreadable file."""
    root = tmp_path_factory.mktemp("photos")
    for c, name in enumerate((f"ant{EVIL}", "bee")):
        (root / name).mkdir()
        for number in range(12):
            Image.new("RGB", (8, 8), (number * 20, 200 * c, 40)).save(root / name / f"{number}{EVIL}.png", "PNG")
    (root / "bee" / f"broken{EVIL}.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs") / "run"
    with contextlib.redirect_stderr(io.StringIO()) as err, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert run("train", photos, "--out", folder, "--epochs", "1", *TINY) == 0, err.getvalue()
    return folder, err.getvalue()


def test_training_prints_no_control_characters(trained: tuple[Path, str]) -> None:
    assert "broken\\x1b]0;owned" in trained[1]
    assert not CONTROL.search(trained[1])


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "RUN", "PHOTOS"],
        ["predict", "RUN", "PHOTOS", "--json"],
        ["evaluate", "RUN", "PHOTOS", "--split", "train"],
        ["evaluate", "RUN", "PHOTOS", "--split", "train", "--json"],
        ["doctor", "PHOTOS", "--forecast-model", "none"],
        ["predict", "RUN", f"nowhere{EVIL}.png"],
        ["predict", f"nowhere{EVIL}", "PHOTOS"],
        ["evaluate", "RUN", f"nowhere{EVIL}"],
        ["--debug", "predict", f"nowhere{EVIL}", "PHOTOS"],
        ["train", "PHOTOS", f"l{EVIL}r=3"],
        ["predict", f"timm:{EVIL}", "PHOTOS"],
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_command_prints_control_characters(
    command: list[str], photos: Path, trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(*[{"RUN": str(trained[0]), "PHOTOS": str(photos)}.get(word, word) for word in command])
    out, err = capsys.readouterr()
    assert out or err
    assert not CONTROL.search(out), command
    assert not CONTROL.search(err), command
    if command[-1] == "--json" and command[0] == "predict":
        paths = {json.loads(line)["path"] for line in out.splitlines()}
        assert paths == {str(path) for path in photos.rglob("*.png")}


def test_what_a_server_answers_is_printed_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    import http.server
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404, f"gone{EVIL.encode('utf-8').decode('latin-1')}")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert run("train", f"wds:http://127.0.0.1:{server.server_port}/a.tar") == 2
        server.shutdown()
    err = capsys.readouterr().err
    assert "gone\\x1b" in err
    assert not CONTROL.search(err)


@pytest.mark.slow
@pytest.mark.parametrize("stderr", ["full", "broken pipe", "closed terminal"])
def test_nothing_behind_stderr_ends_a_run(stderr: str, photos: Path, tmp_path: Path) -> None:
    if stderr == "full" and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    command = [*VITRAIL, "train", str(photos), "--out", str(tmp_path / "run"), "--epochs", "2", *TINY]
    if stderr == "full":
        end = os.open("/dev/full", os.O_WRONLY)
    elif stderr == "broken pipe":
        reader, end = os.pipe()
        os.close(reader)
    else:
        terminal, end = pty.openpty()
        os.close(terminal)
    try:
        done = subprocess.run(command, stdout=end, stderr=end, check=False)
    finally:
        os.close(end)
    assert done.returncode == 0
    assert (tmp_path / "run/summary.json").exists()


def test_errors_of_the_stream_of_messages_are_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    stream = lossy(Broken())
    print("lost", file=stream, flush=True)
    PlainConsole(file=stream).print("lost")
    closed = io.StringIO()
    closed.close()
    print("lost", file=lossy(closed), flush=True)
    PlainConsole(file=lossy(sys.stdout)).print(f"kept{EVIL}")
    assert capsys.readouterr().out == "kept\\x1b]0;owned\\x07\\x9b31m\\u202egnp\n"


@pytest.mark.slow
def test_a_full_disk_behind_stdout_is_one_line(photos: Path, trained: tuple[Path, str]) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        command = [*VITRAIL, "predict", str(trained[0]), str(photos / "bee"), "--csv"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "space" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True])
def test_a_hang_up_saves_the_run(ignored: bool, tmp_path: Path) -> None:
    """Sent twice, as a closed terminal does. Under nohup it is ignored."""
    folder = tmp_path / "run"
    command = [*VITRAIL, "train", "digits", "--out", str(folder), "--epochs", "500", "checkpoint_every=2", "device=cpu"]
    if ignored:
        nohup = shutil.which("nohup")
        assert nohup is not None
        command = [nohup, *command]
    not_ignored = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=not_ignored) as process:
        end = time.monotonic() + 120
        while not list(folder.glob("checkpoint/step-*")) and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.01)
        process.send_signal(signal.SIGHUP)
        if ignored:
            time.sleep(1)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == (143 if ignored else 129), err
    assert "vitrail train --resume" in err
    assert load_checkpoint(folder / "checkpoint") is not None
