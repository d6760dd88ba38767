"""Metrics against scikit-learn's, torch's and hand-counted ones."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, recall_score, top_k_accuracy_score
from torch import nn

from training import tiny
from vitrail.evaluation.evaluate import evaluate
from vitrail.evaluation.metrics import Evaluation, Recorder
from vitrail.images.preprocess import Preprocess
from vitrail.inference.torch_runtime import TorchRuntime


def evaluation(logits: torch.Tensor, labels: torch.Tensor, parts: int = 3) -> Evaluation:
    recorder = Recorder()
    for rows in torch.arange(len(labels)).chunk(parts):
        recorder.add(logits[rows].float().numpy(), labels[rows].numpy(), rows.numpy())
    return Evaluation(recorder.records(), tuple(map(str, range(logits.shape[1]))), "test")


def test_equals_scikit_learn() -> None:
    logits, labels = torch.randn(200, 8) * 2, torch.randint(0, 8, (200,))
    logits[torch.arange(200), labels] += 1
    result, shares = evaluation(logits, labels), logits.double().softmax(1).numpy()
    predicted, kinds = logits.argmax(1), list(range(8))
    assert result.images == 200
    assert result.top1 == pytest.approx(100 * accuracy_score(labels, predicted))
    assert result.top5 == pytest.approx(100 * top_k_accuracy_score(labels, shares, k=5, labels=kinds))
    assert result.loss == pytest.approx(log_loss(labels, shares, labels=kinds), rel=1e-6)
    assert (result.confusion == confusion_matrix(labels, predicted, labels=kinds)).all()
    recall = recall_score(labels, predicted, average=None, labels=kinds)
    assert [row["top1"] for row in result.per_class] == pytest.approx(list(100 * recall))
    assert (result.records.indices == np.arange(200)).all()


def test_few_classes_and_empty_classes() -> None:
    result = evaluation(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 0]))
    assert (result.top1, result.top5) == (50.0, 100.0)
    assert result.per_class[2] == {"label": "2", "images": 0, "correct": 0, "top1": None}
    names = {"top1", "balanced_top1", "top5", "loss", "ece", "images", "split", "skipped", "per_class"}
    assert set(result.to_dict()) == names


def test_bfloat16_logits_are_counted_in_float32() -> None:
    logits, labels = torch.randn(50, 4), torch.randint(0, 4, (50,))
    rounded = logits.bfloat16()
    assert evaluation(rounded, labels).loss == pytest.approx(float(F.cross_entropy(rounded.float(), labels)), rel=1e-6)


class Quarters(nn.Module):
    """Reads the class of a tiny image from its brightest quarter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return F.adaptive_avg_pool2d(x, 2).flatten(1)[:, :3] * self.scale


@pytest.mark.parametrize("batch_size", [None, 1, 4, 15])
def test_every_image_is_counted_once(batch_size: int | None) -> None:
    data, model, told = tiny.dataset(), Quarters().train(), []
    preprocess = Preprocess(size=(8, 8), mean=(0.4,), std=(0.3,), channels=1)
    result = evaluate(
        TorchRuntime(model, preprocess),
        data.split("test"),
        data.class_names,
        name="test",
        batch_size=batch_size,
        on_batch=told.append,
    )
    assert (result.records.indices == np.arange(15)).all()
    assert (result.records.labels == data.split("test").labels).all()
    assert (result.top1, result.images, result.split, sum(told)) == (100.0, 15, "test", 15)
    assert model.training
