"""Probes: features computed once, a head that is the model's, and a run folder like any other."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image

import vitrail
from tolerance import LOSS, assert_near
from training import tiny
from vitrail.cli import main
from vitrail.data.dataset import ArraySplit
from vitrail.errors import ConfigError, DataError, ModelError, RunError
from vitrail.evaluation.linear_probe import Linear, LogisticRegression
from vitrail.inference import engine
from vitrail.inference.engine import SplitReader
from vitrail.inference.torch_runtime import TorchRuntime
from vitrail.models.build import build_model
from vitrail.models.configs import ConvNeXtConfig, ModelConfig, ResNetConfig, SwinConfig, ViTConfig
from vitrail.models.vit import VisionTransformer
from vitrail.training.config.schema import Use, keys_for, read_config
from vitrail.training.engine.interrupt import Interrupt, Stopped
from vitrail.training.probe import GRID, compute_features, set_linear_head
from vitrail.training.run import train


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


def run(out: Path, data: Any = None, **keys: Any) -> Any:
    keys = {"model": tiny.VARIANT.name, "device": "cpu", **keys}
    return train(data or tiny.dataset(), probe=True, out=out, progress=False, **keys)


def test_a_run_folder(tmp_path: Path) -> None:
    classifier = run(tmp_path / "run")
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert classifier.report == summary
    assert summary["split"] == "test"
    assert summary["images"] == 15
    assert summary["train_images"] == 50
    assert summary["params"] == sum(p.numel() for p in classifier.model.parameters())
    assert summary["probe"]["images"] == 77
    assert summary["probe"]["features"] == 16
    assert 0 <= summary["knn_top1"] <= 100
    assert {"top5", "loss", "seconds", "images_per_second", "per_class", "skipped", "environment"} <= summary.keys()
    # The strength with the best validation, of equal ones the lowest loss.
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["l2"] for line in lines] == list(GRID)[: len(lines)]
    best = max(lines, key=lambda line: (line["val_top1"], -line["val_loss"]))
    assert (summary["probe"]["l2"], summary["val_top1"]) == (best["l2"], best["val_top1"])
    assert read_config(folder / "config.toml").given.keys() == set(keys_for(Use.PROBE))
    # What is returned, what is stored, and what is reported are one.
    for judged in (vitrail.load(folder), classifier):
        for split, top1 in (("test", summary["top1"]), ("val", summary["val_top1"])):
            result = judged.evaluate(tiny.dataset(), split)
            assert result.top1 == top1
        assert judged.evaluate(tiny.dataset()).loss == pytest.approx(summary["loss"], abs=LOSS)
    with pytest.raises(RunError, match="finished run"):
        run(folder)


def test_every_image_goes_once_through_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    encode = VisionTransformer.encode

    def count(self: VisionTransformer, x: torch.Tensor, queries: int | None = None) -> torch.Tensor:
        seen.extend(x)
        return encode(self, x, queries)

    monkeypatch.setattr(VisionTransformer, "encode", count)
    run(tmp_path / "run")
    images = [x for x in seen if not x.is_meta and x.any()]  # training tries the model on blank ones first
    assert len(seen) - len(images) == 1
    assert len(images) == 77
    assert len(torch.stack(images).unique(dim=0)) == 77


def test_the_model_stays_frozen(tmp_path: Path) -> None:
    model = build_model(replace(tiny.CONFIG, num_classes=3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = run(tmp_path / "run", model=model).model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {"head.weight", "head.bias"}


def test_the_test_split_has_no_say(tmp_path: Path) -> None:
    data = tiny.dataset()
    data.splits["test"] = tiny.images(15, 99)
    data.splits["test"].labels[:] = 0
    one, two = run(tmp_path / "one"), run(tmp_path / "two", data)
    assert tiny.same(one.model.state_dict(), two.model.state_dict())
    assert one.report["probe"] == two.report["probe"]
    assert one.report["top1"] != two.report["top1"]


@pytest.mark.parametrize("splits", [("train", "val"), ("train", "test"), ("train",)])
def test_splits_that_are_missing(splits: tuple[str, ...], tmp_path: Path) -> None:
    data = tiny.dataset()
    data.splits = {name: data.splits[name] for name in splits}
    summary = run(tmp_path / "run", data).report
    assert summary["split"] == splits[-1]
    assert (summary["val_top1"] is None) == ("val" not in splits)
    assert summary["probe"]["images"] == sum(data.counts().values())
    if "val" in splits:
        assert summary["top1"] == summary["val_top1"]
    else:
        assert (summary["probe"]["l2"], summary["fits"]) == (1e-3, 1)


# --- the head is the model's

VIT = ViTConfig(img_size=(16, 16), patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5, in_chans=3)
FAMILIES: dict[str, ModelConfig] = {
    "vit": VIT,
    "average pooling": replace(VIT, global_pool="avg", fc_norm=True),
    "deit": replace(VIT, dist_token=True),
    "deit with one head": replace(VIT, dist_token=True, dist_head=False),
    "swin": SwinConfig(
        img_size=(32, 32), patch_size=4, embed_dim=12, depths=(1, 1), num_heads=(2, 3), window_size=4, num_classes=5
    ),
    "resnet": ResNetConfig(img_size=(32, 32), layers=(1, 1, 1, 1), num_classes=5),
    "convnext": ConvNeXtConfig(img_size=(32, 32), depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), num_classes=5),
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_the_heads_on_the_features(family: str) -> None:
    config = FAMILIES[family]
    model = build_model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.eval()
    rng = np.random.default_rng(0)
    split = ArraySplit(rng.integers(0, 256, (6, *config.img_size, 3)).astype(np.uint8), np.arange(6) % 5)
    preprocess = vitrail.Preprocess(size=config.img_size, mean=(0.5,) * 3, std=(0.3,) * 3)
    images = preprocess.normalize(torch.from_numpy(split.images).permute(0, 3, 1, 2).contiguous())
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    features = compute_features(TorchRuntime(model, preprocess), SplitReader(split, preprocess), batch_size=4)
    assert features is not None
    assert_near(features.values, expected)
    assert features.labels.tolist() == [0, 1, 2, 3, 4, 0]
    head = LogisticRegression(features.values, features.labels, 5).fit(1e-3)
    set_linear_head(model, head, (3, *config.img_size))
    assert model.num_classes == 5
    logits = features.values @ head.weight.T + head.bias
    assert_near(model(images), logits)
    assert logits.argmax(dim=1).tolist() == features.labels.tolist()
    if family == "deit":
        assert torch.equal(model.head.weight, model.head_dist.weight)


def test_a_distilled_model_as_a_whole(tmp_path: Path) -> None:
    """The saved model has two heads, and the figure is still the probe's."""
    model = build_model(replace(tiny.CONFIG, stem="patch", dist_token=True))
    classifier = run(tmp_path / "run", model=model)
    result = vitrail.load(tmp_path / "run").evaluate(tiny.dataset())
    assert result.top1 == classifier.report["top1"]
    assert result.loss == pytest.approx(classifier.report["loss"], abs=LOSS)


