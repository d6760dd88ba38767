"""report.html: its figures are the run's, it needs nothing else, and no kind of run goes without."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix

from training import tiny
from training.page import Element, assert_self_contained, parse
from training.runs import run
from vitrail.cli import main
from vitrail.data.dataset import ArraySplit, Dataset, FileSplit, Sizes
from vitrail.errors import RunError
from vitrail.evaluation.calibration import calibration_bins
from vitrail.evaluation.metrics import Evaluation, Records
from vitrail.reports.charts import Series, format_number, line_chart, ticks
from vitrail.reports.page import escape_unprintable
from vitrail.reports.thumbnails import thumbnail
from vitrail.training import run as run_module
from vitrail.training.checkpoints.run_folder import RunFolder
from vitrail.training.engine.interrupt import Stopped
from vitrail.training.engine.trainer import Trainer
from vitrail.training.monitoring.report import make_report, metric_cards, write_report
from vitrail.training.monitoring.report_data import confused_pairs, report_details
from vitrail.training.run import train


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


def report_of(folder: Path) -> Element:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert_self_contained(text)
    return parse(text)


def cards(page: Element) -> dict[str, str]:
    (figures,) = page.all("dl", "figures")
    values = [one.text for one in figures.all("span", "value")]
    return dict(zip([one.text for one in figures.all("dt")], values, strict=True))


def assert_figures(page: Element, folder: Path) -> dict[str, Any]:
    """The figures at the top and by class are those of summary.json, which is returned."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    shown = cards(page)
    assert shown["Top-1 accuracy"] == f"{summary['top1']:.2f}"
    assert "Top-5 accuracy" not in shown  # of three classes
    assert shown["Loss"] == f"{summary['loss']:.4f}"
    assert shown["Calibration error"] == f"{100 * summary['ece']:.2f}"
    assert shown["Images"] == f"{summary['images']:,}"
    rows = page.section("Accuracy by class").rows()
    by_name = {row["label"]: row for row in summary["per_class"]}
    assert {row[0] for row in rows} == set(by_name)
    for row in rows:
        assert row[1] == f"{by_name[row[0]]['top1']:.1f} %"
        assert row[2] == f"{by_name[row[0]]['images']:,}"
    shares = [by_name[row[0]]["top1"] for row in rows]
    assert shares == sorted(shares)
    return summary


def test_the_report_tells_what_the_run_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    train(tiny.dataset(), out=folder, model=tiny.VARIANT.name, epochs=3, batch_size=10, device="cpu", head_lr=2e-3)
    assert f"report  {folder}/report.html" in capsys.readouterr().err.replace("\n", "")
    page = report_of(folder)
    summary = assert_figures(page, folder)
    assert (folder / "report.html").stat().st_size < 200_000
    # The matrix holds every image, once; its diagonal is what is right.
    matrix = page.section("Confusion matrix").rows()
    counts = np.array([[int(cell or 0) for cell in row[1:-1]] for row in matrix])
    assert counts.sum(axis=1).tolist() == [row["images"] for row in summary["per_class"]]
    assert counts.diagonal().tolist() == [row["correct"] for row in summary["per_class"]]
    # Every wrong image is among the mistakes, as there are few, and its picture is the test image.
    mistakes = page.section("Most confident errors").all("li")
    assert len(mistakes) == counts.sum() - np.trace(counts)
    scores = [float(one.all("dd")[2].text) for one in mistakes]
    assert scores == sorted(scores, reverse=True)
    test = tiny.dataset().splits["test"]
    assert isinstance(test, ArraySplit)
    for one in mistakes:
        index = int((one.all("div", "name")[0].attributes["title"] or "").rpartition("/")[2])
        assert one.all("dd")[0].text == tiny.dataset().class_names[test.labels[index]]
        data = (one.all("img")[0].attributes["src"] or "").partition("base64,")[2]
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert np.array_equal(shown, test.images[index])
        explained = one.all("img")[1]  # which pixels decided for the wrong label
        assert explained.attributes["alt"] == f"explanation of {one.all('dd')[1].text}"
    # The diagram's numbers give the calibration error again.
    bins = page.section("Calibration").rows()
    images = np.array([float(row[1]) for row in bins])
    gaps = np.array([abs(float(row[2]) - float(row[3].removesuffix(" %")) / 100) for row in bins])
    assert images.sum() == summary["images"]
    assert (images * gaps).sum() / images.sum() == pytest.approx(summary["ece"], abs=1e-3)
    # The curves have a point for each epoch.
    for chart in page.section("Training curves").all("figure"):
        for line in chart.all("polyline"):
            assert len((line.attributes["points"] or "").split()) == 3
    made = page.section("Run details").text
    assert "vitrail.train(<Dataset tiny>, model='vit_test_patch2_8', epochs=3, batch_size=10, device='cpu'," in made
    assert "random (trained from scratch)" in made
    assert summary["environment"]["torch"] in made
    (table,) = page.all("table", "settings")
    settings = dict([cell.text for cell in row.all("td")] for row in table.all("tr"))
    assert settings["head_lr"] == "0.002"
    assert settings["epochs"] == "3"
    bold = [one.text for one in page.all("td", "set")]
    assert "head_lr" in bold
    assert "layer_decay" not in bold


