"""An export that is served by the command, in a process that can import only what docker/Dockerfile installs."""

import http.client
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from inference.export_files import make_export
from service.running import encoded
from vitrail.classifier import load

# A module that is None in sys.modules raises ImportError when it is imported.
COMMAND = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[2].split(",")))
from vitrail.cli import main
main(["serve", sys.argv[1], "--port", "0", "--no-access-log"])
"""
distributions = cache(importlib.metadata.packages_distributions)  # takes a second
DOCKERFILE = (Path(__file__).parents[2] / "docker/Dockerfile").read_text()


def packages_of_image(target: str) -> set[str]:
    """What docker/Dockerfile installs for an export to this target, with what these packages require."""
    (common,) = re.findall(r"constraints\.txt \\\n +(.+)", DOCKERFILE)
    (runtime,) = re.findall(rf' {target}\) runtime="?(.+?)"? ;;', DOCKERFILE)
    *alone, runtime = runtime.split()  # with --no-deps
    found, pending = {runtime} if alone else set(), [*common.split(), *([] if alone else [runtime])]
    while pending:
        if (name := canonicalize_name(pending.pop())) not in found:
            found.add(name)
            requirements = map(Requirement, importlib.metadata.requires(name) or ())
            pending += [each.name for each in requirements if not each.marker or each.marker.evaluate({"extra": ""})]
    return found


def absent_modules(target: str) -> set[str]:
    """Modules that are installed here and not in the image."""
    installed = packages_of_image(target) | {"vitrail"}
    modules = distributions().items()
    absent = {name for name, packages in modules if not installed & {canonicalize_name(each) for each in packages}}
    return absent - sys.stdlib_module_names - {"vitrail"}


@pytest.fixture(params=("onnx", "openvino"))
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """The folder of an export, and the port of its service, whose home folder stays empty."""
    folder, home = make_export(tmp_path / "tiny", request.param), tmp_path / "home"
    home.mkdir()
    arguments = [sys.executable, "-c", COMMAND, str(folder), ",".join(absent_modules(request.param))]
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(home)}
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield folder, _port(process)
        finally:
            process.terminate()
    assert process.returncode == -signal.SIGTERM  # uvicorn ends by the signal, after the last answer
    assert not list(home.rglob("*"))  # onnxruntime and openvino-telemetry would keep there what they report


def _port(process: subprocess.Popen[str]) -> int:
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
            return int(found[1])
    raise AssertionError("it does not say where it listens")


def _ask(port: int, data: bytes) -> tuple[int, dict[str, object]]:
    for _ in range(500):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("POST", "/predict?top=10", data, {"Content-Type": "image/png"})
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, json.loads(body)


def test_absent_modules() -> None:
    assert absent_modules("onnx") >= {"torch", "sklearn", "openvino", "pytest"}
    assert absent_modules("openvino") >= {"torch", "onnxruntime", "openvino_telemetry"}
    assert not absent_modules("openvino") & {"openvino", "numpy", "fastapi", "starlette"}


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
