"""Strangers' files: read without running anything, or refused in one line."""

import contextlib
import io
import json
import os
import pickle
import struct
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vitrail.errors import WeightsError
from vitrail.weights.read import read_file, read_json, read_shards

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.float16)}


def refused(path: Path, words: str = "") -> str:
    with pytest.raises(WeightsError, match=words or None) as error:
        read_file(path)
    text = str(error.value)
    assert text.isprintable(), "one line, no control characters"
    assert len(text) < 600
    return text


def same(found: Any) -> bool:
    return set(found) == set(TENSORS) and all(torch.equal(found[key], value) for key, value in TENSORS.items())


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "weights"])
def test_safetensors_under_any_name(tmp_path: Path, name: str) -> None:
    save_file(TENSORS, tmp_path / name)
    assert same(read_file(tmp_path / name))


@pytest.mark.parametrize("old", [False, True])
def test_what_torch_saves(tmp_path: Path, old: bool) -> None:
    torch.save(TENSORS, tmp_path / "w.pth", _use_new_zipfile_serialization=not old)
    assert same(read_file(tmp_path / "w.pth"))


def test_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", **{key: value.numpy() for key, value in TENSORS.items()})
    assert same(read_file(tmp_path / "w.npz"))
    np.savez_compressed(tmp_path / "big.npz", a=np.arange(6, dtype=">f4").reshape(2, 3))
    assert torch.equal(read_file(tmp_path / "big.npz")["a"], TENSORS["a"])


def test_a_training_scripts_settings_are_data(tmp_path: Path) -> None:
    torch.save({"model": TENSORS, "args": Namespace(lr=0.1)}, tmp_path / "w.pth")
    assert same(read_file(tmp_path / "w.pth")["model"])


# ---- code