HOSTILE = ("<script>alert(1)</script>", "a&\"b'</title>", "</style>\u202eevil\x07")


def hostile_dataset(folder: Path) -> Dataset:
    """Files and classes whose names are markup, control characters and no text at all."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [b'<img src=x onerror="y">%d.png', b"caf\xe9\xff-%d.png", b"tab\there&amp;%d.png"]
    splits: dict[str, Any] = {}
    for part, count in (("train", 12), ("val", 6), ("test", 9)):
        paths = []
        for i in range(count):
            path = os.fsdecode(os.path.join(os.fsencode(folder), part.encode() + names[i % 3] % i))
            Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(path, "PNG")
            paths.append(path)
        splits[part] = FileSplit(paths, np.arange(count) % 3)
    Path(splits["test"].paths[1]).write_bytes(b"no picture")
    sizes = Sizes.of(np.full((27, 2), 8))
    return Dataset("<b>data</b>", HOSTILE, splits, sizes, channels=1, mean=(0.5,), std=(0.3,))


def test_names_are_text_whatever_they_are(tmp_path: Path) -> None:
    data = hostile_dataset(tmp_path / "images")
    folder = tmp_path / "run"
    train(data, out=folder, progress=False, **{**tiny.PLAIN, "batch_size": 4})
    page = report_of(folder)  # no script, no attribute that runs one
    assert not page.all("b")
    assert page.all("h1")[0].text == "vit_test_patch2_8 on <b>data</b>"
    rows = page.section("Accuracy by class").rows()
    assert {row[0] for row in rows} == {HOSTILE[0], HOSTILE[1], r"</style>\u202eevil\x07"}
    (skipped,) = page.section("Skipped images").rows()
    assert r"caf\udce9\udcff-1.png" in skipped[0]
    titles = {one.attributes["title"] for one in page.all("div", "name")}
    assert {one.text for one in page.all("div", "name")} <= {
        "/".join((title or "").split("/")[-2:]) for title in titles
    }
    # What the files say is what the names are.
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["skipped"][0]["path"] == data.splits["test"].name(1)
    assert [row["label"] for row in summary["per_class"]] == list(HOSTILE)


def test_a_report_that_fails_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(folder: RunFolder) -> Path:
        assert folder.summary.exists()
        assert (folder.model / "model.safetensors").exists()
        raise ZeroDivisionError("no such luck")

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_report", fail)
        classifier = train(tiny.dataset(), out=folder, **tiny.PLAIN)
    err = capsys.readouterr().err.replace("\n", " ")
    assert "warning: the run is saved, but could not write its report: no such luck" in " ".join(err.split())
    assert not (folder / "report.html").exists()
    assert classifier.report == json.loads((folder / "summary.json").read_text())
    with pytest.raises(SystemExit) as left:
        main(["report", str(folder)])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"{folder}/report.html\n"
    assert_figures(report_of(folder), folder)


def test_a_report_can_be_made_again_from_the_folder_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, epochs=1)
    first = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    assert write_report(RunFolder(folder)).read_text() == first
    (folder / "details.json").unlink()  # a run of an earlier version
    (folder / "sessions.jsonl").unlink()
    write_report(RunFolder(folder))
    page = report_of(folder)
    assert_figures(page, folder)
    assert "no details.json" in page.text
    assert "Calibration" not in [one.text for one in page.all("h2")]


def test_what_is_no_finished_run_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        write_report(RunFolder(tmp_path))
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(RunError, match="not finished"):
        write_report(RunFolder(tmp_path))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"epochs": 1}, "Best epoch: 1 of 1"),
        ({"epochs": 0}, "The model was not trained."),
        ({"epochs": 2, "splits": ("train", "test")}, "Weights of the last epoch, 2; there were no validation images."),
        ({"epochs": 2, "splits": ("train", "val")}, "also used for model selection"),
        ({"epochs": 1, "splits": ("train",)}, "the training images"),
        ({"epochs": 2, "eval_every": 2}, "Best epoch: 2 of 2"),
        ({"epochs": 1, "layer_decay": 0.5, "mixup": 0.0, "cutmix": 0.0}, "Best epoch: 1 of 1"),
    ],
)
def test_every_kind_of_run_has_one(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    data = tiny.dataset()
    for name in set(data.splits) - set(keys.pop("splits", data.splits)):
        del data.splits[name]
    train(data, out=tmp_path / "run", progress=False, **{**tiny.PLAIN, **keys})
    page = report_of(tmp_path / "run")
    assert_figures(page, tmp_path / "run")
    assert words in page.text
    assert len(page.all("figure")) >= (1 if keys["epochs"] == 0 else 3 if "val" in data.splits else 2)


def test_a_probe_has_one(tmp_path: Path) -> None:
    train(tiny.dataset(), probe=True, model=tiny.VARIANT.name, device="cpu", out=tmp_path / "run", progress=False)
    page = report_of(tmp_path / "run")
    summary = assert_figures(page, tmp_path / "run")
    assert f"top-1 {summary['knn_top1']:.2f} %" in page.text
    assert [one.text for one in page.section("Training curves").all("h3")] == ["Loss", "Top-1 accuracy"]
    assert "Metrics of each fit" in page.text


def test_a_distilled_run_names_its_teacher(tmp_path: Path) -> None:
    run(tmp_path / "teacher", epochs=0)
    teacher = str(tmp_path / "teacher")
    run(tmp_path / "run", epochs=1, teacher=teacher, distill="soft", distill_weight=0.25)
    page = report_of(tmp_path / "run")
    assert_figures(page, tmp_path / "run")
    assert ["teacher", f"{teacher} (soft, 0.25 of the loss)"] in page.section("Run details").rows()


def test_epochs_without_a_loss_are_left_out_of_the_curve(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    run(folder.path, epochs=2)
    first, second = (json.loads(line) for line in folder.metrics.read_text().splitlines())
    folder.write_metrics([first, {**second, "train_loss": None, "val_loss": float("nan")}])
    folder.write_json(folder.summary, {**json.loads(folder.summary.read_text()), "skipped_steps": 5, "rollbacks": 2})
    with pytest.raises(RunError, match=r"metrics\.jsonl was changed"):
        write_report(folder)
    folder.write_checksums()
    write_report(folder)
    page = report_of(folder.path)
    loss = page.section("Training curves").all("figure")[0]
    assert [len((line.attributes["points"] or "").split()) for line in loss.all("polyline")] == [1, 1]
    words = "5 with a loss or gradient that was not finite, 2 rollbacks"
    assert ["skipped steps", words] in page.section("Run details").rows()


def test_a_resumed_run_tells_of_all_its_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, original = tmp_path / "run", Trainer.step

    def step(self: Trainer, batch: Any, *rest: Any) -> None:
        if self.state.steps == 6:
            raise Stopped("stopped", 2)
        original(self, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(Stopped):
            run(folder, epochs=2, checkpoint_every=3)
    train(tiny.dataset(), resume=folder, progress=False, command="vitrail train --resume 'my run'")
    page = report_of(folder)
    made = page.section("Run details")
    assert [one.text for one in made.all("pre")][1] == "vitrail train --resume 'my run'"
    assert "Started" in made.text
    assert "Resumed at step 6" in made.text
    for line in page.section("Training curves").all("polyline"):
        assert len((line.attributes["points"] or "").split()) == 2


# --- many classes, without training


def evaluation(classes: int, images: int, right: float = 0.8) -> Evaluation:
    """A made-up classifier, right in this share of the images."""
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, images)
    predicted = np.where(rng.random(images) < right, labels, (labels + rng.integers(1, 4, images)) % classes)
    confidence = rng.uniform(1 / classes, 1, images)
    records = Records(np.arange(images), labels, predicted, confidence, -np.log(confidence), predicted == labels)
    return Evaluation(records, tuple(f"class number {k}" for k in range(classes)), "test")


@pytest.fixture(scope="module")
def like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of one epoch."""
    folder = tmp_path_factory.mktemp("like") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tiny.add_variant(patch)
        run(folder, epochs=1)
    return folder


