"""Parameters that are rounded to bfloat16 once, for models that do not change while they are used."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vitrail.classifier import Classifier
from vitrail.images.preprocess import Preprocess
from vitrail.inference.torch_runtime import TorchRuntime
from vitrail.models.build import build_model
from vitrail.models.configs import ConvNeXtConfig, ModelConfig, ResNetConfig, SwinConfig, ViTConfig

SIZE = (32, 32)
PREPROCESS = Preprocess(size=SIZE)
IMAGES = np.random.default_rng(0).integers(0, 256, (3, *SIZE, 3), np.uint8)
CONFIGS: dict[str, ModelConfig] = {
    "vit": ViTConfig(img_size=SIZE, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5),
    "deit": ViTConfig(
        img_size=SIZE, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, dist_token=True, init_values=0.1
    ),
    "stem": ViTConfig(img_size=SIZE, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=5, stem="conv"),
    "swin": SwinConfig(
        img_size=SIZE, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=5
    ),
    "resnet": ResNetConfig(img_size=SIZE, num_classes=5),
    "convnext": ConvNeXtConfig(img_size=SIZE, num_classes=5, depths=(1, 1, 1, 1), dims=(16, 16, 32, 32)),
}


def runtimes(model: nn.Module) -> tuple[TorchRuntime, TorchRuntime]:
    return TorchRuntime(model, PREPROCESS, "bf16"), TorchRuntime(model, PREPROCESS, "bf16", frozen=True)


def model_of(name: str) -> nn.Module:
    if name == "timm":
        return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5).eval()
    return build_model(CONFIGS[name])


@pytest.mark.parametrize("name", [*CONFIGS, "timm"])
def test_results_are_the_same_to_the_bit(name: str) -> None:
    model = model_of(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain, frozen = runtimes(model)
    assert np.array_equal(plain.logits(IMAGES), frozen.logits(IMAGES))
    assert np.array_equal(plain.features(IMAGES), frozen.features(IMAGES))
    assert plain.fingerprint() == frozen.fingerprint()
    after = model.state_dict()
    assert all(torch.equal(after[key], value) and after[key].dtype is value.dtype for key, value in before.items())
    assert any(each.dtype is torch.bfloat16 for each in frozen.model.parameters()) == (name != "timm")


def test_without_bfloat16_parameters_are_shared() -> None:
    model = model_of("vit")
    assert TorchRuntime(model, PREPROCESS, "off", frozen=True).model.head.weight is model.head.weight


def test_each_prediction_sees_the_parameters_of_now() -> None:
    classifier = Classifier(model_of("vit"), PREPROCESS, list("abcde"), precision="bf16")
    before = classifier.predict([IMAGES[0]])[0]
    nn.init.normal_(classifier.model.head.weight)
    assert classifier.predict([IMAGES[0]])[0] != before


def test_weights_that_a_hook_computes_stay() -> None:
    model = model_of("vit")
    nn.utils.spectral_norm(model.blocks[0].mlp.fc1)
    plain, frozen = runtimes(model.eval())
    assert np.array_equal(plain.logits(IMAGES), frozen.logits(IMAGES))


def test_the_fingerprint_is_that_of_the_model_that_computes() -> None:
    model = model_of("vit")
    runtime = runtimes(model)[1]
    before = runtime.fingerprint()
    model.head = nn.Linear(32, 7)
    assert runtime.fingerprint() == before
    assert runtime.logits(IMAGES).shape == (3, 5)
