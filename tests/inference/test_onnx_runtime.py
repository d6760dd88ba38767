"""ONNX files on the inference engine. Oracle: the file's matrix applied to images normalised by `Preprocess`."""

import builtins
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from inference.onnx_file import onnx_file
from vitrail.data.dataset import ArraySplit
from vitrail.errors import DeviceError, ModelError
from vitrail.evaluation.evaluate import evaluate
from vitrail.images.preprocess import Preprocess
from vitrail.inference.engine import Engine
from vitrail.inference.onnx_runtime import OnnxModel, OnnxRuntime
from vitrail.inference.runtime import Runtime

GREY = Preprocess(size=(8, 8), mean=(0.4,), std=(0.3,), channels=1)
DIGITS = (load_digits().images[:23] * 15).astype(np.uint8)


def normalized() -> np.ndarray:
    return GREY.normalize(torch.from_numpy(DIGITS)[:, None]).flatten(1).numpy()


@pytest.mark.parametrize("shape", [["n", 1, 8, 8], [5, 1, "h", "w"]], ids=["any batch", "batches of 5"])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_the_engine_runs_an_onnx_file(shape: list[Any], batch_size: int | None, tmp_path: Path) -> None:
    weight = onnx_file(tmp_path / "m.onnx", shape, {"preprocess": json.dumps(GREY.to_dict())}, features=True)
    runtime: Runtime = OnnxRuntime(tmp_path / "m.onnx")
    assert (runtime.name, runtime.preprocess, runtime.num_classes, runtime.num_features) == ("m.onnx", GREY, 3, 64)
    inputs: list[Any] = [*DIGITS[:20], tmp_path / "gone.png", *DIGITS[20:]]
    batches = list(Engine(runtime).stream(inputs, batch_size))
    logits = np.concatenate([batch.outputs for batch in batches])
    assert [error for batch in batches for error in batch.errors if error] == ["does not exist"]
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, normalized() @ weight, atol=1e-4)
    features = np.concatenate([batch.outputs for batch in Engine(runtime).stream(inputs, batch_size, features=True)])
    np.testing.assert_array_equal(features, normalized())
    labels = logits.argmax(1).astype(np.int64)
    assert evaluate(runtime, ArraySplit(DIGITS, labels), ("a", "b", "c"), batch_size=batch_size).top1 == 100
    with ThreadPoolExecutor(8) as pool:
        assert all(np.array_equal(found, logits) for found in pool.map(runtime.logits, [DIGITS[..., None]] * 16))


def test_a_file_without_features_gives_logits_only(tmp_path: Path) -> None:
    onnx_file(tmp_path / "m.onnx", ["n", 1, 8, 8])
    runtime = OnnxRuntime(tmp_path / "m.onnx", GREY)
    assert (runtime.num_classes, runtime.num_features) == (3, 0)
    with pytest.raises(ModelError, match=r"m\.onnx .*'features'"):
        list(Engine(runtime).stream(DIGITS[0], features=True))


def test_the_fingerprint_changes_with_weights_and_preprocessing(tmp_path: Path) -> None:
    for name, shape in (("a", ["n", 1, 8, 8]), ("b", ["n", 1, 8, 8]), ("c", [1, 1, 8, 8])):
        onnx_file(tmp_path / name, shape)
    a, b, c = (OnnxRuntime(tmp_path / name, GREY).fingerprint() for name in "abc")
    assert a == b != c
    assert OnnxRuntime(tmp_path / "a").fingerprint() != a


def test_preprocessing_that_the_file_cannot_take(tmp_path: Path) -> None:
    onnx_file(tmp_path / "m.onnx", ["n", 1, 8, 8])
    with pytest.raises(ModelError, match=r"m\.onnx .*1x9x8"):
        OnnxRuntime(tmp_path / "m.onnx", GREY.replace(size=(9, 8)))
    onnx_file(tmp_path / "any.onnx", ["n", 1, "h", "w"])
    with pytest.raises(ModelError, match=r"any\.onnx .*preprocess="):
        OnnxRuntime(tmp_path / "any.onnx")


def test_files_that_are_not_models_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "t.onnx"
    with pytest.raises(ModelError, match=r"t\.onnx does not exist"):
        OnnxModel(file)
    file.write_bytes(b"nonsense")
    with pytest.raises(ModelError, match=r"t\.onnx "):
        OnnxModel(file)
    onnx_file(file, ["n", 64])
    with pytest.raises(ModelError, match=r"\['n', 64\]"):
        OnnxModel(file)
    for metadata in ({"class_names": "a, b"}, {"class_names": "[1]"}, {"preprocess": "{}"}, {"preprocess": "[]"}):
        onnx_file(file, ["n", 1, 8, 8], metadata)
        with pytest.raises(ModelError, match=rf"t\.onnx.* {next(iter(metadata))}") as error:
            OnnxModel(file)
        assert "\n" not in str(error.value)
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DeviceError, match=r"-e .\.\[onnx\]"):
        OnnxModel(file)


def test_an_onnx_file_runs_without_torch(tmp_path: Path) -> None:
    onnx_file(tmp_path / "m.onnx", ["n", 1, 8, 8])
    code = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from vitrail.inference.engine import Engine\n"
        "from vitrail.inference.onnx_runtime import OnnxRuntime\n"
        f"runtime = OnnxRuntime(Path({str(tmp_path / 'm.onnx')!r}))\n"
        "(batch,) = Engine(runtime).stream(np.zeros((8, 8), np.uint8))\n"
        "print(batch.outputs.shape, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(1, 3) False\n"