def made_up_run(folder: Path, result: Evaluation, like: Path) -> RunFolder:
    """The folder of a run whose evaluation this is; the rest is of the run `like`."""
    made = RunFolder(folder)
    folder.mkdir()
    for name in ("config.toml", "metrics.jsonl", "sessions.jsonl"):
        (folder / name).write_text((like / name).read_text())
    made.write_json(made.summary, {**json.loads((like / "summary.json").read_text()), **result.to_dict()})
    made.write_json(made.details, report_details(result, None))
    write_report(made)
    return made


@pytest.mark.parametrize(("classes", "images"), [(2, 100), (10, 2000), (20, 1000), (21, 1000), (1000, 20000)])
def test_any_number_of_classes_is_readable(classes: int, images: int, tmp_path: Path, like: Path) -> None:
    result = evaluation(classes, images)
    made_up_run(tmp_path / "run", result, like)
    page = report_of(tmp_path / "run")
    truth = confusion_matrix(result.records.labels, result.records.predicted, labels=range(classes))
    headings = [one.text for one in page.all("h2")]
    if classes <= 20:
        matrix = page.section("Confusion matrix").rows()
        assert [[int(cell or 0) for cell in row[1:-1]] for row in matrix] == truth.tolist()
        assert "Most confused classes" not in headings
    else:
        assert "Confusion matrix" not in headings
        rows = page.section("Most confused classes").rows()
        assert len(rows) == 20
        np.fill_diagonal(truth, 0)
        for label, predicted, count, share in rows:
            k, j = int(label.split()[-1]), int(predicted.split()[-1])
            assert truth[k, j] == int(count)
            assert share == f"{100 * truth[k, j] / (result.records.labels == k).sum():.1f} %"
        assert sorted((int(row[2]) for row in rows), reverse=True) == np.sort(truth.ravel())[::-1][:20].tolist()
    lists = page.section("Accuracy by class").all("table")
    assert sum(len(one.all("tr")) - 1 for one in lists) == classes
    assert len(lists[0].all("tr")) - 1 == min(classes, 20)
    limit = 1_000_000 if classes <= 10 else 2_000_000
    assert (tmp_path / "run" / "report.html").stat().st_size < limit


