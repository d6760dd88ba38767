"""Each fold against the model as it was: in float64, where only an error in the algebra is above 1e-12."""

import pytest
import torch
from torch import Tensor, nn

from deploy.models import CONFIGS, preprocess_of, random_model, random_pixels
from tolerance import assert_near
from vitrail.deploy.fold.fold import FOLDS, fold_model
from vitrail.errors import ConfigError, ModelError
from vitrail.images.preprocess import Preprocess

# What each fold leaves out of the graph, and in which models it must do so.
_TARGETS = {
    "norms": {name for name in CONFIGS if "resnet" not in name},
    "query_scale": {name for name in CONFIGS if "resnet" not in name and name != "convnext"},
    "key_bias": {name for name in CONFIGS if "resnet" not in name and name not in ("convnext", "vit without bias")},
    "value_bias": {name for name in CONFIGS if "resnet" not in name and name not in ("convnext", "vit without bias")},
    "layer_scale": {"deit3", "dinov2 with registers", "mean of patches", "convnext"},
    "batch_norms": {"resnet", "small resnet", "vit with convolutional stem"},
    # not where the first convolution pads
    "normalize": set(CONFIGS) - {"resnet", "small resnet", "vit with convolutional stem", "swin with padding"},
    "positions": {"vit", "vit without bias", "vit without head", "vit with convolutional stem", "deit"}
    | {"deit with one head", "mean of patches"},
    "heads": {"deit"},
    "window_bias": {"swin", "swin with padding"},
    "window_order": {"swin", "swin with padding"},
    "last_block": {name for name in CONFIGS if name.startswith(("vit", "deit", "dinov2"))},
}


def expected(model: nn.Module, preprocess: Preprocess, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and features of the model itself."""
    mean, std = (torch.tensor(x, dtype=pixels.dtype).view(-1, 1, 1) for x in (preprocess.mean, preprocess.std))
    images = (pixels / 255 - mean) / std
    return model(images), model.forward_pre_logits(images)  # type: ignore[operator]


def layers(model: nn.Module) -> list[str]:
    """The layers and tensors of a model, as far as a fold can change them."""
    return [f"{name} {type(module).__name__}" for name, module in model.named_modules()] + [
        f"{name} {tuple(tensor.shape)} {tensor.sum():.6g}" for name, tensor in model.state_dict().items()
    ]


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_folds_are_exact(name: str) -> None:
    config = CONFIGS[name]
    model, preprocess, pixels = random_model(config).double(), preprocess_of(config), random_pixels(config)
    wanted = expected(model, preprocess, pixels)
    before = layers(model)
    unfolded = fold_model(model, preprocess, skip=FOLDS)
    for fold in ("", *FOLDS, "all"):
        skip = set(FOLDS) - {fold} if fold != "all" else ()
        folded = fold_model(model, preprocess, skip)
        for output, right, kind in zip(folded(pixels), wanted, ("logits", "features"), strict=True):
            assert_near(output, right, 1e-12, f"{fold}: {kind}")
        if fold in FOLDS:
            changed = layers(folded) != layers(unfolded) or vars(folded) != vars(unfolded)
            assert changed or name not in _TARGETS[fold], fold
    assert layers(model) == before, "the model itself must not change"


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_all_folds_in_float32(name: str) -> None:
    config = CONFIGS[name]
    model, preprocess, pixels = random_model(config), preprocess_of(config), random_pixels(config)
    wanted = expected(model.double(), preprocess, pixels)
    folded = fold_model(model.float(), preprocess)
    for output, right in zip(folded(pixels.float()), wanted, strict=True):
        assert_near(output.double(), right, 1e-5)


def test_every_fold_has_models_to_change() -> None:
    assert _TARGETS.keys() == FOLDS.keys()


@torch.no_grad()
def test_other_image_size() -> None:
    """Positions are resampled to the size of the preprocessing, and a Swin's windows follow it."""
    for name, size in (("vit", (32, 20)), ("swin", (40, 72)), ("swin with padding", (64, 64))):
        config = CONFIGS[name]
        model = random_model(config)  # resampling is in float32
        pixels = torch.randint(0, 256, (2, 3, *size)).float()
        preprocess = preprocess_of(config).replace(size=size)
        for output, right in zip(
            fold_model(model, preprocess)(pixels), expected(model, preprocess, pixels), strict=True
        ):
            assert_near(output, right, 1e-5, name)


@torch.no_grad()
def test_folds_do_what_they_say() -> None:
    folded = fold_model(random_model(CONFIGS["dinov2 with registers"]), preprocess_of(CONFIGS["vit"]))
    names = {type(module).__name__ for module in folded.modules()}
    assert "LayerScale" not in names
    assert "Normalize" not in names
    assert all(norm.weight is None for norm in folded.modules() if isinstance(norm, nn.LayerNorm))
    assert all(layer.bias is None for name, layer in folded.named_modules() if name.endswith(("attn.k", "attn.v")))
    folded = fold_model(random_model(CONFIGS["resnet"]), preprocess_of(CONFIGS["resnet"]))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


@torch.no_grad()
def test_one_gather_per_change_of_order() -> None:
    """Into windows, into shifted windows, into the order of merging, and into shifted windows. The second stage is one
    window wide, so that its windows are in the order of its tokens."""
    folded = fold_model(random_model(CONFIGS["swin"]), preprocess_of(CONFIGS["swin"]))
    assert sum(type(module).__name__ == "Reorder" for module in folded.modules()) == 4


def test_errors() -> None:
    model, preprocess = random_model(CONFIGS["vit"]), preprocess_of(CONFIGS["vit"])
    with pytest.raises(ConfigError, match="norms"):
        fold_model(model, preprocess, skip={"norm"})
    with pytest.raises(ModelError, match="30x24"):
        fold_model(model, preprocess.replace(size=(30, 24)))
