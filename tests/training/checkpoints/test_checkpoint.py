"""Checkpoints: whole or not there, and equal to what was saved."""

import json
import os
from pathlib import Path

import pytest
import torch

from training import tiny
from vitrail.errors import RunError
from vitrail.training.checkpoints.checkpoint import Checkpoint, find_checkpoints, load_checkpoint, save_checkpoint


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


def test_the_newest_whole_one_counts(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 9, checkpoint(9))
    save_checkpoint(tmp_path, 10, checkpoint(10))
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-00000010"]
    # A killed process may leave an older one behind, and a newer one under a temporary name.
    save_checkpoint(tmp_path / "other", 5, checkpoint(5))
    (tmp_path / "other" / "step-00000005").rename(tmp_path / "step-00000005")
    (tmp_path / ".step-00000011.1234.tmp").mkdir()
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.tensors["model"]["a"][0, 0] == 10
    (tmp_path / "step-00000010" / "model.safetensors").write_bytes(b"broken")
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.tensors["model"]["a"][0, 0] == 5


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    place = save_checkpoint(tmp_path, 1, checkpoint(1))
    state = json.loads((place / "state.json").read_text())
    (place / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(RunError, match=r"step-00000001.*format is 99"):
        load_checkpoint(tmp_path)
    (place / "state.json").write_text(json.dumps({**state, "format": 1}))
    with pytest.raises(RunError, match=r"vitrail 0\.1\.0"):
        load_checkpoint(tmp_path)
