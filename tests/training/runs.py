"""Runs of the tiny model, and what they leave."""

import json
from pathlib import Path
from typing import Any

from training import tiny
from vitrail.training.checkpoints.checkpoint import load_checkpoint
from vitrail.training.run import train

# Two epochs and two steps, with everything that has a state or draws random numbers.
KEYS: dict[str, Any] = {
    **tiny.PLAIN,
    "epochs": 2.4,
    "label_smoothing": 0.1,
    "weight_decay": 0.05,
    "clip_grad": 1.0,
    "ema": 0.8,
    "drop_path": 0.3,
    "drop": 0.1,
    "mixup": 0.4,
    "cutmix": 0.4,
    "erase": 0.3,
    "pad_shift": 1,
    "checkpoint_every": 3,
    "amp": "off",  # in processes of its own too
}


def run(out: Path, **keys: Any) -> Any:
    return train(tiny.dataset(), out=out, progress=False, **{**KEYS, **keys})


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what the clock says."""
    clocks = {"seconds", "images_per_second", "waiting_for_data"}
    return {key: value for key, value in record.items() if key not in clocks}


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves, without what the clock says."""
    last = load_checkpoint(folder / "checkpoint")
    assert last is not None
    return {
        "tensors": last.tensors,
        "metrics": [timeless(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        "summary": timeless(json.loads((folder / "summary.json").read_text())),
        "model": (folder / "model" / "model.safetensors").read_bytes(),
    }


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Two outcomes are one, bit for bit."""
    assert one["tensors"].keys() == two["tensors"].keys()
    for part, tensors in one["tensors"].items():
        assert tiny.same(tensors, two["tensors"][part]), part
    for part in ("metrics", "summary", "model"):
        assert one[part] == two[part], part
