"""The linear head and the neighbours. Oracles: scikit-learn's LogisticRegression and KNeighborsClassifier."""

import numpy as np
import pytest
import sklearn.linear_model
import sklearn.neighbors
import torch
from sklearn.datasets import load_digits
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from vitrail.evaluation import linear_probe as linear
from vitrail.evaluation.linear_probe import LogisticRegression, nearest_neighbours


def digits(count: int = 400) -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images[:count]).float(), torch.from_numpy(labels[:count]).long()


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_the_head_is_scikit_learns(l2: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_CHUNK", 700)  # seventy rows: the sums run over chunks
    features, labels = digits()
    features += torch.linspace(-50, 50, 64)  # far from standardised
    head = LogisticRegression(features, labels, 10).fit(l2)
    scaled = StandardScaler().fit_transform(features.double().numpy())
    oracle = sklearn.linear_model.LogisticRegression(C=1 / (len(labels) * l2), tol=1e-9, max_iter=5000)
    expected = oracle.fit(scaled, labels.numpy()).predict_proba(scaled)
    found = (features @ head.weight.T + head.bias).softmax(dim=1).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert head.weight.dtype == torch.float32


def test_from_strong_to_weak_ends_where_a_fresh_fit_does() -> None:
    features, labels = digits()
    regression = LogisticRegression(features, labels, 10)
    heads = [regression.fit(l2) for l2 in (1.0, 0.1, 1e-3)]
    fresh = LogisticRegression(features, labels, 10).fit(1e-3)
    torch.testing.assert_close(heads[-1].weight, fresh.weight, atol=2e-3, rtol=0)
    assert not torch.allclose(heads[0].weight, fresh.weight, atol=1e-2)  # and a later fit leaves an earlier head alone


def test_features_that_do_not_vary_and_classes_without_images() -> None:
    features, labels = digits()
    features = torch.cat([features, torch.full((400, 1), 7.0)], dim=1)
    kept = labels != 3
    head = LogisticRegression(features[kept], labels[kept], 10).fit(1e-3)
    assert head.weight.isfinite().all()
    assert head.bias.isfinite().all()
    assert (head.weight[:, -1] == 0).all()
    predicted = (features @ head.weight.T + head.bias).argmax(dim=1)
    assert not (predicted == 3).any()
    assert (predicted == labels)[kept].float().mean() > 0.99
    one = LogisticRegression(features[:1], labels[:1], 10).fit(1e-3)  # a single image has no deviation at all
    assert one.weight.isfinite().all()


def test_the_neighbours_are_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_CHUNK", 3000)  # ten queries
    features, labels = digits(400)
    bank, queries = features[:300], features[300:] * 3 + 0.5
    for neighbours, temperature in ((20, 0.07), (5, 0.01), (300, 0.5)):
        oracle = sklearn.neighbors.KNeighborsClassifier(
            neighbours,
            metric="cosine",
            weights=lambda distance, cold=temperature: np.exp((1 - distance.astype(np.float64)) / cold),
        )
        expected = oracle.fit(bank.numpy(), labels[:300].numpy()).predict(queries.numpy())
        found = nearest_neighbours(
            queries, bank, labels[:300], 10, neighbours=neighbours, temperature=temperature
        ).numpy()
        assert (found == expected).all()
    assert (found != nearest_neighbours(queries, bank, labels[:300], 10, neighbours=1).numpy()).any()


def test_without_temperature_the_majority_decides() -> None:
    features, labels = digits(400)
    labels = (labels > 4).long()  # two classes and an odd number: no ties
    oracle = sklearn.neighbors.KNeighborsClassifier(15, metric="cosine")
    expected = oracle.fit(features[:300].numpy(), labels[:300].numpy()).predict(features[300:].numpy())
    found = nearest_neighbours(features[300:], features[:300], labels[:300], 2, neighbours=15, temperature=1e9)
    assert (found.numpy() == expected).all()


def test_votes_by_hand() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.3], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1, 2])
    query = torch.tensor([[2.0, 0.0]])  # cosines 1, 0.994, 0.936, 0
    assert nearest_neighbours(query, bank, labels, 3, neighbours=3, temperature=0.07).tolist() == [1]  # 1 < 0.92 + 0.40
    assert nearest_neighbours(query, bank, labels, 3, neighbours=3, temperature=0.001).tolist() == [0]
    assert nearest_neighbours(query, bank, labels, 3, neighbours=1).tolist() == [0]
    assert nearest_neighbours(query, bank, labels, 3, neighbours=50).tolist() == [1]  # as many as there are
    assert nearest_neighbours(query[:0], bank, labels, 3).tolist() == []