def test_confused_and_calibration_count_every_image() -> None:
    result = evaluation(7, 500)
    truth = confusion_matrix(result.records.labels, result.records.predicted, labels=range(7))
    found = np.zeros_like(truth)
    for label, predicted, count in confused_pairs(result):
        found[label, predicted] = count
    assert found.tolist() == (truth - np.diag(truth.diagonal())).tolist()
    bins = calibration_bins(result.records.confidence, result.records.correct)
    assert sum(row["images"] for row in bins) == 500
    gaps = sum(row["images"] * abs(row["confidence"] - row["accuracy"]) for row in bins) / 500
    assert gaps == pytest.approx(result.ece)


def test_thumbnails_are_small_and_whole() -> None:
    def opened(image: Image.Image) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(thumbnail(image).partition("base64,")[2])))

    tiny_image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    assert np.array_equal(np.asarray(opened(tiny_image)), np.asarray(tiny_image))
    noise = np.random.default_rng(0).integers(0, 255, (900, 300, 3), np.uint8)
    assert opened(Image.fromarray(noise)).size == (32, 96)
    assert len(thumbnail(Image.fromarray(np.random.default_rng(0).integers(0, 255, (500, 500, 3), np.uint8)))) < 20_000


# --- charts


@pytest.mark.parametrize(
    ("low", "high", "integer", "expected"),
    [
        (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 2.31, False, [0, 0.5, 1, 1.5, 2, 2.5]),
        (91.7, 99.2, False, [90, 92, 94, 96, 98, 100]),
        (0, 1e-3, False, [0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3]),
        (1, 3, True, [1, 2, 3]),
        (1, 300, True, [0, 100, 200, 300]),
        (5, 5, False, [2, 4, 6, 8]),
    ],
)
def test_ticks_are_round_and_take_in_the_ends(
    low: float, high: float, integer: bool, expected: Sequence[float]
) -> None:
    found = ticks(low, high, integer=integer)
    assert found[0] <= low
    assert found[-1] >= high
    assert found == pytest.approx(expected)


