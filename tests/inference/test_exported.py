"""Exports on the inference engine, in ONNX Runtime and OpenVINO. Oracle: the matrix that the file contains."""

import builtins
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from sklearn.datasets import load_digits

from inference.export_files import GREY, WEIGHT, expected_features, make_export
from vitrail.errors import DeviceError, ExportError, ModelError
from vitrail.inference import onnx_runtime, threads
from vitrail.inference.engine import Engine
from vitrail.inference.export_folder import ExportRecord
from vitrail.inference.exported import SESSIONS, ExportRuntime, open_runtime
from vitrail.inference.onnx_runtime import OnnxSession
from vitrail.inference.runtime import Runtime
from vitrail.utils.memory import mapped_spans

DIGITS = (load_digits().images[:23] * 15).astype(np.uint8)
FEATURES = expected_features(DIGITS)
LOGITS = FEATURES @ WEIGHT


WITHOUT_TORCH = [target for target in SESSIONS if target != "pt2"]  # of which: tests/deploy/test_export.py


@pytest.fixture(scope="module", params=WITHOUT_TORCH)
def runtime(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExportRuntime:
    return open_runtime(make_export(tmp_path_factory.mktemp("exports") / request.param, request.param), 1)


@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_the_engine_runs_an_export(runtime: ExportRuntime, batch_size: int | None, tmp_path: Path) -> None:
    as_runtime: Runtime = runtime
    assert (as_runtime.name, as_runtime.preprocess, as_runtime.num_classes) == ("linear", GREY, 10)
    inputs: list[Any] = [*DIGITS[:20], tmp_path / "gone.png", *DIGITS[20:]]
    for features, expected in ((False, LOGITS), (True, FEATURES)):
        batches = list(Engine(runtime).stream(inputs, batch_size, features=features))
        found = np.concatenate([batch.outputs for batch in batches])
        assert [error for batch in batches for error in batch.errors if error] == ["does not exist"]
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_threads_share_a_runtime(runtime: ExportRuntime) -> None:
    """Each call gets its own images' logits, which later calls do not overwrite."""
    batches = [DIGITS[k : k + 1 + k % 3, :, :, None] for k in range(20)] * 20
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(runtime.logits, batches))
    for k, logits in enumerate(found):
        assert np.abs(logits - LOGITS[k % 20 : k % 20 + len(logits)]).max() <= 1e-5 * np.abs(LOGITS).max()


