import numpy as np
import pytest
import torch
from cleanlab import count, rank
from cleanlab import filter as cleanlab_filter
from sklearn.datasets import load_digits

from vitrail.diagnosis.label_errors import (
    find_label_errors,
    label_quality,
    off_diagonal,
    out_of_fold,
    thresholds,
)


@pytest.fixture(scope="module")
def predictions():
    images, labels = load_digits(return_X_y=True)
    images, labels = images[:600], labels[:600].astype(np.int64)
    draw = np.random.default_rng(0)
    planted = draw.choice(len(labels), 30, replace=False)
    labels[planted] = (labels[planted] + draw.integers(1, 10, 30)) % 10
    features = torch.from_numpy(images).float()
    return features, labels, planted, out_of_fold(features, labels, 10)


def test_scores_are_those_of_cleanlab(predictions):
    _, labels, _, probabilities = predictions
    theirs = rank.get_label_quality_scores(labels, probabilities, method="normalized_margin")
    np.testing.assert_allclose(label_quality(labels, probabilities), theirs, atol=1e-9, rtol=0)
    theirs = count.get_confident_thresholds(labels, probabilities)
    np.testing.assert_allclose(thresholds(labels, probabilities), theirs, atol=1e-9, rtol=0)


def test_suspects_are_the_off_diagonal_of_cleanlabs_confident_joint(predictions):
    _, labels, _, probabilities = predictions
    theirs = cleanlab_filter.find_label_issues(labels, probabilities, filter_by="confident_learning", n_jobs=1)
    assert off_diagonal(labels, probabilities).tolist() == theirs.tolist()


def test_planted_labels_are_found_and_the_most_suspicious_come_first(predictions):
    features, labels, planted, _ = predictions
    found = find_label_errors(features, labels)
    hits = np.isin(found.rows, planted)
    assert hits.sum() >= 0.6 * len(planted)
    assert hits[:15].mean() >= 0.9
    assert (np.diff(found.quality[found.rows]) >= 0).all()


def test_a_class_with_too_few_images_is_not_judged():
    features = torch.randn(23, 4)
    labels = np.array([0] * 10 + [1] * 10 + [2] * 3)
    found = find_label_errors(features, labels)
    assert np.isnan(found.quality[20:]).all()
    assert not np.isin(found.rows, [20, 21, 22]).any()
    assert len(find_label_errors(features[:12], labels[:12]).rows) == 0


def test_labels_without_any_relation_to_the_images_are_not_judged():
    draw = np.random.default_rng(0)
    found = find_label_errors(torch.randn(200, 4), draw.integers(0, 5, 200))
    assert found.agreement < 0.5
    assert len(found.rows) == 0


def test_a_probe_that_suspects_a_fifth_of_all_labels_judges_none():
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(images[:600]).float(), labels[:600].astype(np.int64)
    draw = np.random.default_rng(0)
    changed = draw.choice(600, 240, replace=False)
    labels[changed] = (labels[changed] + draw.integers(1, 10, 240)) % 10
    found = find_label_errors(images, labels)
    assert found.agreement > 0.5
    assert not found.judged
    assert len(found.rows) == 0
