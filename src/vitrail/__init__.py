"""vitrail: train, evaluate and use Vision Transformers on your own images.

    clf = vitrail.train("photos/")            # a Classifier
    clf = vitrail.load("runs/photos")
    clf.predict(["a.jpg"]); clf.evaluate("photos/")
    vitrail.explain(clf, "a.jpg")             # which pixels decided
    vitrail.export(clf, "exports/photos", check="photos/")
    vitrail.serve("exports/photos")
    vitrail.compare("photos/", budget="10m")  # ViT or CNN
    vitrail.recommend("photos/", max_latency_ms=50)
    model = vitrail.create_model("vit_base_patch16_224", num_classes=10)  # an nn.Module

Importing vitrail does not import torch; each name below is imported when it is first used.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from vitrail._version import __version__
from vitrail.errors import VitrailError

# onnxruntime (1.32) sends Microsoft reports of its use unless this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from vitrail.classifier import Classifier, ExportedClassifier, load
    from vitrail.comparison.run import compare
    from vitrail.deploy.export import export
    from vitrail.diagnosis.doctor import doctor
    from vitrail.explanation.explain import explain
    from vitrail.explanation.result import Explanation
    from vitrail.images.preprocess import Preprocess
    from vitrail.models.attention_weights import attention_weights
    from vitrail.models.catalog import list_models
    from vitrail.pretrained.create import create_model
    from vitrail.recommendation.recommend import recommend
    from vitrail.service.server import serve
    from vitrail.training.run import train

__all__ = [
    "Classifier",
    "Explanation",
    "ExportedClassifier",
    "Preprocess",
    "VitrailError",
    "__version__",
    "attention_weights",
    "compare",
    "create_model",
    "doctor",
    "explain",
    "export",
    "list_models",
    "load",
    "recommend",
    "serve",
    "train",
]

_MODULES = {
    "Classifier": "vitrail.classifier",
    "ExportedClassifier": "vitrail.classifier",
    "Explanation": "vitrail.explanation.result",
    "Preprocess": "vitrail.images.preprocess",
    "attention_weights": "vitrail.models.attention_weights",
    "compare": "vitrail.comparison.run",
    "create_model": "vitrail.pretrained.create",
    "explain": "vitrail.explanation.explain",
    "export": "vitrail.deploy.export",
    "doctor": "vitrail.diagnosis.doctor",
    "list_models": "vitrail.models.catalog",
    "load": "vitrail.classifier",
    "recommend": "vitrail.recommendation.recommend",
    "serve": "vitrail.service.server",
    "train": "vitrail.training.run",
}


# What is looked for here, and where it is.
_ELSEWHERE = {
    **dict.fromkeys(("predict", "evaluate", "embed"), "it is a method: vitrail.load('runs/photos').{}(...)"),
    **dict.fromkeys(("fit", "finetune", "fine_tune"), "use vitrail.train('photos/')"),
    **dict.fromkeys(("load_model", "from_pretrained"), "use vitrail.load('runs/photos') or vitrail.create_model(NAME)"),
    **dict.fromkeys(("validate", "val", "test"), "use vitrail.load('runs/photos').evaluate('photos/')"),
    **dict.fromkeys(
        ("Learner", "Trainer", "YOLO", "Model"), "use vitrail.train('photos/') and vitrail.load('runs/photos')"
    ),
    **dict.fromkeys(
        ("ViT", "VisionTransformer", "DeiT", "Swin", "SwinTransformer", "ResNet", "ConvNeXt"),
        "use vitrail.create_model('vit_tiny_patch16_224', num_classes=10), with a name from vitrail.list_models()",
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        text = f"module 'vitrail' has no attribute {name!r}"
        if name in _ELSEWHERE:
            text += f": {_ELSEWHERE[name].format(name)}"
            if name[0].isupper():  # `from vitrail import ViT` replaces the message of an AttributeError
                raise ImportError(text, name="vitrail")
        raise AttributeError(text)
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value  # the next access does not call __getattr__
    return value


def __dir__() -> list[str]:
    return __all__
