"""RandAugment of a batch of photographs at 224: ours on the whole batch, timm's on one Pillow image after the other.

Both on one thread, from uint8 to uint8, and without the conversions between arrays and images that timm's needs around
it. The magnitude is 8: at DeiT's 9 timm now and then asks for a posterisation to 0 bits, which Pillow refuses. Ours
interpolates bilinearly; DeiT has timm's bicubic.
"""

import argparse

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

import benchmarks.oracles  # noqa: F401
from benchmarks.measure import Comparison, interleave, publish
from vitrail.data.augment.randaugment import DRAWS, rand_augment
from vitrail.utils.counter_rng import uniform

SIZE, BATCH = 224, 64
FILL = (124, 116, 104)


def compare(kind: str, rounds: int) -> Comparison:
    """Batches of 64, other draws in each round, against timm with one interpolation."""
    from timm.data.auto_augment import rand_augment_transform

    photos = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    pixels = [photos[n % 2][3 * n : 3 * n + SIZE, 6 * n : 6 * n + SIZE] for n in range(BATCH)]
    batch = torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy())
    images = [Image.fromarray(np.ascontiguousarray(one)) for one in pixels]
    hparams = {"img_mean": FILL, "interpolation": Image.Resampling[kind.upper()]}
    transform = rand_augment_transform("rand-m8-mstd0.5-inc1", hparams)
    epochs = iter(range(10**6))

    def ours() -> None:
        u = uniform(0, next(epochs), np.arange(BATCH), "rand_augment", 2 * DRAWS)
        rand_augment(batch, u, magnitude=8, std=0.5, fill=FILL)

    def theirs() -> None:
        for image in images:
            transform(image)

    return interleave(
        f"RandAugment, {BATCH} images of {SIZE}x{SIZE}",
        ("vitrail", ours),
        (f"timm, {kind}", theirs),
        rounds=rounds,
        note="seconds of a batch; its 64 images over them are images/s",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    publish("randaugment", [compare(kind, arguments.rounds) for kind in ("bicubic", "bilinear")])


if __name__ == "__main__":
    main()