def test_guests(tmp_path: Path) -> None:
    guest = timm.create_model(
        "resnet10t", num_classes=0, in_chans=1, pretrained_cfg_overlay={"input_size": (1, 32, 32)}
    )
    guest.pretrained_cfg.update(mean=(0.5,), std=(0.5,))
    classifier = run(tmp_path / "run", model=guest)
    assert classifier.report["top1"] == classifier.evaluate(tiny.dataset()).top1
    other = torchvision.models.resnet18(num_classes=3)
    other.num_classes = 3
    with pytest.raises(ModelError, match="ResNet has no reset_classifier"):
        run(tmp_path / "other", model=other, img_size=32, in_chans=3)


def test_a_head_that_is_not_linear_is_no_place_for_a_probe() -> None:
    class Odd(torch.nn.Module):
        def reset_classifier(self, count: int) -> None:
            self.head = torch.nn.Linear(4, count) if count else torch.nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.head(x.flatten(1)[:, :4])

    model = Odd()
    model.reset_classifier(2)
    head = Linear(torch.randn(2, 4), torch.randn(2))
    with pytest.raises(ModelError, match="Odd has no linear head"):
        set_linear_head(model, head, (1, 2, 2))


# --- from a person's side


def test_options_that_a_probe_does_not_heed_are_refused(tmp_path: Path) -> None:
    for key, value in (("epochs", 3), ("lr", 1e-3), ("flip", 0.5)):
        with pytest.raises(ConfigError, match=f"{key} "):
            run(tmp_path / "run", **{key: value})
    assert not (tmp_path / "run").exists()


