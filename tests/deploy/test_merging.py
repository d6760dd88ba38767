"""The choice of merged tokens on images for which it is known what may merge, and its limits."""

import numpy as np
import pytest
import torch

import vitrail
from vitrail.deploy.merging import choose_merging
from vitrail.errors import ConfigError, DataError, ModelError
from vitrail.images.convert import Pixels
from vitrail.images.preprocess import Preprocess
from vitrail.models.build import build_model, merged_model
from vitrail.models.configs import ViTConfig

CONFIG = ViTConfig(img_size=(32, 32), patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=5)


@pytest.fixture(scope="module")
def clf() -> vitrail.Classifier:
    torch.manual_seed(0)
    model = build_model(CONFIG)
    for name, parameter in model.named_parameters():  # larger than at first, so that patches decide the class
        torch.nn.init.normal_(parameter, std=0.2, mean=float("norm" in name and "weight" in name))
    torch.nn.init.zeros_(model.pos_embed)
    return vitrail.Classifier(model, Preprocess(size=(32, 32)), tuple("abcde"), precision="off")


@pytest.fixture(scope="module")
def images() -> list[Pixels]:
    return list(np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), dtype=np.uint8))


def changed(clf: vitrail.Classifier, schedule: tuple[int, ...], images: list[Pixels]) -> float:
    """Percent of the images whose class changes, by `predict` of both models."""
    other = vitrail.Classifier(merged_model(clf.model, schedule), clf.preprocess, clf.class_names, precision="off")
    pairs = zip(clf.predict(images), other.predict(images), strict=True)
    return 100 * float(np.mean([one.label != two.label for one, two in pairs]))


@pytest.mark.parametrize("max_loss", [0.5, 5.0])
def test_the_loss_is_measured_and_at_most_the_stated(
    clf: vitrail.Classifier, images: list[Pixels], max_loss: float
) -> None:
    found = choose_merging(clf, images, max_loss)
    assert found.loss == pytest.approx(changed(clf, found.schedule, images))
    assert found.loss <= max_loss
    assert found.images == 200
    assert found.to_dict()["schedule"] == list(found.schedule)


def test_a_larger_loss_merges_more(clf: vitrail.Classifier, images: list[Pixels]) -> None:
    strict, loose = (choose_merging(clf, images, max_loss) for max_loss in (0.5, 20))
    assert sum(loose.schedule) > sum(strict.schedule)
    assert loose.share > strict.share


@pytest.mark.parametrize("average", [False, True])
def test_equal_patches_all_merge_at_no_loss(clf: vitrail.Classifier, average: bool) -> None:
    """Every patch is there twice, side by side, and there are no positions: 32 pairs differ in nothing."""
    patches = np.random.default_rng(1).integers(0, 256, (200, 8, 4, 4, 4, 3), dtype=np.uint8)
    images = list(patches.repeat(2, axis=2).transpose(0, 1, 3, 2, 4, 5).reshape(200, 32, 32, 3))
    if average:
        torch.manual_seed(0)
        model = build_model(ViTConfig(**{**vars(CONFIG), "global_pool": "avg", "class_token": False}))
        torch.nn.init.zeros_(model.pos_embed)
        clf = vitrail.Classifier(model, clf.preprocess, clf.class_names, precision="off")
    found = choose_merging(clf, images, 0.5)
    assert found.schedule[0] == 32
    assert changed(clf, (32, *(0 for _ in range(2))), images) == 0


def test_what_cannot_be_chosen_is_refused(clf: vitrail.Classifier, images: list[Pixels]) -> None:
    with pytest.raises(DataError, match=r"199 images .* at least 200"):
        choose_merging(clf, images[:199], 0.5)
    with pytest.raises(ConfigError, match="above 0"):
        choose_merging(clf, images, 0)
    merged = vitrail.Classifier(merged_model(clf.model, 4), clf.preprocess, clf.class_names)
    with pytest.raises(ModelError, match="merges tokens already"):
        choose_merging(merged, images)
    swin = vitrail.Classifier(
        vitrail.create_model("swin_tiny_patch4_window7_224", num_classes=5, img_size=32),
        clf.preprocess,
        clf.class_names,
    )
    with pytest.raises(ModelError, match="only a ViT or DeiT"):
        choose_merging(swin, images)
