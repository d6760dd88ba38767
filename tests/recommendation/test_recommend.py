"""Recommendations: what `train` would take, never beyond a limit, and honest about what was not measured."""

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from data.make_folder import picture
from vitrail.classifier import Classifier
from vitrail.data.catalog import open_dataset
from vitrail.data.dataset import ArraySplit, Dataset, Sizes
from vitrail.errors import ConfigError
from vitrail.models.catalog import VARIANTS
from vitrail.pretrained.create import create_model
from vitrail.pretrained.resolve import at_hand
from vitrail.recommendation import recommend as module
from vitrail.recommendation.measurement import Measurement, Subject, measure, stored
from vitrail.recommendation.recommend import recommend
from vitrail.recommendation.sample import leave_one_out, sample_rows, sample_size, training_seconds
from vitrail.training.config import automatic
from vitrail.training.config.automatic import DatasetStats, ModelRow, candidates, choose
from vitrail.training.config.schema import make_config
from vitrail.training.run import train
from vitrail.training.setup import dataset_stats, prepare

TINY = "vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> list[Subject]:
    """In place of measurements: milliseconds that follow the operations, and megabytes that follow the parameters. The
    list has what was asked for."""
    asked: list[Subject] = []

    def pretend(subject: Subject) -> Measurement:
        asked.append(subject)
        row = VARIANTS[subject.model]
        area = subject.img_size[0] * subject.img_size[1] / (row.config.img_size[0] * row.config.img_size[1])
        return Measurement(1 + 10 * row.gmacs * area, 250 + 4 * row.params / 1e6)

    monkeypatch.setattr(module, "measure", pretend)
    return asked


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for c in range(3):
        (root / f"class{c}").mkdir()
        for number in range(20):
            picture(c, number, (96, 128)).save(root / f"class{c}" / f"{number}.jpg")
    return root


def fashion() -> Dataset:
    """Noise in the form of Fashion-MNIST."""
    draw = np.random.default_rng(0)
    splits = {
        name: ArraySplit(draw.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count) % 10, name)
        for name, count in (("train", 200), ("val", 20), ("test", 20))
    }
    sizes = Sizes.of(np.tile(np.array([[28, 28]]), (240, 1)))
    return Dataset("fashion", tuple("abcdefghij"), dict(splits), sizes, channels=1, mean=(0.5,), std=(0.25,))