def test_classes_are_balanced_as_scikit_learn_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every other class thinned out: weights of the images, and the metric that selects the penalty."""
    import numpy as np
    from sklearn.utils.class_weight import compute_sample_weight

    data = tiny.dataset()
    train_split = data.splits["train"]
    keep = [row for row, label in enumerate(train_split.labels) if label != 1 or row % 5 == 0]
    data.splits["train"] = train_split.take(np.array(keep))  # type: ignore[attr-defined]
    labels = data.splits["train"].labels
    expected = compute_sample_weight("balanced", labels)
    seen: list[Any] = []
    original = LogisticRegression.__init__

    def recorded(self: Any, features: Any, labels: Any, classes: int, weights: Any = None) -> None:
        seen.append(weights)
        original(self, features, labels, classes, weights)

    monkeypatch.setattr(LogisticRegression, "__init__", recorded)
    for balance in ("none", "loss", "sample"):
        run(tmp_path / balance, data, balance=balance)
    assert seen[0] is None
    assert seen[1].numpy() == pytest.approx(expected / expected.mean())
    assert torch.equal(seen[1], seen[2])
    for balance, metric in (("none", "val_top1"), ("loss", "val_balanced_top1")):
        lines = [json.loads(line) for line in (tmp_path / balance / "metrics.jsonl").read_text().splitlines()]
        best = max(lines, key=lambda line: (line[metric], -line["val_loss"]))
        assert json.loads((tmp_path / balance / "summary.json").read_text())["probe"]["l2"] == best["l2"]


@pytest.mark.parametrize(("fit", "mode"), [("pad", "border"), ("squash", "squash")])
def test_fit_applies_to_a_probe(fit: str, mode: str, tmp_path: Path) -> None:
    assert run(tmp_path / "run", fit=fit).preprocess.crop_mode == mode


def test_one_that_was_stopped_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, fits = LogisticRegression.fit, []

    def stop(self: LogisticRegression, l2: float) -> Linear:
        fits.append(l2)
        if len(fits) == 2:
            current[0].number = 2
        return fit(self, l2)

    current: list[Interrupt] = []
    enter = Interrupt.__enter__
    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "__enter__", lambda self: current.append(self) or enter(self))
        patch.setattr(LogisticRegression, "fit", stop)
        with pytest.raises(Stopped, match="vitrail train --resume "):
            run(tmp_path / "run")
    assert len(fits) == 2
    assert not (tmp_path / "run" / "model").exists()
    resumed = train(tiny.dataset(), resume=tmp_path / "run", progress=False)
    whole = run(tmp_path / "whole")
    assert tiny.same(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.report["top1"], resumed.report["fits"]) == (whole.report["top1"], whole.report["fits"])


def cli(*words: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_photographs_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model's own folder as weights; files that are broken; evaluate says what the summary said."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3), ("test", 4)):
        for c, name in enumerate(("dark", "bright")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(90 * c, 140 + 90 * c, (24, 30, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    (tmp_path / "photos" / "train" / "dark" / "empty.jpg").write_bytes(b"")
    whole = (tmp_path / "photos" / "train" / "dark" / "0.jpg").read_bytes()
    (tmp_path / "photos" / "train" / "bright" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    run(tmp_path / "before")
    words = ("--model", tiny.VARIANT.name, "--weights", tmp_path / "before" / "model", "--device", "cpu")
    assert cli("train", tmp_path / "photos", "--probe", *words, "--out", tmp_path / "run", "--json") == 0
    done = capsys.readouterr()
    summary = json.loads(done.out)
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {Path(item["path"]).name for item in summary["skipped"]} == {"empty.jpg", "cut.jpg"}
    assert summary["train_images"] == 16
    assert "by a linear head on frozen features" in done.err
    assert "nearest neighbours" in done.err
    assert "random" not in done.err
    assert cli("evaluate", tmp_path / "run", tmp_path / "photos", "--json", "--device", "cpu") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["top1"], result["images"], result["split"]) == (summary["top1"], 8, "test")


def test_random_features_are_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("train", "digits", "--probe", "--out", tmp_path / "run", "--device", "cpu") == 0
    assert "random weights" in capsys.readouterr().err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["top1"] > 85
    assert vitrail.load(tmp_path / "run").evaluate("digits").top1 == summary["top1"]


def test_images_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that only decoding finds: named, left out, and when nothing is left it is said."""
    from vitrail.images.decode import BadImage

    image, bad = ArraySplit.image, {"tiny/0/3", "tiny/1/0", "tiny/2/14"}

    def broken(self: ArraySplit, i: int, at_least: Any = None) -> Image.Image:
        if self.name(i) in bad:
            raise BadImage("is torn")
        return image(self, i, at_least)

    monkeypatch.setattr(ArraySplit, "image", broken)
    monkeypatch.setattr(engine, "_array_pixels", lambda split, preprocess, row: preprocess.crop(split.image(row)))
    summary = run(tmp_path / "run").report
    assert summary["skipped"] == [{"path": name, "reason": "is torn"} for name in sorted(bad)]
    assert (summary["probe"]["images"], summary["train_images"], summary["images"]) == (74, 49, 14)
    bad |= {f"tiny/0/{number}" for number in range(50)}
    with pytest.raises(DataError, match=r"training images .*: is torn"):
        run(tmp_path / "none")
