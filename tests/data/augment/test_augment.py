import itertools

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from pydantic import ValidationError
from timm.data.mixup import Mixup

from vitrail.data.augment.augment import (
    _affine,
    _beta,
    _colour,
    _cut_boxes,
    _move_each,
    _move_windows,
    augment,
)
from vitrail.data.augment.randaugment import rand_augment
from vitrail.data.augment.settings import Augment
from vitrail.data.sampling import count_repetitions
from vitrail.images.preprocess import Preprocess
from vitrail.utils.counter_rng import uniform

P1 = Preprocess(size=(12, 10), mean=(0.3,), std=(0.4,), channels=1)
P3 = Preprocess(size=(12, 10))
ALL = Augment(
    flip=0.5, rotate=15, shear=5, zoom=(0.8, 1.25), shift=0.1, brightness=0.4, contrast=0.4, saturation=0.4,
    erase=0.5, mixup=0.8, cutmix=1.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch(count=16, channels=3, size=(12, 10), seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, channels, *size), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count) % 5, torch.arange(count) * 7


def run(images, labels, indices, config, p=P3, seed=0, epoch=0):
    return augment(images, labels, 5, indices, config=config, preprocess=p, seed=seed, epoch=epoch)


def test_without_augmentation_images_are_normalised():
    images, labels, indices = batch()
    x, y = run(images, labels, indices, Augment())
    assert torch.equal(x, P3.normalize(images))
    assert y is labels
    assert Augment().active == []
    assert ALL.active[:2] == ["flip", "rotate"]


@pytest.mark.parametrize(
    "config",
    [
        ALL,
        Augment(flip=0.5, vflip=0.5, pad_shift=2, edge="reflect", cutmix=1.0, erase=1.0),
        Augment(flip=0.5, rand_augment=9.0, mixup=0.8, cutmix=1.0),
    ],
)
def test_a_view_depends_on_seed_epoch_and_index_alone(config):
    images, labels, indices = batch()
    before = images.clone()
    x, y = run(images, labels, indices, config, epoch=3)
    assert torch.equal(images, before)
    assert torch.equal(run(images, labels, indices, config, epoch=3)[0], x)
    assert not torch.equal(run(images, labels, indices, config, epoch=4)[0], x)
    assert not torch.equal(run(images, labels, indices, config, seed=1, epoch=3)[0], x)
    # Two processes with half the batch each: pairs are not separated.
    for half in (slice(0, 8), slice(8, 16)):
        x_half, y_half = run(images[half], labels[half], indices[half], config, epoch=3)
        torch.testing.assert_close(x_half, x[half], rtol=0, atol=1e-5)
        torch.testing.assert_close(y_half, y[half], rtol=0, atol=1e-6)


