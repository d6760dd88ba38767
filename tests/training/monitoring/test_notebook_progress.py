"""Progress in a notebook: a real kernel trains, and its output is plain text on stdout with a line per epoch."""

import sys
from pathlib import Path

import pytest

from vitrail.training.monitoring.progress import Reporter
from vitrail.utils import console

TRAIN = """
import vitrail
classifier = vitrail.train("digits", model="vit_nano_patch2_8", epochs=5, out="run", device="cpu", threads=1)
"""


class ZMQInteractiveShell:
    """Of the name of Jupyter's."""


class Jupyter:
    get_ipython = ZMQInteractiveShell


def test_lines_go_to_stdout_one_per_epoch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for notebook, expected in ((True, ["epoch 1", "epoch 2", "epoch 3"]), (False, ["epoch 1", "epoch 3"])):
        monkeypatch.setitem(sys.modules, "IPython", Jupyter if notebook else None)
        assert console.in_notebook() is notebook
        reporter = Reporter()
        for epoch in (1, 2, 3):
            reporter.epoch(f"epoch {epoch}", last=epoch == 3)
        found = capsys.readouterr()
        assert (found.out if notebook else found.err).splitlines() == expected
        assert (found.err if notebook else found.out) == ""


@pytest.mark.slow
def test_a_kernel_shows_training_and_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    source = Path(console.__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", str(source))
    cells = [TRAIN, "classifier.evaluate('digits')", "classifier.report.plot('loss')", "classifier.report"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    train, evaluation, plot, run = (cell.outputs for cell in book.cells)
    assert {(each.output_type, each.get("name")) for each in train} == {("stream", "stdout")}  # a notebook joins them
    text = "".join(each.text for each in train)
    lines = text.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("epoch")] == [f"{epoch}/5" for epoch in range(1, 6)]
    assert "\x1b" not in text
    assert "<table" in evaluation[0].data["text/html"]
    assert "Evaluation(test top-1" in evaluation[0].data["text/plain"]
    assert any("image/png" in each.get("data", {}) for each in plot)
    assert "data:image/png" in run[0].data["text/html"]
