"""How the time for an image grows with its side: a ViT, a Swin and a ResNet of like cost.

One image at 224 px and at 1.5 and 2 times this side, the models in turn, with new weights: the measurement of
`vitrail compare` without its trainings.

    python -m benchmarks.resolution
"""

from benchmarks.measure import write
from vitrail.classifier import Classifier
from vitrail.comparison.timings import time_at_scales
from vitrail.images.preprocess import Preprocess
from vitrail.models.build import build_model
from vitrail.models.catalog import variant

MODELS = ("deit_small_patch16_224", "swin_tiny_patch4_window7_224", "resnet50")


def main() -> None:
    classifiers = {}
    for name in MODELS:
        model = build_model(variant(name).config).eval()
        labels = [str(number) for number in range(model.num_classes)]
        classifiers[name] = Classifier(model, Preprocess(size=(224, 224)), labels)
    results = {}
    for name, rows in time_at_scales(classifiers, batch=1).items():
        results[name] = {
            "gmacs": variant(name).gmacs,
            "bf16": classifiers[name].engine().runtime.bf16,
            "times": [
                {"size": row["size"], "ms": round(row["ms"], 1), "times_as_long": round(row["ms"] / rows[0]["ms"], 2)}
                for row in rows
            ],
        }
        print(name, results[name], flush=True)
    write("resolution", results=results)


if __name__ == "__main__":
    main()
