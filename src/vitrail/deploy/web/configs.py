"""config.json and preprocessor_config.json of a web folder, which transformers.js reads."""

import math
from typing import Any

from vitrail.images.preprocess import Preprocess
from vitrail.models.configs import ModelConfig, ViTConfig
from vitrail.models.timm_compat import family_of

_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # Pillow's numbers
# By family: model_type, and the name of the architecture.
_TYPES = {
    "vit": ("vit", "ViTForImageClassification"),
    "swin": ("swin", "SwinForImageClassification"),
    "resnet": ("resnet", "ResNetForImageClassification"),
    "convnext": ("convnext", "ConvNextForImageClassification"),
}
_DISTILLED = ("deit", "DeiTForImageClassificationWithTeacher")


def model_config(config: ModelConfig, class_names: tuple[str, ...], preprocess: Preprocess) -> dict[str, Any]:
    """What transformers.js needs to know: the kind of model, its labels, and that its weights are in a second file."""
    distilled = isinstance(config, ViTConfig) and config.dist_token
    kind, architecture = _DISTILLED if distilled else _TYPES[family_of(config)]
    return {
        "architectures": [architecture],
        "model_type": kind,
        "image_size": list(preprocess.size),
        "num_channels": 3 if preprocess.channels == 1 else preprocess.channels,
        "num_labels": len(class_names),
        "id2label": {str(index): name for index, name in enumerate(class_names)},
        "label2id": {name: index for index, name in enumerate(class_names)},
        "transformers.js_config": {"use_external_data_format": {"model.onnx": 1}, "dtype": "fp32"},
    }


def processor_config(preprocess: Preprocess) -> dict[str, Any]:
    """The preprocessing in the terms of transformers' ViTImageProcessor, as far as it has them.

    Of an input that is not square, the whole image is resized to it.
    """
    height, width = preprocess.size
    grey = preprocess.channels == 1  # the graph makes it grey, see `graphs.py`
    center = preprocess.crop_mode == "center" and height == width
    edge = math.floor(height / preprocess.crop_pct)
    return {
        "image_processor_type": "ViTFeatureExtractor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": edge} if center else {"height": height, "width": width},
        "resample": _RESAMPLE[preprocess.interpolation],
        "do_center_crop": center,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean) * (3 if grey else 1),
        "image_std": list(preprocess.std) * (3 if grey else 1),
    }
