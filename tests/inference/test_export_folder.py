"""export.json: written and read; damage is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from inference.export_files import DIGITS, GREY, make_export
from vitrail.errors import ExportError
from vitrail.inference.export_folder import ExportRecord, is_export
from vitrail.inference.exported import open_runtime


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    notes: dict[str, Any] = {"split": {"val_fraction": 0.2}, "data": "digits"}
    folder = make_export(
        tmp_path / "e",
        notes=notes,
        folds=("norm", "scale"),
        threads=2,
        calibration={"data": "digits", "split": "train", "images": 1, "paths": ["digits/train/3"]},
        check={"top1": 99.0},
    )
    record = ExportRecord.read(folder)
    assert is_export(folder)
    assert not is_export(tmp_path)
    assert (record.preprocess, record.class_names, record.folds, record.threads) == (GREY, DIGITS, ("norm", "scale"), 2)
    assert (record.notes, record.check, record.merging) == (notes, {"top1": 99.0}, None)
    assert record.files.keys() == {"model.onnx", "image.onnx", "weights.bin"}
    assert record.files["weights.bin"]["bytes"] == (folder / "weights.bin").stat().st_size
    assert record.write(folder) == record == ExportRecord.read(folder)


def test_the_fingerprint_changes_with_weights_and_preprocessing(tmp_path: Path) -> None:
    folder = make_export(tmp_path / "e")
    record = ExportRecord.read(folder)
    same = make_export(tmp_path / "same", architecture="other name", notes={"any": 1})
    other = make_export(tmp_path / "other", preprocess=GREY.replace(crop_pct=0.9))
    assert ExportRecord.read(same).fingerprint() == record.fingerprint()
    assert ExportRecord.read(other).fingerprint() != record.fingerprint()
    data = bytearray((folder / "weights.bin").read_bytes())
    data[100] ^= 1
    (folder / "weights.bin").write_bytes(data)
    assert record.write(folder).fingerprint() != record.fingerprint()


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"format": 2}, "format 1"),
        ({"targt": 1}, r"'targt'.*'target'"),
        ({"model": None}, "no 'model'"),
        ({"class_names": "ab"}, "'class_names'"),
        ({"class_names": [1, 2]}, "class_names"),
        ({"num_features": "64"}, "'num_features'"),
        ({"target": "tflite"}, "'tflite'.*onnx, openvino"),
        ({"precision": "fp8"}, "'fp8'.*int8"),
        ({"preprocess": {"size": [8]}}, "preprocessing"),
        ({"preprocess": {"size": [8, 8], "crop": 1}}, "'crop'"),
        ({"model": "../model.onnx"}, "files"),
        ({"files": {"model.onnx": 3}}, "files"),
        ({"files": {}}, r"checksum of model\.onnx"),
        ({"source": {}}, "source"),
    ],
)
def test_a_damaged_record_is_named(change: dict[str, Any], facts: str, tmp_path: Path) -> None:
    path = make_export(tmp_path / "e") / "export.json"
    content = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None or key != "model"}))
    with pytest.raises(ExportError, match=rf"export\.json .*{facts}") as error:
        open_runtime(tmp_path / "e")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 1'])
def test_a_record_that_is_no_json_is_named(text: str, tmp_path: Path) -> None:
    (make_export(tmp_path / "e") / "export.json").write_text(text)
    with pytest.raises(ExportError, match=r"export\.json"):
        open_runtime(tmp_path / "e")


@pytest.mark.parametrize(
    ("target", "name"), [("onnx", "weights.bin"), ("onnx", "model.onnx"), ("openvino", "model.bin")]
)
def test_missing_and_changed_files_are_named(target: str, name: str, tmp_path: Path) -> None:
    folder = make_export(tmp_path / "e", target)
    path = folder / name
    content = path.read_bytes()
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    for damage, facts in ((bytes(changed), "checksum"), (content[:-1], "bytes"), (content + b"0", "bytes")):
        path.write_bytes(damage)
        with pytest.raises(ExportError, match=rf"{name} .*{facts}"):
            open_runtime(folder)
    path.unlink()
    with pytest.raises(ExportError, match=rf"{name} is missing"):
        open_runtime(folder)
    path.write_bytes(content)
    assert open_runtime(folder).num_classes == 10
    (folder / "export.json").unlink()
    assert is_export(folder)
    with pytest.raises(ExportError, match=r"export\.json could not be read"):
        open_runtime(folder)
