"""The plan that `vitrail train` prints fits one screen of 24 lines and 80 columns."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from vitrail.models.build import build_model
from vitrail.models.configs import ViTConfig
from vitrail.training.config.schema import make_config
from vitrail.training.engine.optimizer import describe_groups, parameter_groups, summarize_groups
from vitrail.training.monitoring.plan import plan_lines
from vitrail.training.monitoring.progress import Reporter
from vitrail.training.session import Session
from vitrail.training.setup import prepare
from vitrail.utils.device import pick_device


def on_a_terminal(width: int = 80) -> tuple[Reporter, io.StringIO]:
    screen = io.StringIO()
    reporter = Reporter()
    reporter.console = Console(file=screen, force_terminal=True, width=width, no_color=True)
    return reporter, screen


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of three classes, imbalanced and very wide, so that the plan has all its lines."""
    root, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for label, count in (("a class with a long name", 30), ("another one", 8), ("the third of these", 8)):
        (root / label).mkdir()
        for index in range(count):
            pixels = draw.integers(0, 255, (60, 200, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{index}.jpg")
    return root


def plan_of(photos: Path, *, all_groups: bool = False) -> list[str]:
    values = {"model": "vit_small_patch8_64", "img_size": 64, "layer_decay": 0.75, "epochs": 3, "rand_augment": 9}
    setup = prepare(photos, make_config(values))
    session = Session(setup, Reporter(enabled=False), pick_device("cpu"))
    return plan_lines(setup, session.trainer, session.loader.steps_per_epoch, "runs/photos", all_groups=all_groups)


def test_the_plan_of_a_fine_tuning_fits_a_screen(photos: Path) -> None:
    reporter, screen = on_a_terminal()
    reporter.plan(plan_of(photos))
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 21  # beside the command, the estimated cost and the bar
    assert len([line for line in lines if line.startswith("group")]) == 1
    assert "layer decay 0.75" in " ".join(lines)
    labels = {line.split()[0] for line in lines if not line.startswith(" ")}
    assert {"data", "split", "classes", "model", "recipe", "train", "augment", "device", "groups", "output"} <= labels
    assert all(line[:8].rstrip() in labels or line.startswith(" " * 8) for line in lines)  # aligned below each other


def test_verbose_lists_every_group(photos: Path) -> None:
    short, full = plan_of(photos), plan_of(photos, all_groups=True)
    groups = [line for line in full if line.startswith("group ")]
    assert len(groups) > 8
    (summary,) = (line for line in short if line.startswith("groups"))
    assert summary.split()[1:3] == [str(len(groups)), "groups,"]


def test_groups_in_one_line() -> None:
    model = build_model(ViTConfig(img_size=(8, 8), num_classes=2, patch_size=4, embed_dim=8, depth=2, num_heads=2))
    groups = parameter_groups(model, make_config({"lr": 8e-4, "layer_decay": 0.5, "weight_decay": 0.05}))
    assert len(groups) == len(describe_groups(groups))
    # Layers 0 (embeddings) to 3 (norm and head): 8e-4 halved three times.
    expected = f"{len(groups)} groups, lr 1e-4 ... 8e-4, layer decay 0.5, weight decay 0.05"
    assert summarize_groups(groups, 0.5) == expected
    one = parameter_groups(model.head, make_config({"lr": 5e-3, "weight_decay": 0.0}))
    assert summarize_groups(one[:1]) == "1 group, lr 0.005, weight decay 0"


def test_a_long_line_continues_below_its_text() -> None:
    reporter, screen = on_a_terminal(width=40)
    reporter.plan(["split   " + "word " * 20])
    first, *others = screen.getvalue().splitlines()
    assert first.startswith("split   word")
    assert len(others) >= 2
    assert all(line.startswith(" " * 8 + "word") for line in others)


def test_what_is_held_out_is_said_once(photos: Path) -> None:
    (split,) = (line for line in plan_of(photos) if line.startswith("split"))
    assert re.fullmatch(r"split   test: \d+, val: \d+ of 46 images held out, stratified, split seed 0", split)
    counts = next(line for line in plan_of(photos) if line.startswith("data")).split(": ")[1]
    train, val, test = (int(word) for word in re.findall(r"\d+", counts))
    assert train + val + test == 46
    assert f"test: {test}, val: {val} of" in split
