import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from vitrail.diagnosis.scan import blur_effect


def test_blur_effect_is_that_of_scikit_image():
    measure = pytest.importorskip("skimage.measure")
    for name in ("china.jpg", "flower.jpg"):
        grey = load_sample_image(name)[100:200, 100:240, 1]
        assert blur_effect(grey) == pytest.approx(measure.blur_effect(grey), abs=1e-5)
    assert blur_effect(np.full((64, 64), 9, np.uint8)) == 0
