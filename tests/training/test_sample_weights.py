"""Sample weights in the loss: by hand, against scikit-learn and against repeated images; and runs on data in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.linear_model
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.preprocessing import StandardScaler

from training import tiny
from training.objectives.test_classification import LABELS, LOGITS, SHARES, Fixed
from training.runs import KEYS, assert_same, outcome
from training.test_resume import Killed, kill_at
from vitrail.data.catalog import open_dataset
from vitrail.data.contents import fingerprint
from vitrail.data.loader import Batch
from vitrail.errors import DataError, RunError
from vitrail.evaluation.linear_probe import LogisticRegression
from vitrail.training.config.schema import make_config
from vitrail.training.engine.batch_augmenter import BatchAugmenter, View
from vitrail.training.engine.trainer import Trainer
from vitrail.training.monitoring.progress import Reporter
from vitrail.training.objectives.classification import Classify
from vitrail.training.objectives.distillation import Distill, Hard, Soft
from vitrail.training.run import train
from vitrail.training.session import Session
from vitrail.training.setup import prepare

WEIGHTS = torch.tensor([0.0, 1.0, 0.5, 2.5])


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


def view(targets: torch.Tensor, weights: torch.Tensor | None = WEIGHTS, **more: Any) -> View:
    return View(LOGITS, targets, torch.arange(4), 0, sample_weights=weights, **more)


def by_hand(targets: torch.Tensor) -> torch.Tensor:
    """sum w_i * sum_k t_ik * -log p_ik / B"""
    return -(WEIGHTS[:, None] * targets * LOGITS.log_softmax(1)).sum() / 4


def test_the_loss_of_each_image_is_multiplied_by_its_weight() -> None:
    torch.testing.assert_close(Classify()(Fixed(), view(LABELS)), by_hand(torch.eye(3)[LABELS]))
    torch.testing.assert_close(Classify()(Fixed(), view(SHARES)), by_hand(SHARES))
    smoothed = 0.9 * torch.eye(3)[LABELS] + 0.1 / 3
    torch.testing.assert_close(Classify(0.1)(Fixed(), view(LABELS)), by_hand(smoothed))
    each = F.binary_cross_entropy_with_logits(LOGITS, torch.eye(3)[LABELS], reduction="none").mean(1)
    torch.testing.assert_close(Classify(kind="bce")(Fixed(), view(LABELS)), (WEIGHTS * each).mean())


def test_with_class_weights_the_two_are_multiplied() -> None:
    classes = torch.tensor([0.5, 1.0, 4.0])
    found = Classify()(Fixed(), view(LABELS, class_weights=classes))
    torch.testing.assert_close(found, by_hand(classes * torch.eye(3)[LABELS]))


@pytest.mark.parametrize("scheme", [Hard(), Soft(2.0)])
def test_a_teachers_loss_is_weighted_too(scheme: Hard | Soft) -> None:
    taught = LOGITS.flip(1)
    task = Distill(Classify(), lambda view: taught, scheme, 0.3)
    each = torch.stack([scheme(LOGITS[i : i + 1], taught[i : i + 1]) for i in range(4)])
    expected = 0.7 * by_hand(torch.eye(3)[LABELS]) + 0.3 * (WEIGHTS * each).mean()
    torch.testing.assert_close(task(Fixed(), view(LABELS)), expected)


def augmented(weights: np.ndarray, **settings: Any) -> View:
    config = make_config({**tiny.PLAIN, **settings})
    one = tiny.session()
    viewer = BatchAugmenter(config, one.setup.preprocess, 3, torch.device("cpu"), sample_weights=weights)
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    return viewer(Batch(images, LABELS, torch.tensor([3, 1, 0, 2])), 0)


def test_rows_get_their_weights_with_a_mean_of_1() -> None:
    found = augmented(np.array([1.0, 3.0, 4.0, 8.0]))
    assert found.sample_weights is not None
    assert found.sample_weights.tolist() == [2.0, 0.75, 0.25, 1.0]


@pytest.mark.parametrize("mix", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_of_a_mixed_image_each_label_counts_as_its_image(mix: dict[str, float]) -> None:
    """The loss is that of the labels one by one: share * weight * -log p."""
    plain = augmented(np.ones(4), **mix).targets
    weights = np.array([1.0, 3.0, 4.0, 8.0])
    of_image = torch.tensor([8.0, 3.0, 1.0, 4.0]) / 4  # rows 3, 1, 0, 2; images 0 and 1, 2 and 3 are partners
    found = augmented(weights, **mix)
    assert found.sample_weights is not None
    expected = torch.zeros(())
    for i, partner in enumerate((1, 0, 3, 2)):
        one, two = LABELS[i], LABELS[partner]
        own = plain[i, one] if one != two else None
        if own is None:  # both have label 2: the shares add up, and the mean of the weights depends on the mixture
            expected = expected - found.sample_weights[i] * LOGITS[i].log_softmax(0)[one]
            continue
        losses = -LOGITS[i].log_softmax(0)
        expected = expected + own * of_image[i] * losses[one] + (1 - own) * of_image[partner] * losses[two]
    loss = Classify()(Fixed(), View(LOGITS, found.targets, found.keys, 0, sample_weights=found.sample_weights))
    torch.testing.assert_close(loss, expected / 4)


def test_an_image_of_weight_0_gives_no_label_to_a_mixture() -> None:
    found = augmented(np.array([1.0, 1.0, 1.0, 0.0]), mixup=0.8)  # row 3 is image 0, of label 0
    assert found.targets[1].tolist() == [0.0, 1.0, 0.0]
    assert found.sample_weights is not None
    assert 0 < found.sample_weights[1] < 4 / 3


def test_the_probe_is_scikit_learns() -> None:
    images, labels = load_digits(return_X_y=True)
    scaled = StandardScaler().fit_transform(images[:300])
    weights = np.random.default_rng(0).integers(0, 4, 300) * 1.0
    weights /= weights.mean()
    oracle = sklearn.linear_model.LogisticRegression(C=1 / (300 * 1e-2), tol=1e-9, max_iter=5000)
    expected = oracle.fit(scaled, labels[:300], sample_weight=weights).predict_proba(scaled)
    features = torch.from_numpy(images[:300]).float()
    head = LogisticRegression(features, torch.from_numpy(labels[:300]), 10, torch.from_numpy(weights)).fit(1e-2)
    found = (features @ head.weight.T + head.bias).softmax(1).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-4)
    unweighted = oracle.fit(scaled, labels[:300]).predict_proba(scaled)
    assert np.abs(unweighted - expected).max() > 0.01


def weighted(weights: np.ndarray | None) -> Any:
    """The tiny data; train with these weights."""
    dataset = tiny.dataset()
    dataset.splits["train"].weights = weights
    return dataset


def test_a_step_with_weights_0_1_and_2_is_one_on_repeated_images() -> None:
    """Gradient descent on all images: an image of weight 2 counts as one that is there twice."""
    settings = {**tiny.PLAIN, "drop_path": 0.0}
    weights = np.arange(50) % 3 * 1.0

    def gradient(dataset: Any, count: int) -> torch.Tensor:
        setup = prepare(dataset, make_config({**settings, "batch_size": count}))
        one = Session(setup, Reporter(False), torch.device("cpu"))
        one.trainer.model.eval()  # batch norm would see other images
        (batch,) = one.loader.epoch(0)
        one.trainer.task(one.trainer.model, one.trainer.view(batch, 0)).backward()
        return torch.cat([p.grad.flatten() for p in one.trainer.model.parameters() if p.grad is not None])

    repeated = tiny.dataset()
    rows = np.repeat(np.arange(50), weights.astype(int))
    repeated.splits["train"] = repeated.splits["train"].take(rows)
    found, expected = gradient(weighted(weights), 50), gradient(repeated, len(rows))
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    plain = gradient(weighted(None), 50)
    assert (plain - expected).abs().max() > 0.01 * expected.abs().max()


@pytest.mark.slow
def test_wrong_labels_of_weight_0_do_no_harm(tmp_path: Path) -> None:
    """Of 60 training images 30 have the wrong label: the classifier learns from the others, and only with weights."""
    train_images, test = tiny.images(60, 0), tiny.images(30, 2)
    labels = train_images.labels.copy()
    labels[::2] = (labels[::2] + 1) % 3
    top1 = []
    for weights in (np.arange(60) % 2 * 1.0, None):
        dataset = tiny.dataset()
        dataset.splits = {"train": type(test)(train_images.images, labels, "noisy", None, weights), "test": test}
        keys = {**tiny.PLAIN, "epochs": 20}
        classifier = train(dataset, out=tmp_path / str(weights is None), progress=False, **keys)
        top1.append(classifier.evaluate(dataset).top1)
    assert top1[0] > 95
    assert top1[1] < 80


class Pairs(torch.utils.data.Dataset[Any]):
    """The tiny training images as a torch dataset."""

    def __init__(self, shift: int = 0) -> None:
        self.images = tiny.images(80, 0).images + np.uint8(shift)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Any:
        return torch.from_numpy(self.images[row])[None], row % 3


def test_a_run_on_objects_is_resumed_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {**KEYS, "workers": 2, "epochs": 2}
    train(Pairs(), out=tmp_path / "whole", progress=False, **{**keys, "workers": 0})
    with monkeypatch.context() as patch:
        kill_at(patch, Trainer, "step", 9)
        with pytest.raises(Killed):
            train(Pairs(), out=tmp_path / "killed", progress=False, **keys)
    with pytest.raises(DataError, match=r"pass it again"):
        train(resume=tmp_path / "killed", progress=False)
    with pytest.raises(RunError, match="contents"):
        train(Pairs(shift=1), resume=tmp_path / "killed", progress=False)
    train(Pairs(), resume=tmp_path / "killed", progress=False)
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "killed"))


def test_other_weights_are_other_data() -> None:
    before = fingerprint(open_dataset(weighted(np.ones(50))))
    assert "weights" in fingerprint(weighted(np.arange(50) * 1.0)).difference(before.to_dict())
