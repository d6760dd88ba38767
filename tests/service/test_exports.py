"""An export that is served by the command, in a process in which torch cannot be imported."""

import http.client
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference.export_files import make_export
from service.running import encoded
from vitrail.classifier import load

# A module that is None in sys.modules raises ImportError when it is imported.
COMMAND = """
import sys
sys.modules["torch"] = None
from vitrail.cli import main
main(["serve", sys.argv[1], "--port", "0", "--no-access-log"])
"""


@pytest.fixture(params=("onnx", "openvino"))
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """The folder of an export, and the port of its service."""
    folder = make_export(tmp_path / "tiny", request.param)
    with subprocess.Popen([sys.executable, "-c", COMMAND, str(folder)], stderr=subprocess.PIPE, text=True) as process:
        try:
            yield folder, _port(process)
        finally:
            process.terminate()
    assert process.returncode == -signal.SIGTERM  # uvicorn ends by the signal, after the last answer


def _port(process: subprocess.Popen[str]) -> int:
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
            return int(found[1])
    raise AssertionError("it does not say where it listens")


def _ask(port: int, data: bytes) -> tuple[int, dict[str, object]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    for _ in range(500):
        try:
            connection.request("POST", "/predict?top=10", data, {"Content-Type": "image/png"})
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, json.loads(body)


def test_answers_are_those_of_predict_and_need_no_torch(served: tuple[Path, int], tmp_path: Path) -> None:
    folder, port = served
    classifier = load(folder)
    for seed in range(8):
        path = tmp_path / f"{seed}.png"
        path.write_bytes(encoded(seed))
        (expected,) = classifier.predict(path, top=10)
        status, body = _ask(port, path.read_bytes())
        assert status == 200
        assert [each["label"] for each in body["top"]] == [each.label for each in expected.top]  # type: ignore[attr-defined]
        scores = [each["score"] for each in body["top"]]  # type: ignore[attr-defined]
        assert scores == pytest.approx([each.score for each in expected.top], abs=1e-6)
