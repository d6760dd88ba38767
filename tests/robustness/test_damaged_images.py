"""3,200 damaged images, decoded at 224 px under a limit of 2 GB of address space, PyTorch included: predict, embed,
evaluate and an epoch of training of a ViT-Ti end by themselves, and no image gets a label that Pillow cannot read.

`python tests/robustness/test_damaged_images.py` prints the figures that docs/security.md quotes.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from robustness.image_mutations import FORMATS, mutations, planted
from vitrail.images.decode import _formats

pytestmark = pytest.mark.slow

COUNT = 3200
ADDRESS_SPACE = 2_000_000_000
CLASSES = ("ant", "bee")
MODEL = "vit_tiny_patch16_224"
COMMAND = "import sys; from vitrail.cli import main; main(sys.argv[1:])"

# Crops every file; prints, for each, seconds of the processor, the growth of memory in MB, and the reason or "".
MEASURE = """
import json, sys, time
from pathlib import Path
import torch
from vitrail.images.decode import BadImage, one_image
from vitrail.images.preprocess import Preprocess
from vitrail.images.reader import crop
settings = Preprocess(size=(224, 224))
def status(name):
    text = Path("/proc/self/status").read_text().partition(name + ":")[2]
    return int(text.split()[0]) / 1000
for path in sorted(Path(sys.argv[1]).rglob("*.*")):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before, start, reason = status("VmRSS"), time.thread_time(), ""
    try:
        with one_image():
            crop(str(path), settings)
    except BadImage as bad:
        reason = bad.reason
    print(json.dumps([path.name, time.thread_time() - start, status("VmHWM") - before, reason]))
"""


def limited(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Python with the limit. What C libraries print about damaged images is in stderr."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE)),
    )


def write(root: Path, count: int = COUNT) -> Path:
    for name in CLASSES:
        (root / name).mkdir(parents=True)
    for number, (name, content) in enumerate(mutations(count)):
        (root / CLASSES[number % 2] / name).write_bytes(content)
    return root


def measure(root: Path) -> list[tuple[str, float, float, str]]:
    done = limited(MEASURE, root)
    assert done.returncode == 0, done.stderr[-2000:]
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("damaged") / "images")


@pytest.fixture(scope="module")
def refused(damaged: Path) -> set[str]:
    """The oracle: files that Pillow cannot read, or only with more pixels than its limit."""
    found = set()
    for path in damaged.rglob("*.*"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with Image.open(path, formats=_formats()) as image:
                    if image.width * image.height > 1e8:
                        continue
                    image.load()
            except Exception:
                found.add(str(path))
    return found


@pytest.fixture(scope="module")
def run(damaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    options = ["--model", MODEL, "--epochs", "1", "--no-pretrained", "batch_size=8", "device=cpu", "crop_scale=0.3,1"]
    done = limited(COMMAND, "train", damaged, "--out", folder, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return folder


def test_the_images_are_the_same_for_a_seed_and_of_every_kind(damaged: Path, refused: set[str]) -> None:
    assert [*mutations(200, seed=1)] == [*mutations(200, seed=1)]
    names = [path.name for path in damaged.rglob("*.*")]
    assert len(names) == COUNT
    kinds = Counter(name.partition("_")[2] for name in names)
    assert sum(kinds[kind] > 50 for kind in FORMATS) >= 40
    assert sum(1 for _ in planted()) == COUNT - sum(kinds[kind] for kind in FORMATS)
    assert 0.3 * COUNT < len(refused) < 0.9 * COUNT  # both sides are tested


def test_no_image_takes_long_or_much_memory(damaged: Path) -> None:
    rows = measure(damaged)
    assert len(rows) == COUNT
    assert max(rows, key=lambda row: row[1])[1] < 3.0, max(rows, key=lambda row: row[1])
    assert max(rows, key=lambda row: row[2])[2] < 600.0, max(rows, key=lambda row: row[2])


def test_training_ends_and_names_what_it_left_out(run: Path, refused: set[str]) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["images"] > 0
    assert all("\n" not in item["reason"] for item in summary["skipped"])


def test_predict_gives_no_label_where_pillow_refuses(run: Path, damaged: Path, refused: set[str]) -> None:
    done = limited(COMMAND, "predict", run / "model", damaged, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    records: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(records) == COUNT
    labelled = {record["path"] for record in records if "label" in record}
    assert not labelled & refused
    assert len(labelled) > 0.8 * (COUNT - len(refused))
    assert all(record["error"] and "\n" not in record["error"] for record in records if "label" not in record)


def test_embed_and_evaluate(run: Path, damaged: Path, refused: set[str], tmp_path: Path) -> None:
    done = limited(COMMAND, "embed", run / "model", damaged, "--out", tmp_path / "a.npy")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "a.npy.json").read_text())
    assert len(record["paths"]) + len(record["skipped"]) == COUNT
    assert not set(record["paths"]) & refused
    for split in ("train", "val", "test"):
        done = limited(COMMAND, "evaluate", run / "model", damaged, "--split", split, "--json")
        assert done.returncode == 0, done.stderr[-3000:]
        result = json.loads(done.stdout)
        assert result["images"] > 0
        assert result["top1"] == result["top1"]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as base:
        rows = measure(write(Path(base) / "images"))
    good = [row for row in rows if not row[3]]
    print(f"{len(rows)} images, {len(good)} of them readable, on {os.cpu_count()} cores")
    for what, column in (("processor seconds", 1), ("MB of memory", 2)):
        worst = sorted(rows, key=lambda row: -row[column])[:3]
        print(f"most {what}: {', '.join(f'{row[column]:.2f} ({row[0]})' for row in worst)}")