def add_to_hub_cache(hub: Path, model: str, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Weights, random where none are given, where huggingface_hub would have stored the published ones."""
    folder = hub / f"models--timm--{VARIANTS[model].weights[0].name}"
    snapshot = folder / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c" * 40)
    torch.manual_seed(0)
    save_file({**create_model(model).state_dict(), **(weights or {})}, snapshot / "model.safetensors")


def agree(data: Any) -> str:
    """Assert that `recommend` and `train` without a model choose the same; returns the model."""
    result = recommend(data)
    assert result.choice is not None
    setup = prepare(data, make_config({}))
    assert (result.choice.model, result.choice.recipe) == (setup.config.model.model, setup.config.recipe)
    assert result.choice.img_size == setup.preprocess.size
    assert (result.choice.weights is not None) == setup.config.model.pretrained
    # The printed command gives the same settings, now with the model named.
    named = {"model": result.choice.model, "img_size": result.choice.img_size}
    named |= {"pretrained": True} if result.choice.weights else {}
    again = prepare(data, make_config(named)).config
    changed = {key for key in again.flat if again.flat[key] != setup.config.flat[key]}
    assert changed <= {"img_size"}, changed
    return result.choice.model


@pytest.mark.usefixtures("costs")
def test_agrees_with_train_on_digits_and_arrays() -> None:
    assert agree("digits") == "vit_nano_patch2_8"
    assert agree(fashion()) == "vit_micro_patch8_32"


@pytest.mark.slow
@pytest.mark.usefixtures("costs")
def test_agrees_with_train_on_photographs(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without weights on the machine, and with; a smaller model stands for the one of the table."""
    monkeypatch.setattr(automatic, "MODELS", (*automatic.MODELS[:-1], ModelRow(float("inf"), True, TINY, "small")))
    assert not at_hand(TINY)
    assert agree(photos) == "vit_small_patch8_64"
    assert any("--pretrained" in line for line in recommend(photos).reasons)
    add_to_hub_cache(tmp_path / "hub", TINY)
    assert at_hand(TINY)
    assert agree(photos) == TINY
    setup = prepare(photos, make_config({}))
    assert any("--no-pretrained" in line and "MB" in line and "in the cache" in line for line in setup.reasons)
    assert prepare(photos, make_config({"pretrained": False})).config.model.model == "vit_small_patch8_64"
    assert prepare(photos, make_config({}), may_use_weights=False).config.model.model == "vit_small_patch8_64"
    probed = {row.candidate.model for row in recommend(photos).candidates if row.probe_top1 is not None}
    assert probed == {TINY}


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (15, 20), (28, 28), (64, 64), (480, 640)])
def test_the_first_candidate_is_the_automatic_choice(size: tuple[int, int], pretrained: bool) -> None:
    stats = DatasetStats(1000, size, True, pretrained)
    found, values = candidates(stats), choose(stats, {}).values
    assert (found[0].model, found[0].img_size) == (values["model"], values["img_size"])
    assert found[0].pretrained == pretrained
    assert len({(candidate.model, candidate.size) for candidate in found}) == len(found)
    for candidate in found:
        if not candidate.pretrained:
            model = create_model(candidate.model, img_size=candidate.img_size).eval()
            assert model(torch.zeros(1, 3, *candidate.size)).shape == (1, model.num_classes)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, "deit_small_patch16_224"),
        ({"max_latency_ms": 30}, TINY),
        ({"max_latency_ms": 5}, "vit_small_patch8_64"),
        ({"max_memory_mb": 300}, TINY),
        ({"max_latency_ms": 3, "max_memory_mb": 255}, "resnet20_32"),
        ({"max_memory_mb": 100}, None),
        ({"max_latency_ms": 0.5}, None),
    ],
)
def test_no_limit_is_broken(limits: dict[str, float], expected: str | None, photos: Path, costs: list[Subject]) -> None:
    result = recommend(photos, pretrained=True, **limits)  # type: ignore[arg-type]
    assert (result.choice and result.choice.model) == expected
    assert len(costs) <= 8
    for row in result.candidates:
        if row.fits:
            assert row.latency_ms is not None
            assert row.latency_ms <= limits.get("max_latency_ms", np.inf)
            assert row.peak_mb is not None
            assert row.peak_mb <= limits.get("max_memory_mb", np.inf)
    if expected is not None:
        chosen = next(row for row in result.candidates if row.candidate.model == expected)
        assert chosen.fits
        assert result.command is not None
        assert expected in result.command
        assert 3 <= len(result.reasons) <= 6
        ahead = result.candidates[: result.candidates.index(chosen)]
        assert not any(row.fits for row in ahead)


def test_what_cannot_be_within_the_limits_is_not_measured(photos: Path, costs: list[Subject]) -> None:
    result = recommend(photos, pretrained=True, max_latency_ms=5, max_memory_mb=300)
    skipped = {row.candidate.model for row in result.candidates if row.latency_ms is None}
    assert "vit_base_patch16_224" in skipped
    assert skipped.isdisjoint({subject.model for subject in costs})
    assert all(row.note and not row.fits for row in result.candidates if row.latency_ms is None)


def test_what_cannot_be_measured_is_said_and_fits_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure", lambda subject: "killed")
    assert recommend("digits", max_latency_ms=100).choice is None
    free = recommend("digits")
    assert free.choice is not None
    assert any("could not be measured: killed" in line for line in free.reasons)


@pytest.mark.usefixtures("costs")
def test_json_has_the_documented_keys() -> None:
    found = json.loads(json.dumps(recommend("digits").to_dict()))
    assert found.keys() == {"choice", "reasons", "candidates"}
    assert found["choice"] == {
        "model": "vit_nano_patch2_8", "img_size": [8, 8], "weights": None, "recipe": "tiny-vit"
    }  # fmt: skip
    keys = {"model", "params", "latency_ms", "peak_mb", "published_top1", "probe_top1", "fits"}
    assert all(row.keys() == keys for row in found["candidates"])
    assert found["candidates"][0]["params"] == VARIANTS["vit_nano_patch2_8"].params


@pytest.mark.parametrize("limit", ["max_latency_ms", "max_memory_mb", "hours"])
def test_a_limit_is_positive(limit: str) -> None:
    with pytest.raises(ConfigError, match=limit):
        recommend("digits", **{limit: 0})  # type: ignore[arg-type]