@pytest.mark.parametrize("extra", [{"rotate": 15}, {"rand_augment": 9.0}])
def test_without_mixing_any_order_gives_the_same_views(extra):
    config = Augment(flip=0.5, brightness=0.2, erase=0.5, **extra)
    images, labels, indices = batch()
    x, _ = run(images, labels, indices, config)
    order = torch.tensor([5, 3, 15, 0])
    x_some, _ = run(images[order], labels[order], indices[order], config)
    torch.testing.assert_close(x_some, x[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("edge", ["black", "edge", "reflect"])
@pytest.mark.parametrize("pad", [0, 3])
def test_moves_equal_pad_crop_and_flip(edge, pad):
    images, _, _ = batch(200)
    rng = np.random.default_rng(0)
    steps = rng.integers(0, 2 * pad + 1, (200, 2))
    mirror = rng.random((200, 2)) < 0.5
    got = _move_each(images, steps, mirror, pad, edge)
    assert got.dtype == torch.uint8
    mode = {"black": "constant", "edge": "edge", "reflect": "reflect"}[edge]
    for b in range(200):
        y, x = steps[b].tolist()
        one = tv.crop(tv.pad(images[b], [pad] * 4, padding_mode=mode), y, x, 12, 10)
        one = tv.vertical_flip(one) if mirror[b, 0] else one
        one = tv.horizontal_flip(one) if mirror[b, 1] else one
        assert torch.equal(got[b], one)
    assert torch.equal(_move_windows(images, steps, mirror, pad, edge).to(torch.uint8), got)


def test_moves_are_uniformly_distributed():
    spot = torch.zeros(4000, 1, 7, 7, dtype=torch.uint8)
    spot[:, :, 3, 3] = 255
    x, _ = augment(
        spot, torch.zeros(4000, dtype=torch.long), 5, torch.arange(4000),
        config=Augment(pad_shift=1), preprocess=P1.replace(size=(7, 7), mean=(0.0,), std=(1.0,)), seed=0, epoch=0,
    )  # fmt: skip
    counts = x.sum(dim=(0, 1))
    assert counts[2:5, 2:5].sum() == 4000
    assert counts[2:5, 2:5].min() > 380


def u_affine(**given):
    """Random numbers that leave an image unchanged, except for those given."""
    u = np.full((1, 10), 0.5)
    u[:, 4:6] = 1.0  # no flips
    for name, value in given.items():
        u[:, {"angle": 0, "zoom": 1, "shear_x": 2, "shear_y": 3, "flip": 4, "vflip": 5, "dx": 6, "dy": 7}[name]] = value
    return u


def test_affine_transformations():
    x = torch.rand(1, 3, 12, 12) * 255
    config = Augment(rotate=90, zoom=(0.5, 2), shift=0.25, flip=0.5, vflip=0.5)
    close = {"rtol": 0, "atol": 1e-3}
    torch.testing.assert_close(_affine(x, config, u_affine()), x, **close)
    torch.testing.assert_close(_affine(x, config, u_affine(flip=0)), x.flip(3), **close)
    torch.testing.assert_close(_affine(x, config, u_affine(vflip=0)), x.flip(2), **close)
    turned = _affine(x, config, u_affine(angle=1.0))
    assert min((turned - x.rot90(k, (2, 3))).abs().max() for k in (1, 3)) < 1e-2
    shifted = _affine(x, config, u_affine(dx=1.0))  # a quarter of 12 is 3 pixels
    torch.testing.assert_close(shifted[..., :9], x[..., 3:], **close)
    assert shifted[..., 9:].abs().max() < 1e-3
    larger = _affine(x, config, u_affine(zoom=1.0))
    torch.testing.assert_close(
        larger, F.interpolate(x[:, :, 3:9, 3:9], scale_factor=2, mode="bilinear"), rtol=0, atol=60
    )
    assert (
        larger[:, :, 2:-2, 2:-2] - F.interpolate(x, scale_factor=2, mode="bilinear")[:, :, 8:-8, 8:-8]
    ).abs().max() < 1e-2


def test_affine_keeps_angles_on_rectangular_images():
    # A square in the middle of a rectangular image stays a square when rotated by 90 degrees.
    x = torch.zeros(1, 1, 12, 24)
    x[:, :, 4:8, 10:14] = 1
    turned = _affine(x, Augment(rotate=90), u_affine(angle=1.0))
    torch.testing.assert_close(turned, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation"])
def test_colour_is_torchvisions(kind):
    x = torch.rand(6, 3, 9, 11) * 255
    factors = [0.2, 0.7, 1.0, 1.3, 1.75, 0.0]
    config = Augment(**{kind: 1.0})
    u = np.tile(np.array(factors)[:, None] / 2, (1, 3))
    got = _colour(x.clone(), config, u)
    for b, factor in enumerate(factors):
        expected = getattr(tv, f"adjust_{kind}")(x[b] / 255, factor) * 255
        torch.testing.assert_close(got[b], expected, rtol=0, atol=0.1)
    grey = torch.rand(2, 1, 5, 5) * 255
    assert torch.equal(_colour(grey.clone(), Augment(saturation=0.5), u[:2]), grey)


def test_erasing():
    images = torch.full((3000, 3, 16, 16), 255, dtype=torch.uint8)
    labels, indices = torch.zeros(3000, dtype=torch.long), torch.arange(3000)
    p = P3.replace(size=(16, 16))
    x, _ = run(images, labels, indices, Augment(erase=0.25, erase_fill="mean"), p)
    hole = (x == 0).all(dim=1)
    assert torch.equal(hole, (x == 0).any(dim=1))
    share = hole.float().mean(dim=(1, 2))
    assert abs((share > 0).float().mean() - 0.25) < 0.03
    inside = share[share > 0]
    assert inside.min() > 0.01
    assert inside.max() < 0.40
    assert abs(inside.mean() - (0.02 + 1 / 3) / 2) < 0.02
    for one in hole[share > 0][:50]:  # a filled rectangle
        rows, cols = one.any(1).nonzero(), one.any(0).nonzero()
        assert one.sum() == len(rows) * len(cols) == (rows.max() - rows.min() + 1) * (cols.max() - cols.min() + 1)
    noisy, _ = run(images, labels, indices, Augment(erase=0.25), p)
    values = noisy.permute(0, 2, 3, 1)[hole]
    assert abs(values.mean()) < 0.05
    assert abs(values.std() - 1) < 0.05
    assert torch.equal(noisy.permute(0, 2, 3, 1)[~hole], x.permute(0, 2, 3, 1)[~hole])


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_beta(alpha):
    u = (np.arange(2000) + 0.5) / 2000
    assert scipy.stats.kstest(_beta(alpha, u), scipy.stats.beta(alpha, alpha).cdf).statistic < 1e-3


def flat(count, channels=1):
    """Image b has the value b everywhere and class b, so the output shows how images were mixed."""
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, channels, 12, 10).contiguous()
    return images, torch.arange(count), torch.arange(count)


def shares(config, count=64):
    images, labels, indices = flat(count)
    p = P1.replace(mean=(0.0,), std=(1 / 255,))  # values unchanged
    x, y = augment(images, labels, count, indices, config=config, preprocess=p, seed=0, epoch=0)
    torch.testing.assert_close(y.sum(1), torch.ones(count))
    partner = torch.arange(count) ^ 1
    rest = y.clone()
    rest[torch.arange(count), labels] = 0
    rest[torch.arange(count), partner] = 0
    assert rest.abs().max() == 0
    # Pixels and labels are mixed in the same proportion.
    torch.testing.assert_close(x.mean(dim=(1, 2, 3)), y @ torch.arange(count, dtype=torch.float32), rtol=0, atol=1e-4)
    return x, y[torch.arange(count), labels].numpy()


def test_mixup():
    x, keep = shares(Augment(mixup=1.0), 512 // 2)
    assert (x.amax(dim=(1, 2, 3)) - x.amin(dim=(1, 2, 3))).max() < 1e-4  # one value per image
    assert scipy.stats.kstest(keep, "uniform").pvalue > 1e-3
    _, keep = shares(Augment(mixup=0.2), 256)
    assert scipy.stats.kstest(keep, scipy.stats.beta(0.2, 0.2).cdf).pvalue > 1e-3


def test_cutmix():
    x, keep = shares(Augment(cutmix=1.0), 256)
    for b in range(256):
        values = set(x[b].flatten().round().int().tolist())
        assert values <= {b, b ^ 1}  # every pixel is from one of the two images
        box = x[b, 0].round() == (b ^ 1)
        assert abs((1 - keep[b]) - box.float().mean()) < 1e-6
        if box.any():
            rows, cols = box.any(1).nonzero(), box.any(0).nonzero()
            assert box.sum() == (rows.max() - rows.min() + 1) * (cols.max() - cols.min() + 1)
    assert 0.5 < keep.mean() < 0.75  # boxes are clipped at the border, so more than half is kept


def test_cut_boxes_are_the_papers():
    keep = np.array([0.75, 0.75, 0.0, 1.0])
    u = np.array([[0.5, 0.5], [0.0, 0.99], [0.5, 0.5], [0.5, 0.5]])
    assert _cut_boxes(keep, u, 16, 32).tolist() == [[4, 8, 12, 24], [0, 23, 4, 32], [0, 0, 16, 32], [8, 16, 8, 16]]


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_pair_is_mixed_as_in_timm(kind, monkeypatch):
    """timm's Mixup, which pairs the first of a batch with the last, given the same numbers; label smoothing too.

    For boxes of even height and width: of others the paper's code, and ours, cuts one pixel less than timm does now.
    """
    images, labels, indices = batch(2)

    def even(epoch: int) -> bool:
        ratio = np.sqrt(1 - _beta(0.8, uniform(0, epoch, indices.numpy(), "mix", 5)[:, 2]))
        return not (np.floor(np.outer(ratio, [12, 10])) % 2).any() and ratio.min() > 0.2

    epoch = next(filter(even, range(1000)))
    x, y = run(images, labels, indices, Augment(**{kind: 0.8}), epoch=epoch)
    u = uniform(0, epoch, indices.numpy(), "mix", 5)
    lam = list(_beta(0.8, u[:, 2]))
    # timm draws numbers for its images from the first on, and a box's centre as y, then x.
    centres = [int(u[b, 3 + axis] * side) for b in (0, 1) for axis, side in enumerate((12, 10))]
    monkeypatch.setattr("timm.data.mixup.np.random.beta", lambda *args, size: np.array(lam))
    monkeypatch.setattr("timm.data.mixup.np.random.randint", lambda *args, size=None: centres.pop(0))
    alphas = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, f"{kind}_alpha": 0.8}
    theirs = Mixup(**alphas, mode="elem", label_smoothing=0.1, num_classes=5)
    their_x, their_y = theirs(P3.normalize(images), labels)
    torch.testing.assert_close(x, their_x)
    torch.testing.assert_close(y * 0.9 + 0.1 / 5, their_y.to(y.dtype))
    assert not centres or kind == "mixup"


def test_the_order_is_geometry_randaugment_colour():
    """On images that the geometry interpolates, RandAugment sees them rounded, in 0..255."""
    images, labels, indices = batch(8)
    both = Augment(rotate=20, rand_augment=9.0, brightness=0.4)
    x, _ = run(images, labels, indices, both)
    keys = indices.numpy()
    turned = _affine(images.float(), both, uniform(0, 0, keys, "affine", 10)).round().clamp(0, 255).to(torch.uint8)
    fill = tuple(round(255 * value) for value in P3.mean)
    changed = rand_augment(turned, uniform(0, 0, keys, "rand_augment", 8), magnitude=9.0, std=0.5, fill=fill)
    expected = _colour(changed.float(), both, uniform(0, 0, keys, "colour", 3))
    torch.testing.assert_close(x, P3.normalize(expected))


def test_repetitions_are_different_views():
    images, labels, _ = batch(1)
    config = Augment(flip=0.5, rotate=15, rand_augment=9.0, erase=0.5)
    again = images.expand(6, -1, -1, -1)
    keys = torch.from_numpy(count_repetitions(np.full(6, 3)))
    x, _ = run(again, labels.expand(6), keys, config)
    assert len({x[b].numpy().tobytes() for b in range(6)}) == 6
    assert torch.equal(x[0], run(images, labels, torch.tensor([3]), config)[0][0])  # the first is the usual view


def test_switch_and_mix_prob():
    x, keep = shares(Augment(mixup=1.0, cutmix=1.0, mix_prob=0.5, switch=0.25), 256)
    spread = x.amax(dim=(1, 2, 3)) - x.amin(dim=(1, 2, 3))
    assert abs((keep == 1).mean() - 0.5) < 0.12
    assert abs((spread > 0.5).float().mean() - 0.5 * 0.25) < 0.08


def test_the_last_image_of_an_odd_batch_is_not_mixed():
    images, labels, indices = batch(9)
    x, y = run(images, labels, indices, Augment(mixup=1.0))
    torch.testing.assert_close(x[8], P3.normalize(images)[8])
    assert y[8].tolist() == F.one_hot(labels[8], 5).tolist()
    x, y = run(images[:1], labels[:1], indices[:1], Augment(mixup=1.0, cutmix=1.0))
    torch.testing.assert_close(x, P3.normalize(images[:1]))


def test_label_smoothing_of_soft_targets():
    """cross_entropy smooths soft targets as timm's mixup_target does."""
    from timm.data.mixup import mixup_target

    labels = torch.tensor([0, 3, 2, 1])
    logits = torch.randn(4, 5)
    theirs = mixup_target(labels, 5, lam=0.3, smoothing=0.1)
    plain = mixup_target(labels, 5, lam=0.3, smoothing=0.0)
    expected = -(theirs * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(F.cross_entropy(logits, plain, label_smoothing=0.1), expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"flip": 2},
        {"mixup": -1},
        {"zoom": (2.0, 1.0)},
        {"erase_ratio": (0.0, 1.0)},
        {"edge": "wrap"},
        {"erase_fill": "red"},
        {"rand_augment": 11.0},
        {"rand_augment_ops": 0},
        {"rand_augment_std": -0.1},
    ],
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Augment(**wrong)


def test_every_field_has_an_effect():
    images, labels, indices = batch(32)
    changed = {
        "flip": 0.5, "vflip": 0.5, "pad_shift": 1, "rotate": 9.0, "shear": 9.0, "zoom": (0.8, 1.2), "shift": 0.1,
        "edge": "edge", "rand_augment": 9.0, "rand_augment_ops": 3, "rand_augment_std": 2.0,
        "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "erase": 0.9, "erase_area": (0.5, 0.6),
        "erase_ratio": (1.0, 1.0), "erase_fill": "mean", "mixup": 0.5, "cutmix": 0.5, "mix_prob": 0.2, "switch": 0.9,
    }  # fmt: skip
    assert changed.keys() == set(Augment.model_fields) - {"crop_scale", "crop_ratio", "repeats"}  # used by the loader
    needs = {
        "edge": {"shift": 0.2}, "mix_prob": {"mixup": 1.0}, "switch": {"mixup": 1.0, "cutmix": 1.0},
        "rand_augment_ops": {"rand_augment": 5.0}, "rand_augment_std": {"rand_augment": 5.0},
    }  # fmt: skip
    for name, value in changed.items():
        base = needs.get(name, {"erase": 0.8} if name.startswith("erase_") else {})
        plain, _ = run(images, labels, indices, Augment(**base))
        with_it, _ = run(images, labels, indices, Augment(**{**base, name: value}))
        assert not torch.equal(plain, with_it), name
    for a, b in itertools.combinations(("rotate", "flip", "pad_shift"), 2):
        both, _ = run(images, labels, indices, Augment(**{a: changed[a], b: changed[b]}))
        one, _ = run(images, labels, indices, Augment(**{a: changed[a]}))
        assert not torch.equal(both, one), (a, b)
