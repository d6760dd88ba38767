"""`train` as a whole: the run folder, stopping and going on, refusals."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import vitrail
from tolerance import LOSS
from training import tiny
from training.runs import KEYS, outcome, run
from vitrail.errors import ConfigError, DeviceError, ModelError, RunError, VitrailError
from vitrail.training.config.schema import read_config
from vitrail.training.engine.trainer import Trainer
from vitrail.training.run import train
from vitrail.training.session import Session


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


def test_a_run_folder(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    classifier = run(tmp_path / "run", epochs=6, ema=0.5, mixup=0.0, cutmix=0.0)
    assert torch.equal(torch.rand(1), expected), "the caller's random numbers were touched"

    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"top1", "top5", "loss", "seconds", "images_per_second", "params", "split", "skipped"} <= summary.keys()
    assert summary["split"] == "test"
    assert summary["images"] == 15
    assert summary["params"] == sum(p.numel() for p in classifier.model.parameters())
    assert summary["train_images"] == 6 * 50
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]
    # The best epoch by validation loss: 12 images tell too little about accuracy.
    best = min(lines, key=lambda line: line["val_loss"])
    assert summary["best_epoch"] == best["epoch"]
    assert summary["val_top1"] == best["val_top1"]
    config = read_config(folder / "config.toml")
    assert config.model.model == tiny.VARIANT.name
    assert config.schedule.epochs == 6
    # What is returned, what is stored, and what is reported are one.
    loaded = vitrail.load(folder)
    assert tiny.same(loaded.model.state_dict(), classifier.model.state_dict())
    for judged in (loaded, classifier):
        result = judged.evaluate(tiny.dataset())
        assert (result.top1, result.split) == (summary["top1"], "test")
        assert result.loss == pytest.approx(summary["loss"], abs=LOSS)
    assert classifier.class_names == ("one", "two", "three")
    assert classifier.report == summary
    assert not classifier.model.training


def test_the_test_split_has_no_say(tmp_path: Path) -> None:
    """Other test images change the reported figure and nothing else."""
    data = tiny.dataset()
    data.splits["test"] = tiny.images(15, 99)
    data.splits["test"].labels[:] = 0
    run(tmp_path / "one", epochs=2)
    train(data, out=tmp_path / "two", progress=False, **{**KEYS, "epochs": 2})
    one, two = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert one["model"] == two["model"]
    assert one["metrics"] == two["metrics"]
    assert one["summary"]["top1"] != two["summary"]["top1"]


def test_without_a_test_split_the_figure_says_so(tmp_path: Path) -> None:
    data = tiny.dataset()
    del data.splits["test"]
    summary = train(data, out=tmp_path / "run", progress=False, **{**KEYS, "epochs": 1}).report
    assert summary["split"] == "val"
    assert summary["top1"] == summary["val_top1"]


def test_zero_epochs(tmp_path: Path) -> None:
    classifier = run(tmp_path / "run", epochs=0)
    assert classifier.report["steps"] == 0
    assert classifier.report["best_epoch"] is None
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
    assert vitrail.load(tmp_path / "run").class_names == ("one", "two", "three")


def test_foreign_folders_and_second_writers_are_refused(tmp_path: Path) -> None:
    from vitrail.training.checkpoints.run_folder import RunFolder

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("")
    with pytest.raises(RunError, match="is not empty"):
        run(tmp_path / "photos")
    with pytest.raises(RunError, match="is a file"):
        run(tmp_path / "photos" / "a.jpg")
    (tmp_path / "busy").mkdir()
    with RunFolder(tmp_path / "busy").lock(), pytest.raises(RunError, match="another run"):
        run(tmp_path / "busy")
    assert {path.name for path in (tmp_path / "busy").iterdir()} <= {".lock"}  # filelock 3.21 deletes it


def test_runs_without_a_place_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train(tiny.dataset(), progress=False, **{**KEYS, "epochs": 0})
    assert sorted(os.listdir("runs")) == ["tiny-vit_test_patch2_8", "tiny-vit_test_patch2_8-2"]


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitrail.training.checkpoints import checkpoint

    original, calls = checkpoint.save_file, []

    def save(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) > 7:  # the second checkpoint, in its middle
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", save)
        with pytest.raises(RunError, match="disk") as error:
            run(folder)
    assert "\n" not in str(error.value)
    assert [path.name for path in (folder / "checkpoint").iterdir()] == ["step-00000003"]
    assert not (folder / "model").exists()
    train(tiny.dataset(), resume=folder, progress=False)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="clip_grad=1"):
        run(tmp_path / "run", lr=1e30, clip_grad=None, ema=0.0)


def test_a_budget_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {key: value for key, value in KEYS.items() if key != "epochs"}
    summary = train(tiny.dataset(), out=tmp_path / "run", budget="1.5s", progress=False, **keys).report
    assert summary["steps"] > 0
    assert 0.75 <= summary["seconds"] < 5  # what is left may be too little for one more validation
    assert summary["val_top1"] is not None
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["lr"] < 0.5 * KEYS["lr"]


def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path) -> None:
    mistakes: list[tuple[dict[str, Any], type[VitrailError], str]] = [
        ({"model": "vit_test_patch2"}, ModelError, "vit_test_patch2_8"),
        ({"lrr": 1}, ConfigError, "'lr'"),
        ({"img_size": 9}, ModelError, "9x9"),
        ({"min_lr": 1.0}, ConfigError, "min_lr=1"),
        ({"warmup_epochs": 9}, ConfigError, "warmup_epochs=9"),
        ({"device": "quantum"}, DeviceError, "auto, cpu"),
        ({"device": "cuda:7"}, DeviceError, "cuda:7"),
        ({"recipe": "missing.toml"}, ConfigError, "missing.toml"),
    ]
    for keys, kind, fact in mistakes:
        with pytest.raises(kind, match=fact) as error:
            run(tmp_path / "run", **keys)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run").exists(), keys
    with pytest.raises(ConfigError, match="--resume"):
        train(progress=False)


def test_validation_and_checkpoints_come_when_they_are_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, original = [], Session.save

    def save(self: Session) -> None:
        saved.append(self.trainer.state.steps)
        original(self)

    monkeypatch.setattr(Session, "save", save)
    run(tmp_path / "one", epochs=4.2, eval_every=2, checkpoint_every=0)
    lines = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "val_top1" in line] == [2, 4, 5]
    assert saved == [21]
    saved.clear()
    run(tmp_path / "two", epochs=0.6, checkpoint_every=0, checkpoint_minutes=1e-9)
    assert set(saved) == {1, 2, 3}


def test_a_compiled_model_is_the_one_that_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def compiled(model: nn.Module) -> Any:
        def forward(images: torch.Tensor) -> Any:
            calls.append(len(images))
            return model(images)

        return forward

    monkeypatch.setattr(torch, "compile", compiled)
    run(tmp_path / "run", epochs=1, compile=True)
    assert calls == [10] * 5


def test_too_little_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Trainer, batch: Any) -> None:
        if self.config.machine.accumulate == 1:
            torch.empty(2**60)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(DeviceError, match=r"accumulate=2.* batch_size"):
        run(tmp_path / "run")


def test_a_recipe_counts_less_than_a_key(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("lr = 0.003\nseed = 4\nepochs = 0\ncrop_scale = 'none'\n")
    keys = {key: value for key, value in KEYS.items() if key not in ("lr", "epochs")}
    train(tiny.dataset(), out=tmp_path / "run", recipe=recipe, progress=False, **{**keys, "seed": 5})
    config = read_config(tmp_path / "run" / "config.toml")
    assert (config.optimizer.lr, config.seed, config.schedule.epochs) == (0.003, 5, 0)


class ExternalModel(nn.Module):
    """Anybody's module with timm's interface."""

    def __init__(self, num_classes: int = 7) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.body(x))
        return logits


def test_guests_are_trained(tmp_path: Path) -> None:
    import timm

    plain = {key: value for key, value in tiny.PLAIN.items() if key not in ("model", "drop_path")}
    guest = ExternalModel()
    keys = {**plain, "img_size": 8, "in_chans": 1}
    classifier = train(tiny.dataset(), model=guest, out=tmp_path / "one", progress=False, **keys)
    assert classifier.model is guest
    assert guest.num_classes == 3
    assert (tmp_path / "one" / "model" / "model.safetensors").is_file()
    with pytest.raises(ConfigError, match="img_size"):
        train(tiny.dataset(), model=ExternalModel(), out=tmp_path / "two", progress=False, **plain)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=3, embed_dim=16, depth=1, num_heads=2
    )
    classifier = train(
        tiny.dataset(),
        model=vit,
        out=tmp_path / "three",
        progress=False,
        **{**plain, "img_size": 8, "layer_decay": 0.8},
    )
    assert classifier.preprocess.mean == (0.5, 0.5, 0.5)


def photographs(folder: Path) -> None:
    """Three classes of twelve images of various sizes, each class of one colour; one of them cut short."""
    draw = np.random.default_rng(0)
    for kind, colour in {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}.items():
        (folder / kind).mkdir(parents=True)
        for number in range(12):
            height, width = draw.integers(20, 40, 2)
            noise = draw.integers(-30, 30, (height, width, 3))
            Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(
                folder / kind / f"{number}.png"
            )
    whole = (folder / "red" / "3.png").read_bytes()
    (folder / "red" / "3.png").write_bytes(whole[: len(whole) // 2])


def test_an_external_model_with_tied_weights_is_saved(tmp_path: Path) -> None:
    model = ExternalModel(num_classes=3)
    model.tied = model.head  # type: ignore[assignment]
    keys = {**KEYS, "epochs": 0, "drop": None, "drop_path": None, "img_size": "8,8", "in_chans": 1}
    del keys["model"]
    train(tiny.dataset(), model=model, out=tmp_path / "run", progress=False, **keys)
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert torch.equal(saved["tied.weight"], saved["head.weight"])


def test_a_folder_of_images_with_a_broken_one(tmp_path: Path) -> None:
    photographs(tmp_path / "photos")
    keys = {**tiny.PLAIN, "epochs": 8, "img_size": 16, "workers": 2, "crop_scale": (0.5, 1.0), "flip": 0.5}
    classifier = train(tmp_path / "photos", out=tmp_path / "run", progress=False, **keys)
    assert [Path(item["path"]).name for item in classifier.report["skipped"]] == ["3.png"]
    assert classifier.report["skipped"][0]["reason"]
    assert classifier.class_names == ("blue", "green", "red")
    assert classifier.report["top1"] == 100.0
    # Judged later, the very images are held out that were held out in training.
    again = vitrail.load(tmp_path / "run").evaluate(tmp_path / "photos")
    assert (again.top1, again.images) == (classifier.report["top1"], classifier.report["images"])


def test_deit_trains_both_its_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(tiny.CONFIG, dist_token=True)
    monkeypatch.setitem(tiny.VARIANTS, tiny.VARIANT.name, replace(tiny.VARIANT, config=config))
    before = tiny.session().trainer.model.state_dict()["head_dist.weight"].clone()
    classifier = run(tmp_path / "run", epochs=1, ema=0.0)
    assert not torch.equal(classifier.model.state_dict()["head_dist.weight"], before)
