"""Images of which it is known which pixels decide (benchmarks/planted_evidence.py), and a model explained on them."""

import numpy as np
import pytest
from benchmarks import explain, planted_models
from benchmarks.planted_evidence import CENTRE, NOTHING, OBJECT, PATTERNS, planted_dataset, planted_images


def test_an_image_depends_on_its_seed_and_number_alone() -> None:
    three, five = planted_images(3, seed=4), planted_images(5, seed=4)
    assert np.array_equal(three.images, five.images[:3])
    assert np.array_equal(three.boxes, five.boxes[:3])
    assert not np.array_equal(three.images[0], planted_images(1, seed=5).images[0])
    assert not np.array_equal(three.images[0], planted_images(1, seed=4, photographs="train").images[0])


def test_the_object_lies_in_what_the_model_sees_and_two_do_not_touch() -> None:
    planted = planted_images(40, seed=1, objects=2)
    seen = planted.inside()[..., CENTRE, CENTRE]
    assert (seen.sum(axis=(2, 3)) == OBJECT**2).all()
    assert not (seen[:, 0] & seen[:, 1]).any()
    assert (planted.labels[:, 0] != planted.labels[:, 1]).all()
    assert planted.labels.max() < NOTHING == len(PATTERNS)


def test_a_share_of_the_images_has_no_object() -> None:
    planted = planted_images(100, seed=2, empty=0.5)
    without = planted.labels[:, 0] == NOTHING
    assert 30 < without.sum() < 70
    assert np.array_equal(planted.inside().any(axis=(1, 2, 3)), ~without)


def test_decoys_have_a_pattern_where_other_tiles_have_none() -> None:
    """Outside of the object, sharp edges: two colours that differ by 80 of 255 at least."""
    seed, count = 6, 30
    plain, decoys = planted_images(count, seed=seed), planted_images(count, seed=seed, decoys=True)
    edges = [
        np.mean(np.abs(np.diff(each.images.mean(axis=3), axis=2))[~each.inside()[:, 0, :, 1:]] > 60)
        for each in (plain, decoys)
    ]
    assert edges[1] > 1.5 * edges[0]


def test_position_and_colour_say_nothing_of_the_class() -> None:
    """A linear model of the box and of the object's mean colour, fitted to half of the images, guesses the other half
    no better than chance."""
    from sklearn.linear_model import LogisticRegression

    planted = planted_images(400, seed=3)
    colours = [image[inside[0]].mean(axis=0) for image, inside in zip(planted.images, planted.inside(), strict=True)]
    features = np.hstack([planted.boxes[:, 0, :2] / 100, np.array(colours) / 255])
    model = LogisticRegression(max_iter=1000).fit(features[::2], planted.labels[::2, 0])
    assert model.score(features[1::2], planted.labels[1::2, 0]) < 0.25  # 1 of 8, and five standard deviations


@pytest.mark.slow
def test_the_peak_of_a_trained_models_map_lies_in_the_object(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(planted_models.TRAIN_IMAGES, "cnn", 6_000)
    monkeypatch.setitem(planted_models.EPOCHS, "cnn", 4)
    clf = planted_models.train("cnn", 0, tmp_path)
    one, two = planted_images(100, seed=11), planted_images(100, seed=12, objects=2)
    found = explain.method_figures(
        clf, "gradcam", one.take(explain.correct(clf, one)), two.take(explain.correct(clf, two))
    )
    assert found["peak_inside"] >= 90
    assert found["peak_moves"] >= 90


def test_the_dataset_has_every_class_in_every_split() -> None:
    data = planted_dataset(90, seed=0, val=90, test=90)
    assert all(set(split.labels) == set(range(data.num_classes)) for split in data.splits.values())
