"""Rare classes: the loss that weighs them against torch's and hand-derived values, and what balancing does to a run."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score

from tolerance import assert_near
from training import tiny
from training.objectives.test_classification import LABELS, LOGITS, SHARES, Fixed
from training.runs import assert_same, outcome, run
from training.test_resume import Killed, kill_at
from vitrail.data.catalog import open_dataset
from vitrail.data.dataset import Dataset
from vitrail.data.sampling import class_weights
from vitrail.errors import ConfigError
from vitrail.evaluation.metrics import is_imbalanced
from vitrail.training.engine.batch_augmenter import BatchAugmenter, View
from vitrail.training.engine.trainer import Trainer
from vitrail.training.monitoring.plan import balance_lines
from vitrail.training.objectives.classification import Classify
from vitrail.training.run import train
from vitrail.utils.distributed import DistributedContext

even = tiny.dataset  # which tests replace
WEIGHTS = torch.tensor([0.5, 1.0, 4.0])


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


def view(logits: torch.Tensor, targets: torch.Tensor) -> View:
    """As a BatchAugmenter would make it: over the batch a target counts 1 in the mean."""
    one = tiny.session()
    viewer = BatchAugmenter(one.config, one.setup.preprocess, 3, torch.device("cpu"), WEIGHTS)
    return View(logits, targets, torch.arange(len(targets)), 0, viewer._weights(targets))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_of_class_numbers_the_loss_is_torchs(smoothing: float) -> None:
    expected = F.cross_entropy(LOGITS, LABELS, WEIGHTS, label_smoothing=smoothing)
    torch.testing.assert_close(Classify(smoothing)(Fixed(), view(LOGITS, LABELS)), expected)
    hard = torch.eye(3)[LABELS]
    torch.testing.assert_close(Classify(smoothing)(Fixed(), view(LOGITS, hard)), expected)


def test_of_shares_each_share_has_the_weight_of_its_class_by_hand() -> None:
    """Two images with even logits but for one: -log p is log 2, log 4, log 4 for both, and the shares say the rest."""
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]))
    shares = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.3, 0.7]])
    above = 0.5 * 0.6 * np.log(2) + 1.0 * 0.4 * np.log(4) + 1.0 * 0.3 * np.log(4) + 4.0 * 0.7 * np.log(4)
    below = 0.5 * 0.6 + 1.0 * 0.4 + 1.0 * 0.3 + 4.0 * 0.7
    assert float(Classify()(Fixed(), view(logits, shares))) == pytest.approx(above / below, rel=1e-6)
    # What smoothing spreads over the classes is weighed as well: a tenth, a third of it to each.
    spread = 2 * 0.1 / 3 * (0.5 * np.log(2) + 1.0 * np.log(4) + 4.0 * np.log(4))
    expected = (0.9 * above + spread) / below
    assert float(Classify(0.1)(Fixed(), view(logits, shares))) == pytest.approx(expected, rel=1e-6)


def test_parts_of_a_batch_add_up_to_its_loss() -> None:
    task = Classify(0.1)
    for targets in (LABELS, SHARES):
        whole = view(LOGITS, targets)
        parts = [whole.part(slice(0, 3)), whole.part(slice(3, 4))]
        together = sum(task(Fixed(), part) * len(part) / 4 for part in parts)
        torch.testing.assert_close(task(Fixed(), whole), together)


def test_equal_weights_are_no_weights_and_bfloat16_is_weighed_in_float32() -> None:
    plain = View(LOGITS, SHARES, torch.arange(4), 0)
    weighed = View(LOGITS, SHARES, torch.arange(4), 0, torch.ones(3))
    torch.testing.assert_close(Classify(0.1)(Fixed(), weighed), Classify(0.1)(Fixed(), plain))
    rounded = View(LOGITS.bfloat16(), SHARES, torch.arange(4), 0, torch.ones(3))
    assert Classify()(Fixed(), rounded).dtype == torch.float32


def test_two_processes_weigh_as_one_does() -> None:
    """Each has half of the batch; what they tell one another is the sum of the weights and of the images."""

    class Half(DistributedContext):
        def all_reduce(self, tensor: torch.Tensor) -> None:
            tensor.copy_(torch.stack([WEIGHTS[LABELS].sum(), torch.tensor(4.0)]))

    one = tiny.session()
    task, whole = Classify(0.1), view(LOGITS, LABELS)
    halves = []
    for rows in (slice(0, 2), slice(2, 4)):
        viewer = BatchAugmenter(one.config, one.setup.preprocess, 3, torch.device("cpu"), WEIGHTS, Half(0, 2))
        labels = LABELS[rows]
        halves.append(task(Fixed(), View(LOGITS[rows], labels, torch.arange(2), 0, viewer._weights(labels))))
    torch.testing.assert_close(sum(halves) / 2, task(Fixed(), whole))


def lopsided() -> Dataset:
    """The tiny data, with 16, 15 and 2 images for training."""
    data = even()
    whole = data.splits["train"]
    rows = np.concatenate([np.flatnonzero(whole.labels == k)[:n] for k, n in enumerate((16, 15, 2))])
    data.splits["train"] = whole.take(np.sort(rows))  # type: ignore[attr-defined]
    return data


def test_accumulated_gradients_are_those_of_the_whole_weighed_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "dataset", lopsided)
    gradients = {}
    for parts in (1, 3):
        one = tiny.session(accumulate=parts, balance="loss", cutmix=1.0, drop_path=0.0)
        trainer = one.trainer
        trainer.model.eval()
        seen = trainer.view(next(one.loader.epoch(0)), 0)
        trainer._accumulate_gradients(seen)
        gradients[parts] = {name: p.grad for name, p in trainer.model.named_parameters()}
    for name, value in gradients[1].items():
        assert_near(gradients[3][name], value, name=name)


@pytest.mark.parametrize("balance", ["sample", "loss"])
def test_a_balanced_run_is_counted_and_goes_on_bit_for_bit(
    balance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "dataset", lopsided)
    keys = {"balance": balance, "crop_scale": (0.5, 1.0), "workers": 0}
    run(tmp_path / "whole", **keys)
    with monkeypatch.context() as patch:
        kill_at(patch, Trainer, "step", 5)
        with pytest.raises(Killed):
            run(tmp_path / "run", **keys)
    train(lopsided(), resume=tmp_path / "run", progress=False, workers=2)
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


def test_the_best_epoch_is_the_one_with_the_best_mean_over_the_classes(tmp_path: Path) -> None:
    run(tmp_path / "run", balance="loss", epochs=6)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: (line["val_balanced_top1"], -line["val_loss"]))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best_epoch"] == best["epoch"]


def few_of(rare: int, images: int, others: int) -> Dataset:
    """Three kinds of digits: of one of them few images are there to learn from, and as many as of others to judge."""
    kinds, digits = (0, 1, 2), open_dataset("digits")
    splits: dict[str, Any] = {}
    for name, split in digits.splits.items():
        rows = [np.flatnonzero(split.labels == kind) for kind in kinds]
        if name == "train":
            rows = [row[: images if kind == rare else others] for kind, row in zip(kinds, rows, strict=True)]
        part = split.take(np.sort(np.concatenate(rows)))  # type: ignore[attr-defined]
        part.labels = np.searchsorted(kinds, part.labels)
        splits[name] = part
    return Dataset("uneven", tuple(map(str, kinds)), splits, digits.sizes, 1, digits.mean, digits.std)


@pytest.mark.slow
def test_each_way_raises_the_recall_of_a_rare_class(tmp_path: Path) -> None:
    recall, mean = {}, {}
    keys = {"epochs": 12, "eval_every": 3, "batch_size": 32, "lr": 3e-3, "ema": 0.9, "progress": False}
    for balance in ("none", "sample", "loss"):
        report = train(few_of(1, 10, 90), out=tmp_path / balance, balance=balance, **keys).report
        recall[balance] = report["per_class"][1]["top1"]
        mean[balance] = report["balanced_top1"]
    for balance in ("sample", "loss"):
        assert recall[balance] > recall["none"] + 20, recall
        assert mean[balance] > mean["none"] + 5, mean


def test_the_plan_says_how_uneven_the_classes_are() -> None:
    data = lopsided()
    (line,) = balance_lines(data, "none")
    assert line.startswith("balance 8:1 (one 16, three 2); consider --balance sample")
    (line,) = balance_lines(data, "sample")
    assert line.endswith("repeated up to 6 times per epoch")
    (line,) = balance_lines(data, "loss")
    weights = class_weights(data.split("train").labels, 3)
    assert line.endswith(f"; class weights {weights[0]:.3g} to {weights[2]:.3g} in the loss")
    assert balance_lines(tiny.dataset(), "none") == []


def test_one_class_by_another_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"balance .*'samples'"):
        tiny.session(balance="samples")


def test_the_mean_over_the_classes_is_scikit_learns() -> None:
    from evaluation.test_metrics import evaluation

    labels = torch.from_numpy(np.random.default_rng(0).choice(3, 200, p=[0.7, 0.2, 0.1]))
    logits = torch.randn(200, 4) + 2 * F.one_hot(labels, 4)  # of the fourth class there is no image
    result = evaluation(logits, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn says that some of the predicted classes have no images
        expected = 100 * balanced_accuracy_score(labels, logits.argmax(1))
    assert result.balanced_top1 == pytest.approx(expected)
    assert result.balanced_top1 != pytest.approx(result.top1)
    assert result.to_dict()["balanced_top1"] == result.balanced_top1
    assert is_imbalanced(result.per_class)
    assert not is_imbalanced(evaluation(torch.eye(3), torch.arange(3)).per_class)