class Trap:
    """Unpickled the usual way, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.system, (f"touch '{self.mark}'",))


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "w.ckpt", "w.safetensors", "w.npz"])
@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_that_tries(tmp_path: Path, name: str, old: bool) -> None:
    mark = tmp_path / "was here"
    torch.save({"model": {**TENSORS, "x": Trap(mark)}}, tmp_path / name, _use_new_zipfile_serialization=not old)
    text = refused(tmp_path / name, "needs Python code to be read")
    assert old or "posix.system" in text or "nt.system" in text
    assert not mark.exists()
    torch.load(io.BytesIO((tmp_path / name).read_bytes()), weights_only=False)
    assert mark.exists(), "the trap must be able to spring"


def test_a_bare_pickle_that_tries(tmp_path: Path) -> None:
    mark, path = tmp_path / "was here", tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps(Trap(mark)))
    refused(path)
    assert not mark.exists()


def test_objects_in_an_npz(tmp_path: Path) -> None:
    mark, path = tmp_path / "was here", tmp_path / "w.npz"
    np.savez(path, a=np.array([Trap(mark)], dtype=object))
    refused(path, "Python objects")
    assert not mark.exists()
    np.savez(path, a=np.array(["text"]))
    refused(path, "<U4, not numbers")


def test_a_whole_model(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pth")
    refused(tmp_path / "w.pth", r"needs Python code to be read \(torch.nn.modules.linear.Linear")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "TorchScript program")


# ---- damaged, cut short, of another kind


@pytest.mark.parametrize("kind", ["safetensors", "pth", "old pth", "npz"])
def test_a_part_of_a_file_is_never_loaded(tmp_path: Path, kind: str) -> None:
    path, tensors = tmp_path / "w", {"a": torch.randn(50, 50)}
    if kind == "safetensors":
        save_file(tensors, path)
    elif kind == "npz":
        with path.open("wb") as file:
            np.savez(file, a=tensors["a"].numpy())
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "pth")
    whole = path.read_bytes()
    for length in (1, 7, 9, 60, 200, len(whole) // 2, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path)
    path.write_bytes(b"")
    refused(path, "is empty")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>404</html>", "not a checkpoint"),
        (b"\x00" * 500, "not a checkpoint"),
        (b"\x80\x02}q\x00.", ""),
        (b"PK\x03\x04 and then nothing", "damaged or truncated"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    refused(path, words)


def test_no_file_and_no_state_dict(tmp_path: Path) -> None:
    refused(tmp_path / "none.pth", "no such file")
    refused(tmp_path, "is a directory")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    refused(tmp_path / "list.pth", "list")
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "w.zip", "neither .npz nor")


def test_a_bomb(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        buffer = io.BytesIO()
        np.save(buffer, np.zeros(4_000_000, dtype=np.float32))
        archive.writestr("a.npy", buffer.getvalue())
    refused(tmp_path / "w.npz", "do not trust it")


def header(content: Any, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = {
    "a length of exabytes": header({"a": entry()}, length=2**63),
    "a length beyond the file": header({"a": entry()}, length=10_000),
    "no JSON": header(b"{" + b"x" * 20),
    "a list": header(b"[1, 2, 3, 4]"),
    "nested without end": header(b"{" + b'"a":{' * 50_000),
    "offsets beyond the file": header({"a": entry(offsets=(0, 1 << 40), shape=(1 << 38,))}),
    "offsets backwards": header({"a": entry(offsets=(16, 0))}),
    "negative offsets": header({"a": entry(offsets=(-16, 0))}),
    "overlapping": header({"a": entry(), "b": entry()}),
    "a hole": header({"a": entry(offsets=(4, 20))}, b"\0" * 20),
    "a shape that overflows": header({"a": entry(shape=(2**62, 2**62))}),
    "a negative shape": header({"a": entry(shape=(-4,))}),
    "a shape of text": header({"a": entry(shape=("4",))}),
    "a dtype of nonsense": header({"a": entry(dtype="PICKLE")}),
    "no dtype": header({"a": {"shape": [4], "data_offsets": [0, 16]}}),
    "too much behind": header({"a": entry()}, b"\0" * 1000),
    "a name of control characters": header({"\x1b[2J\n\r" + "x" * 3000: entry(offsets=(0, 99))}),
    "bytes that are no text": header(b'{"\xff\xfe": {}}'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_safetensors_header(tmp_path: Path, name: str) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(HOSTILE[name])
    refused(path)


def test_bytes_turned_at_random(tmp_path: Path) -> None:
    """Nothing but our own error comes out, whatever is damaged."""
    rng, path = np.random.default_rng(0), tmp_path / "w"
    save_file(TENSORS, path)
    safetensors = path.read_bytes()
    torch.save(TENSORS, path)
    for whole in (safetensors, path.read_bytes()):
        for _ in range(60):
            bad = bytearray(whole)
            for position in rng.integers(0, min(len(bad), 400), 3):
                bad[position] = rng.integers(256)
            path.write_bytes(bytes(bad))
            with contextlib.suppress(WeightsError):
                read_file(path)


# ---- several files


def shards(folder: Path, table: Any) -> Path:
    save_file({"a": TENSORS["a"]}, folder / "one.safetensors")
    save_file({"b": TENSORS["b"]}, folder / "two.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    return folder / "model.safetensors.index.json"


def test_shards(tmp_path: Path) -> None:
    assert same(read_shards(shards(tmp_path, {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"weight_map": {"a": "../one.safetensors"}}, "outside its folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "outside its folder"),
        ({"weight_map": {"a": "..\\one.safetensors"}}, "outside its folder"),
        ({"weight_map": {"a": ".."}}, "outside its folder"),
        ({"weight_map": {"a": ""}}, "outside its folder"),
        ({"weight_map": {"a": "C:one.safetensors"}}, "outside its folder"),
        ({"weight_map": {"a": "none.safetensors"}}, "no such file"),
        ({"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}}, "contains b, which"),
        ({"weight_map": {"a": "one.safetensors", "c": "one.safetensors"}}, "lists tensors .* contain: c"),
        ({"weight_map": {"a": "two.safetensors", "b": "two.safetensors"}}, "lists tensors .* contain: a"),
        ({"weight_map": {"a": 1}}, "no weight_map"),
        ({"weight_map": ["one.safetensors"]}, "no weight_map"),
        ({}, "no weight_map"),
    ],
)
def test_bad_shards(tmp_path: Path, table: Any, words: str) -> None:
    with pytest.raises(WeightsError, match=words) as error:
        read_shards(shards(tmp_path, table))
    assert str(error.value).isprintable()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xff", b"[" * 100_000, b'"text"'])
def test_a_config_of_nonsense(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(WeightsError) as error:
        read_json(path)
    assert str(error.value).isprintable()
