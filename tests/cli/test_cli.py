"""The command line: outputs that other tools read, and errors of one line."""

import csv
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.classifier import Classifier, load
from vitrail.cli import main
from vitrail.errors import VitrailError
from vitrail.images.preprocess import Preprocess
from vitrail.models.build import build_model
from vitrail.models.catalog import VARIANTS
from vitrail.models.configs import ViTConfig

CONFIG = ViTConfig(img_size=(8, 8), patch_size=2, embed_dim=16, depth=1, num_heads=2, num_classes=10, in_chans=1)


class Done(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> Done:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return Done(caught.value.code, out, err)

    return run


def make_model(folder: Path, classes: int = 10) -> Path:
    torch.manual_seed(1)
    model = build_model(replace(CONFIG, num_classes=classes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    preprocess = Preprocess(size=(8, 8), mean=(0.5,), std=(0.3,), channels=1)
    return Classifier(model, preprocess, [str(k) for k in range(classes)]).save(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three good images and two broken ones."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "ü c.png"):
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(folder / name)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    return folder


# --- help and errors


def test_help_has_every_command_and_an_example_for_each(run: Run) -> None:
    overview = run("--help")
    assert overview.status == 0
    for command in ("train", "evaluate", "predict", "models"):
        assert f" {command} " in overview.out
        one = run(command, "--help")
        assert one.status == 0
        assert f"Example: vitrail {command} " in one.out
        assert run(command, "-h").out == one.out


def test_the_help_of_train_has_every_key_of_the_config(run: Run) -> None:
    from vitrail.training.config.schema import KEYS

    text = run("train", "--help").out
    words = set(text.replace("--", " ").replace("-", "_").split())
    assert set(KEYS) - words == set()


def test_the_version(run: Run) -> None:
    import vitrail

    assert run("--version") == (0, vitrail.__version__ + "\n", "")


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["trian"], "'trian'.*'train'.*`vitrail --help`"),
        (["predict"], "'MODEL'.*`vitrail predict --help`"),
        (["predict", "m"], r"'PATH\.\.\.'.*`vitrail predict --help`"),
        (["predict", "m", "x", "--topp", "3"], "--topp"),
        (["predict", "m", "x", "--top", "three"], "--top"),
        (["predict", "m", "x", "--top", "0"], "--top"),
        (["predict", "no/such/model", "x.jpg"], "no/such/model"),
        (["evaluate", "no/such/model", "digits"], "no/such/model"),
        (["models", "swni_tiny"], "'swni_tiny'.*'swin_tiny'"),
        (["train"], "--resume"),
        (["train", "no/such/data"], "no/such/data"),
        (["train", "digit"], "'digits'"),
        (["train", "digits", "--model", "vit_tinny_patch16_224"], "'vit_tiny_patch16_224'"),
        (["train", "digits", "epoch=3"], "'epoch'.*'epochs'"),
        (["train", "digits", "lr"], "'lr'.*key=value"),
        (["train", "digits", "lr=fast"], "lr .*'fast'"),
        (["train", "digits", "--epochs", "3", "epochs=4"], "--epochs.* epochs="),
        (["train", "digits", "--device", "abacus"], "'abacus'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], facts: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.status == 2
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert re.search(facts, line)
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where_an_error_comes_from(run: Run) -> None:
    for arguments in (["--debug", "models", "nope"], ["models", "nope", "--debug"]):
        done = run(*arguments)
        assert done.status == 2
        assert "Traceback" in done.err
        assert re.fullmatch("error: .*'nope'.*", done.err.splitlines()[-1])


@pytest.mark.parametrize(
    ("error", "status", "last"),
    [
        (VitrailError("a line"), 2, "error: a line"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 2, "error: runs/x: no space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "error: x: permission denied"),
        (KeyboardInterrupt(), 130, "stopped"),
        (ZeroDivisionError("oh"), 1, "error: ZeroDivisionError: oh"),
    ],
)
def test_exit_status_and_last_line_of_an_exception(
    error: BaseException, status: int, last: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(pattern: str) -> list[str]:
        raise error

    monkeypatch.setattr("vitrail.models.catalog.list_models", fail)
    done = run("models")
    assert done.status == status
    assert (done.err.splitlines() or [""])[-1].startswith(last)
    assert ("Traceback" in done.err) == (status == 1)


def test_a_closed_pipe_is_not_an_error() -> None:
    """Closed before the output or during it."""
    for code in ("print('x' * 10**6)", "raise BrokenPipeError"):
        script = (
            "import vitrail.models.catalog as c\n"
            "from vitrail.cli import main\n"
            f"def gone(pattern):\n    {code}\n    return ['resnet18']\n"
            "c.list_models = gone\n"
            "main(['models'])"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.close()
        assert process.communicate(timeout=60)[1] == ""


def test_python_m_vitrail_is_vitrail(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vitrail", "models", "resnet18", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert [row["name"] for row in json.loads(done.stdout)] == ["resnet18"]
    assert done.stderr == ""


# --- models


def test_models_as_json(run: Run) -> None:
    rows = json.loads(run("models", "--json").out)
    assert [row["name"] for row in rows] == list(VARIANTS)
    assert {tuple(row) for row in rows} == {("name", "family", "params", "gmacs", "input_size", "weights")}
    (deit,) = json.loads(run("models", "deit_tiny_patch16_224", "--json").out)
    assert (deit["family"], deit["params"], deit["input_size"]) == ("deit", 5717416, [3, 224, 224])
    assert deit["weights"][0]["tag"] == "fb_in1k"
    assert deit["weights"][0]["licence"] == "apache-2.0"
    assert 72 < deit["weights"][0]["top1"] < 73


def test_models_as_a_table_fits_80_columns(run: Run) -> None:
    lines = run("models").out.splitlines()
    assert len(lines) == len(VARIANTS) + 1
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["model", "params", "GMACs", "input", "top-1", "licence"]
    (row,) = run("models", "deit_tiny_patch16*").out.splitlines()[1:]
    assert row.split() == ["deit_tiny_patch16_224", "5.7", "M", "1.3", "224", "72.2", "%", "apache-2.0"]
    assert len(run("models", "distilled").out.splitlines()) == 1 + sum("distilled" in name for name in VARIANTS)


# --- predict


def test_predict_as_json_is_an_object_a_line(run: Run, model: Path, photos: Path) -> None:
    done = run("predict", model, photos, "--json")
    assert done.status == 0
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [Path(row["path"]).name for row in rows] == ["a.png", "b.jpg", "empty.png", "text.jpg", "ü c.png"]
    assert rows == [p.to_dict() for p in load(model).predict(photos)]
    assert [sorted(row) for row in rows[1:3]] == [["label", "path", "score", "top"], ["error", "path"]]
    assert [len(row["top"]) for row in rows if "top" in row] == [5, 5, 5]
    assert done.err == ""
    assert "ü c.png" in done.out


def test_predict_as_csv(run: Run, model: Path, photos: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(run("predict", model, photos, "--csv").out)))
    assert list(rows[0]) == ["path", "label", "score", "error"]
    expected = load(model).predict(photos)
    assert [row["label"] or None for row in rows] == [p.label for p in expected]
    assert [float(row["score"]) if row["score"] else None for row in rows] == [p.score for p in expected]
    assert [row["error"] or None for row in rows] == [p.error for p in expected]
    rows = list(csv.DictReader(io.StringIO(run("predict", model, photos, "--csv", "--top", 3).out)))
    assert list(rows[0])[4:] == ["label_2", "score_2", "label_3", "score_3"]
    assert rows[0]["label_3"] == expected[0].top[2].label


def test_predict_as_a_table(run: Run, model: Path, photos: Path) -> None:
    done = run("predict", model, photos, "--top", 2)
    lines = done.out.splitlines()
    assert lines[0].split() == ["image", "label", "score", "or"]
    best = load(model).predict(photos / "a.png")[0].top
    assert lines[1].split() == [
        str(photos / "a.png"), best[0].label, f"{100 * best[0].score:.1f}", "%",
        best[1].label, f"{100 * best[1].score:.1f}", "%",
    ]  # fmt: skip
    assert len(lines) == 4
    lines = done.err.splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, ("empty.png", "text.jpg"), strict=True):
        assert line.startswith(f"error: {photos / name} ")
    assert done.status == 0


@pytest.mark.parametrize("form", [[], ["--json"], ["--csv"]])
def test_predict_fails_when_no_image_could_be_read(run: Run, model: Path, photos: Path, form: list[str]) -> None:
    done = run("predict", model, photos / "empty.png", photos / "*.tiff", "gone.jpg", *form)
    assert done.status == 2
    assert re.fullmatch("error: .*3 images.*", done.err.splitlines()[-1])
    assert len(done.out.splitlines()) == {"": 0, "--json": 3, "--csv": 4}["".join(form)]


def test_predict_prints_json_or_csv(run: Run, model: Path) -> None:
    done = run("predict", model, "x.jpg", "--json", "--csv")
    assert done.status == 2
    assert re.fullmatch("error: .*--json.*--csv.*\n", done.err)


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_a_file_name_that_is_not_utf8_is_printed(model: Path, photos: Path) -> None:
    os.rename(os.fsencode(photos / "a.png"), os.fsencode(photos) + b"/caf\xe9.png")
    command = [sys.executable, "-m", "vitrail", "predict", str(model), str(photos), "--json"]
    done = subprocess.run(command, capture_output=True, check=True, env={**os.environ, "PYTHONUTF8": "1"})
    paths = [json.loads(line)["path"] for line in done.stdout.splitlines()]
    assert os.fsencode(photos) + b"/caf\xe9.png" in [os.fsencode(path) for path in paths]


# --- evaluate


def test_evaluate_as_json(run: Run, model: Path) -> None:
    done = run("evaluate", model, "digits", "--json")
    record = json.loads(done.out)
    assert {"top1", "top5", "loss", "images", "split", "skipped", "per_class"} <= record.keys()
    assert record == json.loads(json.dumps(load(model).evaluate("digits").to_dict()))
    assert (record["images"], record["split"], record["skipped"]) == (360, "test", [])
    assert done.err == ""
    assert json.loads(run("evaluate", model, "digits", "--json", "--split", "val").out)["split"] == "val"


def test_evaluate_as_text(run: Run, model: Path) -> None:
    result = load(model).evaluate("digits")
    lines = run("evaluate", model, "digits").out.splitlines()
    assert lines[0] == "360 test images of digits"
    assert lines[2].split() == ["top-1", f"{result.top1:.2f}", "%", "top-5", f"{result.top5:.2f}", "%"]
    assert lines[3].split()[:2] == ["loss", f"{result.loss:.4f}"]
    worst = [line.split() for line in lines[6:]]
    shares = {row["label"]: row["top1"] for row in result.per_class}
    assert [float(row[2]) for row in worst] == sorted(round(share, 1) for share in shares.values() if share < 100)
    label = worst[0][0]
    row = result.confusion[int(label)].copy()
    row[int(label)] = 0
    assert worst[0][4] == str(row.argmax())
    assert worst[0][5].startswith(f"({row.max()})")


@pytest.mark.parametrize("precision", ["auto", "off", "bf16"])
def test_precision_is_the_same_option_of_three_commands(
    precision: str, run: Run, model: Path, photos: Path, tmp_path: Path
) -> None:
    clf, option = load(model, precision=precision), ("--precision", precision)
    rows = [json.loads(line) for line in run("predict", model, photos, "--json", *option).out.splitlines()]
    assert rows == [p.to_dict() for p in clf.predict(photos)]
    record = json.loads(run("evaluate", model, "digits", "--json", *option).out)
    assert record == json.loads(json.dumps(clf.evaluate("digits").to_dict()))
    run("embed", model, photos, "--out", tmp_path / "f.npy", *option)
    good = [row["path"] for row in rows if "label" in row]
    assert np.array_equal(np.load(tmp_path / "f.npy"), clf.embed(good))
    other = load(model, precision="off" if precision == "bf16" else "bf16")
    assert other.evaluate("digits").loss != record["loss"]


def test_an_unknown_precision_is_an_error(run: Run, model: Path) -> None:
    for command in (("predict", model, "x.jpg"), ("evaluate", model, "digits"), ("embed", model, "x.jpg")):
        done = run(*command, "--precision", "fp8")
        assert (done.status, done.out) == (2, "")
        assert "'fp8'" in done.err


def test_evaluate_names_what_it_skipped(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for k in range(2):
        (folder / str(k)).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (8, 8), 40 * i + k).save(folder / str(k) / f"{i}.png")
    (folder / "0" / "x.png").write_bytes(b"")
    model = make_model(tmp_path / "model", classes=2)
    done = run("evaluate", model, folder, "--split", "train")
    assert done.status == 0
    (line,) = done.err.splitlines()
    assert line.startswith(f"skipped: {folder / '0' / 'x.png'} ")


# --- train


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """What `vitrail.train` would be called with."""
    calls = []

    def train(data: Any, **options: Any) -> SimpleNamespace:
        calls.append((data, options))
        return SimpleNamespace(report={"top1": 99.5, "split": "test"})

    monkeypatch.setattr("vitrail.training.run.train", train)
    return calls


def test_train_passes_on_the_given_options_only(run: Run, called: list[tuple[Any, dict[str, Any]]]) -> None:
    assert run("train", "photos/") == (0, "", "")
    run("train", "photos/", "lr=1e-3", "--epochs", 2.5, "img_size=32x48", "--pretrained", "--budget", "10m", "flip=0.5")
    run("train", "digits", "--model", "resnet18", "--out", "r", "--seed", 3, "--device", "cpu", "--data-dir", "d")
    run("train", "--resume", "runs/x", "workers=2")
    run("train", "--resume", "runs/x")
    run("train", "my photos/", "--show-batch", "b.png")
    commands = [given.pop("command") for _, given in called]  # as they were typed
    assert commands[0] == "vitrail train photos/"
    assert commands[3] == "vitrail train --resume runs/x workers=2"
    assert commands[5] == "vitrail train 'my photos/' --show-batch b.png"
    assert called == [
        ("photos/", {}),
        (
            "photos/",
            {"lr": "1e-3", "epochs": 2.5, "img_size": "32x48", "pretrained": True, "budget": "10m", "flip": "0.5"},
        ),
        ("digits", {"model": "resnet18", "out": "r", "seed": 3, "device": "cpu", "data_dir": "d"}),
        (None, {"resume": "runs/x", "workers": "2"}),
        (None, {"resume": "runs/x"}),
        ("my photos/", {"show_batch": "b.png"}),
    ]


def test_train_prints_its_summary_as_json(run: Run, called: list[tuple[Any, dict[str, Any]]]) -> None:
    assert json.loads(run("train", "photos/", "--json").out) == {"top1": 99.5, "split": "test"}


def test_from_training_to_prediction(run: Run, tmp_path: Path) -> None:
    """Each command reads the output of the one before."""
    data = tmp_path / "data"
    rng = np.random.default_rng(0)
    for name, low, high in (("dark", 0, 90), ("light", 160, 255)):
        (data / name).mkdir(parents=True)
        for i in range(30):
            Image.fromarray(rng.integers(low, high, (8, 8, 3), dtype=np.uint8)).save(data / name / f"{i:02}.png")
    out = tmp_path / "run"
    arguments = ["--model", "vit_nano_patch2_8", "batch_size=16", "--epochs", 3]
    done = run("train", data, *arguments, "--out", out, "--json", "--device", "cpu")
    assert done.status == 0, done.err
    summary = json.loads(done.out)
    assert summary == json.loads((out / "summary.json").read_text())
    record = json.loads(run("evaluate", out, data, "--json").out)
    assert (record["top1"], record["split"]) == (summary["top1"], summary["split"])
    assert record["top1"] > 80
    rows = [json.loads(line) for line in run("predict", out, data / "light", "--json").out.splitlines()]
    assert len(rows) == 30
    assert sum(row["label"] == "light" for row in rows) > 24


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no such signals there")
def test_ctrl_c_saves_the_run_and_exits_with_130(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vitrail", "train", "digits", "--model", "vit_nano_patch2_8"]
    command += ["--out", str(tmp_path / "run"), "--epochs", "1000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epoch "):  # in the midst of it
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert f"--resume {tmp_path / 'run'}" in rest
    assert "Traceback" not in rest


def test_a_model_that_needs_torch_where_it_is_not_installed(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    code = "import sys; sys.modules['torch'] = None; from vitrail.cli import main; main(['predict', *sys.argv[1:]])"
    done = subprocess.run([sys.executable, "-c", code, str(folder), "a.png"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "PyTorch" in done.stderr
