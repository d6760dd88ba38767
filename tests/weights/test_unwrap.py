"""Training checkpoints: the state dict is found, and what was ignored is told."""

from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.errors import WeightsError
from vitrail.weights.formats.detect import convert_names
from vitrail.weights.load import load_weights
from vitrail.weights.unwrap import unwrap
from weights.checkpoints import all_cases


def good() -> dict[str, Tensor]:
    return dict(all_cases()["timm vit"].content)


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in good().items()}


WRAPPED: dict[str, Any] = {
    "bare": good,
    "model": lambda: {"model": good(), "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "epoch": 3},
    "state_dict": lambda: {"state_dict": good(), "args": Namespace(lr=0.1), "arch": "vit"},
    "state_dict_ema": lambda: {"state_dict_ema": good(), "state_dict": {k: v + 1 for k, v in good().items()}},
    "model_ema": lambda: {"model": {k: v + 1 for k, v in good().items()}, "model_ema": good()},
    "module.": lambda: {"state_dict": prefixed("module.")},
    "_orig_mod.": lambda: prefixed("_orig_mod."),
    "_orig_mod.module.": lambda: prefixed("_orig_mod.module."),
    "module._orig_mod.": lambda: {"model": prefixed("module._orig_mod.")},
    "Lightning": lambda: {
        "state_dict": {**prefixed("model."), "criterion.weight": torch.zeros(5), "acc.total": torch.zeros(())},
        "pytorch-lightning_version": "2.0",
        "hyper_parameters": {"lr": 0.1},
    },
    "average": lambda: {"n_averaged": torch.tensor(4), **prefixed("module.")},
    "dino": lambda: {
        "student": {k: v + 1 for k, v in prefixed("module.backbone.").items()},
        "teacher": {**prefixed("backbone."), "head.mlp.0.weight": torch.zeros(3, 3)},
        "dino_loss": {"center": torch.zeros(1, 3)},
    },
    "dinov2": lambda: {
        "model": {
            **prefixed("teacher.backbone."),
            **{k: v + 1 for k, v in prefixed("student.backbone.").items()},
            "teacher.dino_head.mlp.0.weight": torch.zeros(3, 3),
            "student.dino_head.mlp.0.weight": torch.zeros(3, 3),
        }
    },
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_right_weights_are_found(name: str) -> None:
    tensors, layout = convert_names(unwrap(WRAPPED[name]()))
    assert layout.name == "timm ViT"
    assert set(tensors) == set(good())
    assert all(torch.equal(tensors[key], value) for key, value in good().items())
    model = all_cases()["timm vit"].model()
    assert len(load_weights(model, tensors).of("loaded")) == len(good())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model_ema", ["the state dict is the checkpoint's 'model_ema'", "'model' ignored"]),
        ("dino", ["checkpoint's 'teacher'", "'student' ignored"]),
        ("dinov2", ["tensors of the checkpoint's 'student' ignored"]),
        ("average", ["n_averaged"]),
        ("Lightning", ["criterion.weight", "acc.total", "outside the model"]),
    ],
)
def test_what_was_left_aside_is_told(name: str, words: list[str]) -> None:
    tensors, _ = convert_names(unwrap(WRAPPED[name]()))
    table = load_weights(all_cases()["timm vit"].model(), tensors).table()
    assert all(word in table for word in words), table


def test_the_report_has_the_files_own_names() -> None:
    tensors, _ = convert_names(unwrap({"state_dict": prefixed("module.")}))
    del tensors["norm.bias"]
    tensors["norm.weight"] = torch.zeros(3)
    with pytest.raises(WeightsError, match=r"norm\.weight \(module\.norm\.weight in the file\) is 3 in the file"):
        load_weights(all_cases()["timm vit"].model(), tensors)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {"lr": 0.1}}, {"state_dict": {}}, {1: 2}])
def test_no_state_dict(content: dict[Any, Any]) -> None:
    with pytest.raises(WeightsError, match="no state dict") as error:
        unwrap(content)
    assert "\n" not in str(error.value)


def test_a_name_with_and_without_its_prefix() -> None:
    with pytest.raises(WeightsError, match=r"norm\.weight twice"):
        unwrap({**prefixed("module."), "norm.weight": torch.zeros(24)})
