"""One tensor of a good checkpoint renamed, dropped, reshaped or doubled: told by name, every time."""

import functools
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from vitrail.errors import VitrailError
from vitrail.weights.formats.detect import convert_names
from vitrail.weights.load import load_weights
from vitrail.weights.tensors import Tensors
from vitrail.weights.unwrap import unwrap
from weights.checkpoints import NAMES, all_cases

KINDS = ("rename", "drop", "reshape", "duplicate")
EACH = 2  # of every kind for every case


@functools.cache
def model_for(case: str) -> nn.Module:
    """One model serves all mutations of a case: a refused file leaves it as it was."""
    return all_cases()[case].model()


def mutate(content: dict[str, Tensor], name: str, kind: str, rng: random.Random) -> tuple[dict[str, Tensor], str]:
    """The changed file, and the name that must be told."""
    value = content[name]
    rest = {key: tensor for key, tensor in content.items() if key != name}
    if kind == "drop":
        return rest, name
    if kind == "rename":
        head, _, tail = name.rpartition(".")
        new = rng.choice([f"{name}_", f"x{name}", f"{head}.extra.{tail}", name.upper(), "stranger"])
        return {**rest, new: value}, name
    if kind == "duplicate":
        new = rng.choice([f"{name}_copy", f"copy.{name}", f"{name}.{name}", "stranger"])
        return {**content, new: value.clone()}, new
    shapes = [value[None], value.flatten()[: max(1, value.numel() - 1)], torch.cat([value.flatten()] * 2)]
    if value.ndim:
        shapes += [value[:-1], torch.cat([value, value[:1]]), value[..., :-1]]
    changed = rng.choice([shape for shape in shapes if shape.shape != value.shape])
    return {**content, name: changed.clone()}, name


def mutations() -> Iterator[tuple[str, str, int]]:
    for case in NAMES:
        for kind in KINDS:
            for index in range(EACH):
                yield case, kind, index


def told(content: dict[str, Tensor], case: str) -> str:
    """Everything that is said of this file, without what is simply loaded."""
    try:
        report = load_weights(model_for(case), convert_names(unwrap(content))[0])
    except VitrailError as error:
        return str(error)
    return " ".join(f"{entry.name} {entry.file} {entry.how}" for entry in report.entries if entry.state != "loaded")


def test_there_are_at_least_200() -> None:
    assert len(list(mutations())) >= 200


@pytest.mark.parametrize(("case", "kind", "index"), list(mutations()))
def test_a_mutation_is_told_by_name(case: str, kind: str, index: int) -> None:
    content = all_cases()[case].content
    content = Tensors(content.get("model", content))
    good = convert_names(content)[0]
    used = sorted(set(content) - set(good.unused))  # what is never read cannot be missed
    rng = random.Random(f"{case} {kind} {index}")
    name = rng.choice(used)
    ours = [key for key in good if name in good.file_name(key).split(" + ")]
    changed, word = mutate(content, name, kind, rng)
    words = [word] if kind == "duplicate" else [name, *ours]
    text = told(changed, case)
    assert "\n" not in text
    assert any(word in text for word in words), f"{kind} {name}: {text}"
    before = told(content, case)
    assert text != before, f"{kind} {name} went unseen"
