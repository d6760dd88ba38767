"""What Python and notebooks show of classifiers, evaluations, predictions and runs: figures, pictures, no markup."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training import tiny
from vitrail.classifier import Classifier, load
from vitrail.errors import ConfigError, DeviceError
from vitrail.evaluation.calibration import calibration_bins
from vitrail.evaluation.metrics import Evaluation
from vitrail.reports import notebook, plots
from vitrail.reports.run_summary import RunSummary
from vitrail.training.run import train

HOSTILE = '<script>alert("x")</script>&\x00\u202e'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, Path]:
    """A trained classifier of three classes, one of a hostile name, and its run."""
    folder = tmp_path_factory.mktemp("notebook") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tiny.add_variant(patch)
        patch.setattr(plots, "available", lambda: True)
        classifier = train(data(), out=folder, progress=False, **{**tiny.PLAIN, "epochs": 3})
    return classifier, folder


def data() -> Any:
    dataset = tiny.dataset()
    dataset.class_names = ("one", "two", HOSTILE)
    return dataset


@pytest.fixture
def evaluation(run: tuple[Classifier, Path]) -> Evaluation:
    return run[0].evaluate(data())


class Page(HTMLParser):
    """Tags and text of a piece of HTML; all tags are closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.pictures: list[Image.Image] = []
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)
        if tag == "img":
            uri = dict(attributes)["src"]
            self.pictures.append(Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))))
        else:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.text += f"{text}\n"


def test_reprs_are_a_line_of_figures(run: tuple[Classifier, Path], evaluation: Evaluation) -> None:
    classifier, folder = run
    summary = json.loads((folder / "summary.json").read_text())
    top1 = f"test top-1 {summary['top1']:.2f} %"
    assert repr(classifier) == f"Classifier(vit_test_patch2_8, 3 classes, 8x8 pixels, {top1})"
    for found in (classifier.report, load_summary(folder)):
        assert found == summary
        assert repr(found).startswith(f"RunSummary({folder}: model vit_test_patch2_8, {top1} of 15 images, loss ")
        assert re.search(r"best epoch [123] of 3", repr(found))
    ece = f"calibration error {100 * summary['ece']:.2f} %"
    assert repr(evaluation) == f"Evaluation({top1}, loss {summary['loss']:.4f}, {ece}, images 15)"
    (found,) = classifier.predict(np.zeros((8, 8), np.uint8))
    assert repr(found) == f"Prediction(path=None, label={found.label!r}, score={found.score:.3f})"
    assert repr(classifier.predict("gone.png")) == "[Prediction(path='gone.png', error='does not exist')]"


def load_summary(folder: Path) -> Any:
    return RunSummary(json.loads((folder / "summary.json").read_text()), folder)


