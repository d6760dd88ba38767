"""Every layout, read by us, gives the logits of the implementation that it comes from."""

import pytest
import torch
from torch import Tensor

from vitrail.errors import WeightsError
from vitrail.weights.formats.detect import FORMATS, convert_names, detect
from vitrail.weights.load import load_weights
from vitrail.weights.tensors import Tensors
from vitrail.weights.unwrap import unwrap
from weights.checkpoints import NAMES, all_cases, images, worst


def test_every_case_has_a_name_and_every_layout_a_case() -> None:
    assert sorted(NAMES) == sorted(all_cases())
    assert {case.layout for case in all_cases().values()} == {layout.name for layout in FORMATS}


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_logits_are_the_references(name: str) -> None:
    case = all_cases()[name]
    tensors, layout = convert_names(unwrap(case.content))
    assert layout.name == case.layout
    model = case.model()
    report = load_weights(model, tensors)
    expected: Tensor = case.reference(images())
    assert worst(model(images()), expected) <= 1e-5
    in_model = {entry.name for entry in report.entries if entry.state != "unused"}
    in_file = " + ".join(f"{entry.name} + {entry.file}" for entry in report.entries).split(" + ")
    assert in_model == set(model.state_dict())
    assert set(case.content.get("model", case.content)) <= set(in_file)
    assert all(entry.state in ("loaded", "unused") for entry in report.entries) or "registers" in name


def test_functions_leave_their_input_as_it_is() -> None:
    for name in ("google npz", "transformers swin", "authors' swin", "torchvision convnext"):
        content = Tensors(unwrap(all_cases()[name].content))
        before = {key: value.clone() for key, value in content.items()}
        convert_names(content)
        assert list(before) == list(content)
        assert all(torch.equal(before[key], content[key]) for key in before)


def test_transformers_new_names() -> None:
    """Since version 5 the modules have other names than the files; both are read."""
    from weights.checkpoints import transformers_models

    for name, model in transformers_models().items():
        case = all_cases()[f"transformers {name}"]
        theirs, _ = convert_names(Tensors(case.content))
        ours, layout = convert_names(Tensors(model.state_dict()))
        assert layout.name == case.layout
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_a_dinov2_classifier_reads_what_our_head_does_not() -> None:
    content = Tensors(all_cases()["transformers dinov2"].content)
    content = Tensors({f"dinov2.{key}": value for key, value in content.items()})
    content["classifier.weight"], content["classifier.bias"] = torch.randn(5, 48), torch.randn(5)
    tensors, _ = convert_names(content)
    assert "head.weight" not in tensors
    assert "concatenated" in tensors.unused["classifier.weight"]


def test_pre_logits_take_the_head_with_them() -> None:
    content = Tensors(all_cases()["google npz"].content)
    content["pre_logits/kernel"], content["pre_logits/bias"] = torch.randn(24, 24), torch.randn(24)
    tensors, _ = convert_names(content)
    assert set(tensors.unused) == {"pre_logits/kernel", "pre_logits/bias", "head/kernel", "head/bias"}
    model = all_cases()["google npz"].model()
    with pytest.raises(WeightsError, match="no head, and the model needs head"):
        load_weights(model, tensors)
    report = load_weights(model, tensors, num_classes=5)
    assert [entry.name for entry in report.of("new")] == ["head.weight", "head.bias"]


def test_a_hybrid_is_refused() -> None:
    content = Tensors(all_cases()["google npz"].content)
    content["conv_root/kernel"] = torch.randn(7, 7, 3, 8)
    with pytest.raises(WeightsError, match="hybrid"):
        convert_names(content)


def test_big_vision_numbers_its_layers_anew() -> None:
    case = all_cases()["google npz"]
    content = {
        "params/"
        + key.replace("LayerNorm_2", "LayerNorm_1")
        .replace("MlpBlock_3", "MlpBlock_0")
        .replace("Attention_1", "Attention_0")
        .replace("Transformer/posembed_input/", ""): value
        for key, value in case.content.items()
    }
    model = case.model()
    load_weights(model, convert_names(Tensors(content))[0])
    with torch.inference_mode():
        assert worst(model(images()), case.reference(images())) <= 1e-5


@pytest.mark.parametrize("names", [[], ["a", "b"], ["blocks.0.attn.qkv.weight", "x", "y", "z"]])
def test_an_unknown_layout_is_one_line(names: list[str]) -> None:
    with pytest.raises(WeightsError, match="unknown checkpoint format") as error:
        detect(names)
    assert "\n" not in str(error.value)


def test_queries_keys_and_values_must_be_alike() -> None:
    content = Tensors(all_cases()["transformers vit"].content)
    name = "vit.encoder.layer.1.attention.attention.key.weight"
    content[name] = content[name][:, :-1]
    with pytest.raises(WeightsError, match=r"layer\.1\.attention\.attention\.key\.weight is 24x23"):
        convert_names(content)
