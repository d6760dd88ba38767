"""Copies of real photographs, planted in known ways."""

import io

import imagehash
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from vitrail.data.duplicates.alignment import compare
from vitrail.data.duplicates.groups import UnionFind, near_pairs
from vitrail.data.duplicates.hashes import SYMMETRIES, Candidate, Hashes, apply_symmetry
from vitrail.data.duplicates.views import colours, shrink, thumbnail


def jpeg(image, quality):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def crop(image):
    return image.crop((12, 6, 12 + round(0.8 * image.width), 6 + round(0.8 * image.height)))


CHANGES = {
    "recompressed": lambda image: jpeg(image, 60),
    "halved": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC),
    "doubled": lambda image: jpeg(image.resize((2 * image.width, 2 * image.height)), 90),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "rotated": lambda image: jpeg(image.transpose(Image.Transpose.ROTATE_90), 90),
    "cropped": lambda image: jpeg(crop(image), 90),
}


@pytest.fixture(scope="module")
def photographs():
    """24 different parts of two photographs, 100 x 140 pixels."""
    parts = []
    for name in ("china.jpg", "flower.jpg"):
        whole = load_sample_image(name)
        parts += [whole[y : y + 100, x : x + 140] for y in range(0, 400, 110) for x in range(20, 470, 150)]
    return [Image.fromarray(part) for part in parts]


def views(images):
    small = [shrink(image) for image in images]
    return np.stack([thumbnail(image.convert("L")) for image in small]), np.stack([colours(image) for image in small])


@pytest.mark.parametrize("change", CHANGES)
def test_copies_are_found_and_nothing_else(photographs, change):
    images = photographs + [CHANGES[change](image) for image in photographs]
    pairs = {tuple(sorted((c.first, c.second))) for c, _ in near_pairs(*views(images))}
    count = len(photographs)
    expected = {(i, i + count) for i in range(count)}
    assert pairs <= expected
    assert len(pairs) >= 0.85 * count if change == "cropped" else pairs == expected


def test_what_imagehash_finds_is_found(photographs):
    """Of the copies that perceptual hashes of another library take for the same, none is missed."""
    images = photographs + [jpeg(image, 40) for image in photographs]
    hashes = [imagehash.phash(image) for image in images]
    theirs = {(i, j) for i in range(len(images)) for j in range(i) if hashes[i] - hashes[j] <= 4}
    ours = {tuple(sorted((c.first, c.second), reverse=True)) for c, _ in near_pairs(*views(images))}
    assert len(theirs) >= len(photographs) - 2
    assert theirs <= ours


def test_symmetries_of_hashes_are_those_of_images(photographs):
    thumbs, _ = views(photographs)
    hashes = Hashes(thumbs)
    for symmetry in range(len(SYMMETRIES)):
        turned = apply_symmetry(torch.from_numpy(thumbs), symmetry).contiguous().numpy()
        other = Hashes(turned)
        torch.testing.assert_close(hashes.symmetric(symmetry), other.symmetric(0), atol=1e-4, rtol=0)


def test_alignment_finds_the_scale_of_a_crop(photographs):
    image = photographs[0]
    thumbs, _ = views([image, crop(image)])
    found = compare(thumbs, [Candidate(0, 1, 0, (0.8, 0.1, 0.1))], align=True)
    assert abs(float(found.scale[0]) - 0.8) < 0.01
    assert float(found.coarse[0]) > 0.97


def test_images_of_one_colour_are_no_near_copies():
    images = [Image.new("RGB", (64, 64), (level, 0, 0)) for level in range(0, 250, 10)]
    assert near_pairs(*views(images)) == []
    assert near_pairs(*views(images[:1])) == []


def test_groups_are_transitive():
    sets = UnionFind(6)
    for i, j in ((4, 5), (0, 2), (2, 4)):
        sets.join(i, j)
    assert sets.groups() == [[0, 2, 4, 5]]
