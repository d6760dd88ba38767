"""Checkpoints: whole or not there, and equal to what was saved."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from training import tiny
from vitrail.errors import RunError
from vitrail.training.checkpoints.checkpoint import Checkpoint, find_checkpoints, load_checkpoint, save_checkpoint
from vitrail.utils.files import write_checksums


def checkpoint(value: float) -> Checkpoint:
    whole = torch.full((4, 3), value)
    tensors = {"model": {"a": whole, "tied": whole, "turned": whole.T, "part": whole[1:3], "n": torch.tensor(7)}}
    return Checkpoint({**tensors, "empty": {}}, {"state": {"steps": 3}, "rate": 0.1})


def test_back_as_saved(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    saved = checkpoint(1 / 3)
    save_checkpoint(tmp_path, 3, saved)
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.record["state"] == {"steps": 3}
    assert found.record["rate"] == 0.1
    assert found.tensors["empty"] == {}
    assert tiny.same(found.tensors["model"], saved.tensors["model"])
    mode = next(tmp_path.glob("step-*/model.safetensors")).stat().st_mode & 0o777
    umask = os.umask(0)
    os.umask(umask)
    assert mode == 0o666 & ~umask


def names(folder: Path) -> list[str]:
    return [path.name for path in find_checkpoints(folder)]


def first(found: Checkpoint | None) -> float:
    assert found is not None
    return float(found.tensors["model"]["a"][0, 0])


def test_the_last_two_are_kept_and_the_newest_whole_one_counts(tmp_path: Path) -> None:
    for steps in (8, 9, 10):
        save_checkpoint(tmp_path, steps, checkpoint(steps))
    assert names(tmp_path) == ["step-00000010", "step-00000009"]
    # A killed process may leave a newer one under a temporary name; other folders are not checkpoints.
    for other in (".step-00000011.1234.tmp", "step-abc", "step-", "step-1e9", "step-٣"):
        (tmp_path / other).mkdir()
    assert first(load_checkpoint(tmp_path)) == 10
    (tmp_path / "step-00000010" / "model.safetensors").write_bytes(b"broken")
    found = load_checkpoint(tmp_path)
    assert first(found) == 9
    assert found is not None
    assert len(found.damaged) == 1
    assert "step-00000010: model.safetensors is damaged" in found.damaged[0]
    # The one that was used stays until two whole ones follow it.
    save_checkpoint(tmp_path, 10, checkpoint(11), keep=found.place)
    assert names(tmp_path) == ["step-00000010.1", "step-00000009"]


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 8, checkpoint(8))
    place = save_checkpoint(tmp_path, 9, checkpoint(9))
    rng, count = np.random.default_rng(0), 0
    for path in sorted(place.iterdir()):
        content = path.read_bytes()
        for position in rng.integers(0, len(content), 25):
            damaged = bytearray(content)
            damaged[position] ^= 1 << int(rng.integers(8))
            path.write_bytes(bytes(damaged))
            found = load_checkpoint(tmp_path)
            assert first(found) == 8, f"{path.name} at {position}"
            assert found is not None
            assert len(found.damaged) == 1
            count += 1
        path.write_bytes(content)
    assert count == 25 * 4  # state.json, SHA256SUMS, two parts
    assert first(load_checkpoint(tmp_path)) == 9


@pytest.mark.parametrize(
    "state", ["", "[]", "{}", "7", "[" * 100_000, '{"format": 2}', '{"format": 2, "parts": 7}', "\x00"]
)
def test_a_damaged_state_is_one_line(tmp_path: Path, state: str) -> None:
    place = save_checkpoint(tmp_path, 9, checkpoint(9))
    (place / "state.json").write_text(state)
    write_checksums(place, ["state.json", "model.safetensors", "empty.safetensors"])
    with pytest.raises(RunError, match=r"could not read .*step-00000009") as error:
        load_checkpoint(tmp_path)
    assert str(error.value).isprintable()


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    place = save_checkpoint(tmp_path, 1, checkpoint(1))
    state = json.loads((place / "state.json").read_text())
    (place / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(RunError, match=r"step-00000001.*format is 99"):
        load_checkpoint(tmp_path)
    (place / "state.json").write_text(json.dumps({**state, "format": 1}))
    with pytest.raises(RunError, match=r"vitrail 0\.1\.0"):
        load_checkpoint(tmp_path)