def test_ticks_of_any_range() -> None:
    rng = np.random.default_rng(0)
    for low, size in zip(rng.normal(0, 100, 200), 10.0 ** rng.uniform(-6, 6, 200), strict=True):
        found = np.array(ticks(low, low + size))
        assert found[0] <= low + 1e-6 * size
        assert found[-1] >= low + size - 1e-6 * size
        assert 2 <= len(found) <= 7
        assert np.allclose(np.diff(found), found[1] - found[0])


def test_points_lie_where_their_values_say() -> None:
    svg = parse(line_chart([Series("loss", [(1, 2.0), (2, 1.0), (3, 0.0)])], title="t", x_label="epoch", y_label="y"))
    (line,) = svg.all("polyline")
    points = [tuple(map(float, pair.split(","))) for pair in (line.attributes["points"] or "").split()]
    assert points == [(46, 24), (198, 105), (350, 186)]  # from corner to corner of the axes, and the middle
    assert [one.text for one in svg.all("circle")] == ["loss, epoch 1: 2", "loss, epoch 2: 1", "loss, epoch 3: 0"]


def test_what_is_no_number_is_not_drawn() -> None:
    nan, inf = float("nan"), float("inf")
    assert line_chart([Series("a", [(1, nan)])], title="t", x_label="x", y_label="y") == ""
    svg = parse(line_chart([Series("a", [(1, 1.0), (2, inf), (3, 2.0)])], title="t", x_label="x", y_label="y"))
    assert len(svg.all("circle")) == 2


def test_short_words() -> None:
    assert [format_number(x) for x in (0, 0.25, 40, 2e-5, 1.25e-4, 12000)] == [
        "0",
        "0.25",
        "40",
        "2e-5",
        "1.25e-4",
        "12,000",
    ]
    assert escape_unprintable("a\u202eb\x00c\udcffd\n") == "a\\u202eb\\x00c\\udcffd\n"


def test_the_report_needs_no_torch(tmp_path: Path, like: Path) -> None:
    shutil.copytree(like, tmp_path / "run")
    code = "import sys; from vitrail.cli import main\ntry: main(['report', sys.argv[1]])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "run"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert make_report(RunFolder(tmp_path / "run"))


def test_top5_is_shown_of_six_classes_and_not_of_five() -> None:
    summary = {"top1": 50.0, "top5": 90.0, "loss": 1.0, "ece": 0.1, "images": 10, "split": "test", "seconds": 1.0}
    summary |= {"images_per_second": 1.0, "waiting_for_data": 0.0}
    for classes, shown in ((5, False), (6, True)):
        found = metric_cards({**summary, "per_class": [{"label": str(k)} for k in range(classes)]})
        assert ("Top-5 accuracy" in [card["name"] for card in found]) == shown