@pytest.mark.parametrize("target", WITHOUT_TORCH)
@pytest.mark.parametrize(
    ("change", "kind", "facts"),
    [
        ({"class_names": tuple("abc")}, ModelError, r"10.* 3 class names"),
        ({"num_features": 63}, ModelError, r"64.* 63 features"),
        ({"preprocess": GREY.replace(size=(9, 8))}, ModelError, r"8, 8, 1\).*9, 8, 1\)"),
        ({}, ExportError, "not a model"),
    ],
)
def test_what_does_not_match_the_model_is_named(
    target: str, change: dict[str, Any], kind: type[Exception], facts: str, tmp_path: Path
) -> None:
    folder = make_export(tmp_path / "e", target, **change)
    record = ExportRecord.read(folder)
    if not change:
        (folder / record.model).write_text("nonsense")
        record.write(folder)
    with pytest.raises(kind, match=rf"{record.model}.*{facts}") as error:
        open_runtime(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("target", "module"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_package_is_named(target: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_export(tmp_path / "e", target)
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == module:
            raise ImportError
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DeviceError, match=rf"model\.\w+ .*-e .\.\[{target}\]"):
        open_runtime(folder)


def test_openvino_computes_in_the_precision_of_the_export(tmp_path: Path) -> None:
    """Left to itself, it computes fp32 models in bfloat16 on a CPU that has it."""
    import openvino

    from vitrail.inference.openvino_runtime import openvino_core

    def hint(precision: str) -> str:
        session: Any = open_runtime(make_export(tmp_path / precision, "openvino", precision=precision)).session
        (found,) = {str(session._program(batch)._model.get_property("INFERENCE_PRECISION_HINT")) for batch in (None, 1)}
        return found

    assert hint("fp32") == hint("int8") == str(openvino.Type.f32)
    if "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        assert hint("bf16") == str(openvino.Type.bf16)
    else:
        with pytest.warns(UserWarning, match="float32"):
            assert hint("bf16") == str(openvino.Type.f32)


@pytest.mark.parametrize(("precision", "compiled"), [("fp32", [None]), ("int8", [1, None])])
def test_openvino_has_a_model_of_its_own_for_single_images(precision: str, compiled: list[Any], tmp_path: Path) -> None:
    runtime = open_runtime(make_export(tmp_path / "a", "openvino", precision=precision))
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    single = np.concatenate([runtime.logits(image[None]) for image in images])
    np.testing.assert_allclose(runtime.logits(images), single, atol=1e-5)
    np.testing.assert_allclose(runtime.features(images[:1]), expected_features(images[:1, :, :, 0]), atol=1e-5)
    session: Any = runtime.session
    assert list(session._programs) == compiled


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_openvino_releases_the_pages_of_its_own_weights_alone(tmp_path: Path) -> None:
    folder = make_export(tmp_path / "a", "openvino")
    sessions: list[Any] = [open_runtime(folder).session for _ in range(2)]
    assert all(session._weights for session in sessions)
    assert sessions[0]._weights.isdisjoint(sessions[1]._weights)
    assert sessions[0]._weights | sessions[1]._weights <= mapped_spans(folder / "model.bin")


def test_a_signal_after_openvino_is_handled(tmp_path: Path) -> None:
    """Also after exports, and another Core as NNCF makes them, have come and gone."""
    program = """
import gc, os, signal, sys
import openvino
from vitrail.inference.exported import open_runtime
runtimes = [open_runtime(folder) for folder in sys.argv[1:]]
other = openvino.Core()
other.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
del runtimes
gc.collect()
del other
gc.collect()
signal.signal(signal.SIGINT, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGINT)
"""
    folders = [str(make_export(tmp_path / name, "openvino")) for name in "abc"]
    done = subprocess.run([sys.executable, "-c", program, *folders], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_threads_are_those_asked_for_the_exports_or_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Counted(SESSIONS["onnx"]):  # type: ignore[misc, valid-type]
        def __init__(self, path: Path, threads: int, precision: str) -> None:
            seen.append(threads)
            super().__init__(path, threads, precision)

    monkeypatch.setitem(SESSIONS, "onnx", Counted)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    open_runtime(make_export(tmp_path / "a", threads=2), 1)
    open_runtime(tmp_path / "a")
    open_runtime(make_export(tmp_path / "b"))
    assert seen == [1, 2, 3]


def test_default_threads_are_the_physical_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("", "0", "4,2"):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
        monkeypatch.setattr(threads, "_siblings", lambda cpu: f"{cpu % 2},{cpu % 2 + 2}")
        assert threads.default_threads() == 2
        monkeypatch.setattr(threads, "_siblings", str)
        assert threads.default_threads() == 4
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert threads.default_threads() == 7


class Meeting:
    """A session whose calls wait until `size` of them have begun, in this session or another one of the meeting."""

    def __init__(self, session: Any, barrier: threading.Barrier) -> None:
        self._session, self._barrier, self.calls = session, barrier, 0

    def run(self, *arguments: Any) -> Any:
        self.calls += 1
        self._barrier.wait(10)
        return self._session.run(*arguments)


@pytest.mark.parametrize(
    ("threads_of_it", "callers", "limit", "change", "single"),
    [
        (2, 2, 1 << 30, False, True),
        (4, 4, 1 << 30, False, True),
        (4, 3, 1 << 30, False, False),  # fewer callers than cores
        (1, 4, 1 << 30, False, False),
        (2, 2, 0, False, False),  # a large model
        (2, 2, 1 << 30, True, False),  # its files have changed
    ],
)
def test_calls_at_once_are_computed_by_one_core_each(
    threads_of_it: int,
    callers: int,
    limit: int,
    change: bool,
    single: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a second session, with the same results."""
    folder = make_export(tmp_path / "e", threads=threads_of_it)
    monkeypatch.setattr(onnx_runtime, "_TWO_SESSIONS", limit)
    images = np.random.default_rng(0).integers(0, 256, (3 * callers, 1, 8, 8, 1), np.uint8)
    runtime, barrier = open_runtime(folder), threading.Barrier(callers)
    alone = [runtime.logits(each) for each in images]
    session, opened = runtime.session, []
    assert isinstance(session, OnnxSession)
    if change:
        os.utime(folder / "model.onnx", (0, 0))
    open_session = session._open

    def opens(number: int) -> Meeting:
        opened.append((number, Meeting(open_session(number), barrier)))
        return opened[-1][1]

    monkeypatch.setattr(session, "_open", opens)
    session._together = together = Meeting(session._together, barrier)
    with ThreadPoolExecutor(callers) as pool:
        found = list(pool.map(runtime.logits, images))
    assert all(map(np.array_equal, found, alone))
    assert together.calls + sum(each.calls for _, each in opened) == len(images)
    if single:
        ((number, one),) = opened
        assert number == 1
        assert one.calls >= 3
    else:
        assert together.calls == len(images)
    assert not session._running


def test_threads_sleep_between_calls(tmp_path: Path) -> None:
    """onnxruntime's own wait for work for 30 ms and more, and take the cores from others meanwhile."""
    options = onnx_runtime._options(onnxruntime, 2)
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert int(options.get_session_config_entry("session.intra_op.spin_duration_us")) > 0  # within a call
    runtime, took = open_runtime(make_export(tmp_path / "e", threads=2)), []
    images = np.zeros((4096, 8, 8, 1), np.uint8)  # so many that both threads compute
    for _ in range(5):
        runtime.logits(images)
        begin = time.process_time()
        time.sleep(0.1)
        took.append(time.process_time() - begin)
    assert min(took) < 0.01  # other threads of this process may be at work in some
