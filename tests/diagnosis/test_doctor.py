"""Planted faults in a folder of photographs."""

import csv
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

import vitrail
from data.make_folder import picture
from vitrail.diagnosis.checks.table import CHECKS
from vitrail.diagnosis.fixes import propose
from vitrail.errors import DataError
from vitrail.evaluation.statistics import wilson

NAMES = [
    *("unreadable", "exact_duplicate", "near_duplicate", "leak", "conflicting_label", "suspect_label", "odd_size"),
    *("dark", "bright", "blurry", "low_information", "imbalance", "tiny_class"),
]


def photo(c, number):
    """One of 20 parts, 104 x 124 pixels, of the photograph of class `c`."""
    y, x = 106 * (number // 5), 128 * (number % 5)
    return Image.fromarray(load_sample_image(("china.jpg", "flower.jpg")[c])[y : y + 104, x : x + 124])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for split, numbers in (("train", range(12)), ("test", range(12, 18))):
        for c in range(2):
            path = root / split / f"class{c}"
            path.mkdir(parents=True)
            for number in numbers:
                photo(c, number).save(path / f"{number:03d}.jpg", quality=92)
    train, test = root / "train", root / "test"
    shutil.copy(train / "class0/000.jpg", train / "class0/copy.jpg")
    Image.open(train / "class0/001.jpg").save(train / "class0/pixels.png")
    shutil.copy(train / "class0/002.jpg", test / "class0/leak.jpg")
    Image.open(train / "class0/003.jpg").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(test / "class0/mirror.png")
    shutil.copy(train / "class0/004.jpg", train / "class1/conflict.jpg")
    (train / "class0/empty.jpg").write_bytes(b"")
    whole = (train / "class0/005.jpg").read_bytes()
    (train / "class0/cut.jpg").write_bytes(whole[: len(whole) // 2])
    photo(0, 18).save(train / "class0/liar.png", "JPEG")
    photo(0, 19).save(train / "class0/moving.gif", save_all=True, append_images=[photo(0, 18)])
    photo(1, 18).resize((600, 60)).save(train / "class1/long.jpg")
    draw = np.random.default_rng(0).integers(0, 30, (4, 96, 128, 3)).astype(np.uint8)
    Image.fromarray(draw[0]).save(train / "class0/dark.png")
    Image.fromarray(255 - draw[1] // 3).save(train / "class0/bright.png")
    small = photo(1, 19).resize((10, 8))
    small.resize((128, 96), Image.Resampling.BICUBIC).save(train / "class1/blurry.png")
    Image.new("RGB", (128, 96), (90, 120, 30)).save(train / "class1/plain.png")
    Image.fromarray(8 * draw[2]).convert("L").save(train / "class1/grey.png")
    return root


@pytest.fixture(scope="module")
def diagnosis(folder):
    return vitrail.doctor(folder, forecast_model="none")


def groups_of(diagnosis, check, folder):
    return [
        {path.removeprefix(f"{folder}/") for path in group}
        for finding in diagnosis.findings
        if finding.check == check
        for group in finding.groups
    ]


def test_every_check_has_its_name_in_the_table():
    assert list(dict.fromkeys(name for name, _ in CHECKS)) == NAMES


def test_planted_faults_are_found(diagnosis, folder):
    found = {check: groups_of(diagnosis, check, folder) for check in NAMES}
    assert {"train/class0/empty.jpg"} in found["unreadable"]
    assert {"train/class0/cut.jpg"} in found["unreadable"]
    assert {"train/class0/liar.png"} in found["unreadable"]
    assert {"train/class0/moving.gif"} in found["unreadable"]
    assert {"train/class0/000.jpg", "train/class0/copy.jpg"} in found["exact_duplicate"]
    assert {"train/class0/001.jpg", "train/class0/pixels.png"} in found["exact_duplicate"]
    mirrored = {"train/class0/003.jpg", "test/class0/mirror.png"}
    assert mirrored in found["near_duplicate"]
    assert sorted(found["leak"], key=sorted) == sorted(
        [{"train/class0/002.jpg", "test/class0/leak.jpg"}, mirrored], key=sorted
    )
    assert found["conflicting_label"] == [{"train/class0/004.jpg", "train/class1/conflict.jpg"}]
    assert {"train/class1/long.jpg"} in found["odd_size"]
    assert {"train/class0/dark.png"} in found["dark"]
    assert {"train/class0/bright.png"} in found["bright"]
    assert {"train/class1/blurry.png"} in found["blurry"]
    assert {"train/class1/plain.png"} in found["low_information"]
    assert {"train/class1/grey.png"} in found["low_information"]


def test_severities(diagnosis):
    severities = {finding.check: finding.severity for finding in diagnosis.findings}
    assert diagnosis.has_errors
    assert {check for check, severity in severities.items() if severity == "error"} == {"leak", "conflicting_label"}


def test_json_has_the_documented_keys(diagnosis):
    found = diagnosis.to_dict()
    assert list(found) == ["images", "classes", "findings", "cost"]
    assert found["classes"] == 2
    for finding in found["findings"]:
        assert list(finding) == ["check", "severity", "count", "groups", "advice", "notes"]
        assert finding["check"] in NAMES
        assert finding["severity"] in ("error", "warning", "note")
        if finding["groups"]:
            assert finding["count"] == sum(map(len, finding["groups"]))
            assert set(finding["notes"]) <= {path for group in finding["groups"] for path in group}


def test_json_has_the_notes_on_images(diagnosis, folder):
    notes = {
        (each["check"], each["severity"], path.removeprefix(f"{folder}/")): note
        for each in diagnosis.to_dict()["findings"]
        for path, note in each["notes"].items()
    }
    assert "only the first frame" in notes["unreadable", "note", "train/class0/moving.gif"]
    assert "0 bytes" in notes["unreadable", "warning", "train/class0/empty.jpg"]
    assert notes["conflicting_label", "error", "train/class1/conflict.jpg"] == "class1"


def test_fixes_name_each_path_once_and_keep_one_of_each_image(diagnosis, folder):
    fixes = propose(diagnosis.evidence)
    assert max(Counter(fix.path for fix in fixes).values()) == 1
    by_path = {fix.path.removeprefix(f"{folder}/"): fix for fix in fixes}
    assert by_path["train/class0/empty.jpg"].action == "remove"
    assert by_path["train/class0/copy.jpg"].action == "remove"
    assert "train/class0/000.jpg" not in by_path
    assert by_path["train/class0/002.jpg"].action == "remove"  # its copy is in the test images, which stay
    assert (by_path["train/class0/003.jpg"].action, by_path["train/class0/003.jpg"].to) == ("move", "test")
    assert by_path["train/class0/liar.png"].to.endswith("liar.jpg")


def test_files_are_written_and_images_untouched(diagnosis, folder, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    count = diagnosis.write_fixes(tmp_path / "fixes.csv")
    with (tmp_path / "fixes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == count
    assert list(rows[0]) == ["path", "action", "to", "reason"]
    page = diagnosis.write_report(tmp_path / "page.html").read_text()
    assert "Leaks between splits" in page
    assert page.count("data:image/") >= 20
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_intervals_of_tiny_classes(tmp_path):
    for c, count in enumerate((30, 10)):
        (tmp_path / "train" / f"class{c}").mkdir(parents=True)
        (tmp_path / "test" / f"class{c}").mkdir(parents=True)
        for number in range(count):
            picture(c, number, (40, 40)).save(tmp_path / f"train/class{c}/{number}.png")
        for number in range(4):
            picture(c, 100 + number, (40, 40)).save(tmp_path / f"test/class{c}/{number}.png")
    found = {finding.check: finding for finding in vitrail.doctor(tmp_path, forecast_model="none").findings}
    assert found["tiny_class"].count == 2
    assert f"{wilson(1.0, 4)[0]:.0f} to 100 %" in found["tiny_class"].advice
    assert found["imbalance"].count == 1
    assert "3.0 times" in found["imbalance"].advice


@pytest.mark.slow
def test_the_cost_is_forecast(folder):
    cost = vitrail.doctor(folder, forecast_model="vit_nano_patch2_8").cost
    assert cost["automatic"]["model"] == "vit_small_patch8_64"
    assert cost["named"]["model"] == "vit_nano_patch2_8"
    assert 0 < cost["named"]["epoch_seconds"] < cost["named"]["total_seconds"]
    assert cost["named"]["peak_bytes"] > 0


def test_data_that_cannot_be_opened(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        vitrail.doctor(tmp_path / "nowhere")
