"""One image and a batch of 16 on the CPU in bfloat16: weights rounded once (`frozen=True`) and in every pass.

python -m benchmarks.frozen [--rounds 21]
"""

import argparse
from functools import partial

import numpy as np

from benchmarks.measure import interleave, publish
from vitrail.inference.torch_runtime import TorchRuntime
from vitrail.models.build import build_model
from vitrail.models.catalog import VARIANTS

NETWORKS = ("vit_small_patch16_224", "vit_base_patch16_224", "swin_tiny_patch4_window7_224", "resnet50")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    given = parser.parse_args()
    done = []
    for name in NETWORKS:
        row = VARIANTS[name]
        model = build_model(row.config).eval()
        every, once = (TorchRuntime(model, row.preprocess, "bf16", frozen=frozen) for frozen in (False, True))
        for batch in (1, 16):
            images = np.random.default_rng(0).integers(0, 256, (batch, *row.preprocess.size, 3), np.uint8)
            ours, theirs = ("once", partial(once.logits, images)), ("in every pass", partial(every.logits, images))
            rounds = given.rounds if batch == 1 else max(5, given.rounds // 4)
            done.append(interleave(f"{name}, batch {batch}", ours, theirs, rounds=rounds))
    publish("frozen", done)


if __name__ == "__main__":
    main()