def test_a_measurement_in_a_process_of_its_own() -> None:
    subject = Subject("vit_nano_patch2_8", (8, 8), 1, 10, "cpu")
    assert stored(subject) is None
    found = measure(subject)
    assert isinstance(found, Measurement)
    assert found.latency_ms > 0
    assert found.peak_mb is not None
    assert 50 < found.peak_mb < 2000
    assert stored(subject) == (None if found.busy else found)


@pytest.mark.parametrize("busy", [False, True])
def test_a_measurement_of_an_idle_machine_is_stored(busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, found = Subject("vit_nano_patch2_8", (8, 8), 1, 10, "cpu"), Measurement(1.5, 200.0, busy)
    done = subprocess.CompletedProcess([], 0, json.dumps(dataclasses.asdict(found)), "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert measure(subject) == found
    assert stored(subject) == (None if busy else found)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert stored(subject) is None
    finally:
        torch.set_num_threads(threads)


def test_a_failed_measurement_is_a_reason() -> None:
    assert "unknown model 'no_such_model'" in str(measure(Subject("no_such_model", (8, 8), 3, 10, "cpu")))


def test_leave_one_out_is_that_of_scikit_learn() -> None:
    """With one neighbour's weight far above the others', both classify by the nearest image."""
    draw = np.random.default_rng(0)
    labels = np.arange(60) % 3
    features = np.eye(3)[labels] + draw.normal(0, 0.8, (60, 3))
    expected = cross_val_score(
        KNeighborsClassifier(20, metric="cosine", weights=dino), features, labels, cv=LeaveOneOut()
    )
    found = leave_one_out(torch.from_numpy(features), torch.from_numpy(labels), 3)
    assert found == pytest.approx(100 * expected.mean())


def dino(distances: Any) -> Any:
    """exp(similarity / 0.07), scaled; scikit-learn's cosine distance is 1 - similarity."""
    return np.exp(-(distances - distances.min(axis=1, keepdims=True)) / 0.07)


def test_a_smaller_sample_is_part_of_a_larger_one() -> None:
    labels = np.zeros(500, np.int64)
    small, large = sample_rows(labels, 60), sample_rows(labels, 300)
    assert (large[:60] == small).all()
    assert len(set(large.tolist())) == 300


def test_training_time_is_estimated() -> None:
    dataset = open_dataset("digits")
    stats = dataset_stats(dataset)
    seconds = training_seconds(candidates(stats)[0], dataset, stats, torch.device("cpu"))
    assert seconds is not None
    assert 0.5 < seconds < 3600


@pytest.mark.usefixtures("costs")
def test_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first whose training is short enough; later ones are not tried."""
    tried: list[str] = []

    def pretend(candidate: Any, *_: Any) -> float:
        tried.append(candidate.model)
        return 7200.0 if candidate.model == "vit_micro_patch8_32" else 1800.0

    monkeypatch.setattr(module, "training_seconds", pretend)
    result = recommend(fashion(), hours=1)
    assert result.choice is not None
    assert tried == ["vit_micro_patch8_32", result.choice.model]
    assert any("30 m 00 s of at most 1 h" in line for line in result.reasons)
    assert recommend(fashion(), hours=0.1).choice is None


@pytest.mark.slow
@pytest.mark.usefixtures("costs")
def test_the_probe_with_trained_weights(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was trained here, stored as published weights are: the probe is scikit-learn's on its features."""
    monkeypatch.setattr(automatic, "MODELS", (*automatic.MODELS[:-1], ModelRow(float("inf"), True, TINY, "small")))
    settings = {"model": TINY, "epochs": 0.6, "batch_size": 16, "lr": 3e-4}
    trained = train(photos, out=tmp_path / "run", progress=False, **settings)  # type: ignore[arg-type]
    body = {key: value for key, value in trained.model.state_dict().items() if not key.startswith("head.")}
    add_to_hub_cache(tmp_path / "hub", TINY, body)
    row = next(row for row in recommend(photos, pretrained=True).candidates if row.candidate.model == TINY)

    split = open_dataset(photos).split("train")
    rows = sample_rows(split.labels, sample_size(row.latency_ms or 0.0))
    published = VARIANTS[TINY].weights[0].preprocess
    own = Classifier(trained.model, published, trained.class_names)
    features = own.embed([split.name(int(i)) for i in rows])
    nearest = KNeighborsClassifier(20, metric="cosine", weights=dino)
    expected = 100 * cross_val_score(nearest, features, split.labels[rows], cv=LeaveOneOut()).mean()
    assert row.probe_top1 == pytest.approx(expected, abs=0.01)
    assert f"{len(rows)} images" in row.note
