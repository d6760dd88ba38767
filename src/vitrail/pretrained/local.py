"""Weights in a folder: a model folder of vitrail, timm or transformers, a hub snapshot, or a run folder."""

import re
from collections.abc import Iterable
from pathlib import Path

from vitrail.errors import WeightsError
from vitrail.pretrained.foreign_configs import Architecture, read_config
from vitrail.utils.text import join_names, printable
from vitrail.weights.read import plain_name, read_file, read_json, read_shards
from vitrail.weights.tensors import Tensors
from vitrail.weights.unwrap import unwrap

CONFIG, PROCESSOR, CARD = "config.json", "preprocessor_config.json", "README.md"
USUAL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin", ".ckpt")
_NOT_WEIGHTS = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"}


def choose_weights(names: Iterable[str], where: str) -> str:
    """The weights file among the files of a folder or repository.

    Raises:
        WeightsError: there is none, or there are several without a usual name.
    """
    names = set(names)
    for name in USUAL:
        if name in names:
            return name
    others = sorted(name for name in names if name.endswith(SUFFIXES) and name not in _NOT_WEIGHTS and "/" not in name)
    if len(others) == 1:
        return others[0]
    if others:
        raise WeightsError(f"{where} contains several checkpoints ({join_names(others, 4)}): give the path of one file")
    raise WeightsError(
        f"{where} contains no weights: looked for {USUAL[0]}, {USUAL[2]} or any of {', '.join(SUFFIXES)}"
    )


def shard_names(index: Path) -> list[str]:
    """The files that an index lists, checked to be in its folder."""
    table = read_json(index).get("weight_map")
    values = table.values() if isinstance(table, dict) else ()
    return sorted({plain_name(name, index) for name in values if isinstance(name, str)})


def read_tensors(path: Path) -> Tensors:
    """The flat state dict of a file or of the shards of an index, with the file's names but no wrapper prefixes."""
    return unwrap(read_shards(path) if path.name.endswith(".index.json") else read_file(path))


def read_architecture(folder: Path) -> Architecture:
    """Parse the config.json in the folder of the weights; empty if there is none."""
    config = folder / CONFIG
    if not config.is_file():
        return Architecture()
    processor = read_json(folder / PROCESSOR) if (folder / PROCESSOR).is_file() else None
    return read_config(read_json(config), processor, str(config))


def find_weights(folder: Path) -> Path:
    """The weights file of a folder, or of the model folder in a run folder."""
    if not (folder / CONFIG).is_file() and (folder / "model" / CONFIG).is_file():
        folder = folder / "model"
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    return folder / choose_weights(names, str(folder))


def licence_of(folder: Path) -> str | None:
    """The licence in the metadata of a model card (`license: mit`)."""
    try:
        with (folder / CARD).open(encoding="utf-8", errors="replace") as file:
            head = file.read(1 << 16)
    except OSError:
        return None
    front = re.match(r"---\n(.*?)\n---", head, re.DOTALL)
    found = re.search(r"^license:\s*[\"']?([^\"'\n]+)", front[1], re.MULTILINE) if front else None
    return printable(found[1].strip(), 60) if found else None