def test_a_loaded_run_has_its_summary(run: tuple[Classifier, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)
    assert isinstance(load(run[1]).report, RunSummary)


def test_top5_is_shown_for_more_than_five_classes(evaluation: Evaluation) -> None:
    assert "top-5" not in repr(evaluation)
    six = Evaluation(evaluation.records, (*evaluation.class_names, "d", "e", "f"), "test")
    assert "top-5" in repr(six)


def test_html_is_escaped_and_has_pictures(run: tuple[Classifier, Path], evaluation: Evaluation, tmp_path: Path) -> None:
    classifier, _ = run
    Image.new("RGB", (300, 200), "red").save(tmp_path / "<b>.png")
    images = list(tiny.images(4, 5).images)
    predictions = classifier.predict(images)
    wrong = int((~evaluation.records.correct).sum())
    for shown, pictures in (
        (classifier, 0),
        (evaluation, min(wrong, 12)),
        (predictions, 4),
        (predictions[0], 1),
        (classifier.predict([tmp_path / "<b>.png", "gone.png"]), 1),
        (classifier.report, 0),
    ):
        html = shown._repr_html_()
        page = Page(html)
        assert set(page.tags) <= {"div", "b", "table", "tr", "td", "th", "caption", "img"}
        assert len(page.pictures) == pictures
        assert not re.search(r"[\x00\u202e]", html)
    assert any("<script>" in Page(shown._repr_html_()).text for shown in (classifier, evaluation))
    small = Page(predictions._repr_html_()).pictures[2]
    np.testing.assert_array_equal(np.asarray(small.convert("L")), images[2])
    page = Page(classifier.predict(tmp_path / "<b>.png")._repr_html_())
    assert "<b>.png" in page.text
    assert max(page.pictures[0].size) <= 96


def test_errors_are_those_with_the_highest_scores(run: tuple[Classifier, Path]) -> None:
    dataset = data()
    dataset.splits["test"].labels = (dataset.splits["test"].labels + 1) % 3  # nearly all are wrong
    evaluation = run[0].evaluate(dataset)
    records = evaluation.records
    first = max(np.flatnonzero(~records.correct), key=lambda row: records.confidence[row])
    page = Page(evaluation._repr_html_())
    expected = dataset.splits["test"].image(int(records.indices[first]))
    np.testing.assert_array_equal(np.asarray(page.pictures[0].convert("L")), np.asarray(expected))
    assert f"and {int((~records.correct).sum()) - 12} more" in page.text


def test_the_matrix_has_all_counts(evaluation: Evaluation) -> None:
    page = Page(notebook.confusion_table(evaluation.confusion, evaluation.class_names))
    numbers = [int(line) for line in page.text.split("\n") if line.strip().isdigit()]
    assert numbers == [count for count in evaluation.confusion.flatten().tolist() if count]
    assert notebook.confusion_table(np.zeros((13, 13), np.int64), ["x"] * 13) == ""


def test_images_of_a_stream_are_not_kept(run: tuple[Classifier, Path]) -> None:
    images = list(tiny.images(2, 5).images)
    assert all(each.image is not None for each in run[0].predict(images))
    assert all(each.image is None for each in run[0].predict(image for image in images))
    assert all(each.image is None for each in run[0].stream(images))


# --- plots


@pytest.fixture
def with_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "available", lambda: True)


@pytest.mark.usefixtures("with_plots")
def test_plots_show_the_numbers(run: tuple[Classifier, Path], evaluation: Evaluation) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    classifier, folder = run
    for ax in (evaluation.plot(), classifier.report.plot("confusion")):
        texts = sorted(int(text.get_text()) for text in ax.texts)
        assert texts == sorted(count for count in evaluation.confusion.flatten().tolist() if count)
        shares = evaluation.confusion / evaluation.confusion.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(ax.images[0].get_array(), shares)
    bins = calibration_bins(evaluation.records.confidence, evaluation.records.correct)
    for ax in (evaluation.plot("calibration"), classifier.report.plot("calibration")):
        assert [bar.get_height() for bar in ax.patches] == pytest.approx([each["accuracy"] for each in bins])
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curves = {line.get_label(): line for line in classifier.report.plot().lines}
    for name, key in (("training", "train_loss"), ("validation", "val_loss")):
        assert curves[name].get_ydata() == pytest.approx([row[key] for row in history])
        assert list(curves[name].get_xdata()) == [1, 2, 3]
    (rate,) = (line for line in classifier.report.plot("lr").lines)
    assert rate.get_ydata() == pytest.approx([row["lr"] for row in history])
    _, ax = mpl.pyplot.subplots()
    assert evaluation.plot(ax=ax) is ax
    mpl.pyplot.close("all")
    with pytest.raises(ConfigError, match="confusion, calibration"):
        evaluation.plot("matrix")


def test_without_matplotlib_one_line_says_so(evaluation: Evaluation, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"matplotlib.*plot"):
        evaluation.plot()
    assert RunSummary({}, tmp_path).write_plots() == []


def test_png_files_are_beside_the_report(run: tuple[Classifier, Path]) -> None:
    names = {path.name for path in (run[1] / "plots").iterdir()}
    assert names == {"loss.png", "top1.png", "lr.png", "confusion.png", "calibration.png"}
    for name in names:
        pixels = np.asarray(Image.open(run[1] / "plots" / name).convert("L"))
        assert pixels.shape == (576, 768)
        assert pixels.min() < 80
        assert pixels.max() == 255


@pytest.mark.usefixtures("with_plots")
def test_a_run_is_shown_with_its_curves(run: tuple[Classifier, Path]) -> None:
    assert len(Page(run[0].report._repr_html_()).pictures) == 2
