"""What `predict` takes and gives: tensors as torchvision makes them, all probabilities, indices; what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import Normalize, PILToTensor, ToTensor

from test_classifier import PHOTO, classifier
from vitrail.errors import ConfigError, ModelError

PICTURE = Image.fromarray(load_sample_image("flower.jpg")).resize((50, 44))
NAMES = ("cat", "dog", "bird", "fish")


def probabilities(inputs: Any) -> np.ndarray:
    return np.stack([each.probabilities for each in classifier(PHOTO, NAMES).predict(inputs, probabilities=True)])


@pytest.mark.parametrize(
    "make",
    [
        PILToTensor(),
        ToTensor(),
        lambda image: ToTensor()(image).double(),
        lambda image: ToTensor()(image).requires_grad_(),
        lambda image: ToTensor()(image)[None],
        lambda image: PILToTensor()(image).permute(1, 2, 0).contiguous().permute(2, 0, 1),
    ],
)
def test_a_tensor_is_the_image_that_it_was_made_from(make: Any) -> None:
    expected = probabilities(PICTURE)
    np.testing.assert_array_equal(probabilities(make(PICTURE)), expected)
    np.testing.assert_array_equal(probabilities([make(PICTURE), PICTURE]), probabilities([PICTURE, PICTURE]))


def test_a_batch_of_tensors_and_their_features() -> None:
    batch = torch.stack([ToTensor()(PICTURE), ToTensor()(PICTURE.rotate(180))])
    np.testing.assert_array_equal(probabilities(batch), probabilities([PICTURE, PICTURE.rotate(180)]))
    clf = classifier(PHOTO, NAMES)
    np.testing.assert_array_equal(clf.embed(batch), clf.embed([PICTURE, PICTURE.rotate(180)]))


def test_tensors_have_the_models_channels() -> None:
    grey = classifier()
    image = torch.randint(256, (1, 8, 8), dtype=torch.uint8)
    assert grey.predict(image)[0] == grey.predict(image[0].numpy())[0]


@pytest.mark.parametrize(
    ("inputs", "facts"),
    [
        (Normalize(0.5, 0.25)(ToTensor()(PICTURE)), "not normalised"),
        (ToTensor()(PICTURE) * 255, "values from 0"),
        (torch.full((3, 8, 8), torch.nan), "nan"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "int64"),
        (torch.zeros(8, 8), r"\(8, 8\)"),
        (torch.zeros(2, 2, 3, 8, 8), r"\(2, 2, 3, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), r"\(0, 3, 8, 8\)"),
        (torch.zeros(40, 50, 3), r"channels first, as tensor.movedim\(-1, -3\)"),
        ([PICTURE, torch.zeros(7, 8, 8)], "7 channels"),
        (5, "int"),
        (None, "NoneType"),
        ([PICTURE, 5], "int"),
        ({"a": 1}.values(), "int"),
    ],
)
def test_anything_else_is_a_type_error_in_one_line(inputs: Any, facts: str) -> None:
    clf = classifier(PHOTO, NAMES)
    for call in (clf.predict, clf.embed):
        with pytest.raises(TypeError, match=facts) as caught:
            call(inputs)
        assert "\n" not in str(caught.value)


def test_all_probabilities_and_indices() -> None:
    clf = classifier(PHOTO, NAMES)
    (found,) = clf.predict(PICTURE, top=2, probabilities=True)
    with torch.inference_mode():
        expected = clf.model.eval()(clf.preprocess(PICTURE)[None])[0].softmax(0).numpy()
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-6)
    assert found.index == expected.argmax()
    assert found.label == NAMES[found.index]
    assert [score.index for score in found.top] == np.argsort(-expected)[:2].tolist()
    assert found.score == found.probabilities[found.index]
    assert found.to_dict()["probabilities"] == found.probabilities.tolist()
    (plain,) = clf.predict(PICTURE, top=2)
    assert plain.probabilities is None
    assert "probabilities" not in plain.to_dict()
    assert set(plain.to_dict()["top"][0]) == {"label", "score"}
    (failed,) = clf.predict("nowhere.png", probabilities=True)
    assert failed.index is failed.probabilities is None


def test_a_table_of_paths(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("image\na.png\nb.png\n")
    found = classifier(PHOTO, NAMES).predict(tmp_path / "t.csv")
    assert [each.path for each in found] == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert found[0].label is not None
    assert found[1].error == "does not exist"


def test_other_types_of_weights_are_refused() -> None:
    clf = classifier(PHOTO, NAMES)
    assert clf.to(torch.float32) is clf.to("cpu") is clf
    for call in (clf.half, clf.bfloat16, lambda: clf.to(torch.bfloat16), lambda: clf.to(torch.float16)):
        with pytest.raises(ConfigError, match="precision="):
            call()
    assert next(clf.model.parameters()).dtype == torch.float32
    clf.model.half()
    with pytest.raises(ModelError, match="float16"):
        clf.predict(PICTURE)
