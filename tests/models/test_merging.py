"""A ViT that merges tokens: what must be the same as without, and where merging is stored, refused and exported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

import vitrail
from tolerance import assert_near, assert_same_gradients
from vitrail.errors import ModelError
from vitrail.images.preprocess import Preprocess
from vitrail.models.attention_weights import attention_weights
from vitrail.models.build import build_model, configure, merged_model
from vitrail.models.configs import ViTConfig
from vitrail.models.vit import VisionTransformer

SMALL: dict[str, Any] = {
    "img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "token": {},
    "average": {"global_pool": "avg", "class_token": False, "fc_norm": True},
    "average with class token": {"global_pool": "avg"},
    "distilled": {"dist_token": True},
    "registers": {"reg_tokens": 2, "init_values": 0.3},
}


def small(kind: str = "token", **options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    model = build_model(ViTConfig(**SMALL | KINDS[kind] | options))
    assert isinstance(model, VisionTransformer)
    for parameter in model.parameters():  # larger than at first, so that blocks matter
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def twins(model: VisionTransformer, count: int = 2) -> Tensor:
    """Images with every patch twice in a row. The position embedding of the model is made the same for both."""
    grid = model.pos_embed.data[:, -24:]
    grid[:, 1::2] = grid[:, 0::2]
    return torch.randn(count, 3, 32, 3, 8).repeat_interleave(2, dim=3).flatten(3)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_equal_tokens_changes_no_logit(kind: str) -> None:
    """Twelve pairs of equal patches, all merged: the other tokens attend to each pair as to two."""
    model = small(kind).double()
    images = twins(model).double()
    merged = merged_model(model, (12, 0, 0))
    with torch.no_grad():
        torch.testing.assert_close(merged(images), model(images))
        torch.testing.assert_close(merged.forward_features(images), model.forward_features(images))
        torch.testing.assert_close(merged.forward_pre_logits(images), model.forward_pre_logits(images))


@pytest.mark.parametrize("kind", KINDS)
def test_merging_no_token_is_the_same_bit_for_bit(kind: str) -> None:
    model, images = small(kind), torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(merged_model(model, (0, 0, 0))(images), model(images))
    assert merged_model(model, 0).config == model.config


@pytest.mark.parametrize("kind", KINDS)
def test_forward_equals_the_head_on_all_features(kind: str) -> None:
    model, images = merged_model(small(kind).double(), 3), torch.randn(2, 3, 32, 48, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(model(images), model.forward_head(model.forward_features(images)))
        maps = model.forward_intermediates(images, intermediates_only=True)
    assert [tuple(each.shape) for each in maps] == [(2, 24, 4, 6)] * 3


def test_blocks_compute_fewer_tokens() -> None:
    model, rows = merged_model(small(), (6, 2, 0)), []
    for block in model.blocks:
        block.attn.proj.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
        block.mlp.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    model(torch.randn(1, 3, 32, 48))
    assert rows == [25, 19, 19, 17, 1, 1]


def test_logits_do_not_depend_on_the_batch() -> None:
    model, images = merged_model(small(), 4), torch.randn(3, 3, 32, 48)
    with torch.no_grad():
        assert_near(model(images), torch.cat([model(image[None]) for image in images]))


@pytest.mark.parametrize("kind", ["token", "average"])
def test_gradients_reach_all_parameters_and_checkpointing_keeps_them(kind: str) -> None:
    model = merged_model(small(kind).double(), 3).train()
    x = torch.randn(2, 3, 32, 48, dtype=torch.double, requires_grad=True)
    inputs = [x, *model.parameters()]
    plain = model(x)
    model.set_grad_checkpointing(True)
    assert_same_gradients(model(x), plain, inputs)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_bfloat16_is_near_float32() -> None:
    model = small("average")
    images = twins(model)
    merged = merged_model(model, (12, 0, 0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_near(merged(images).float(), model(images).float(), 0.05)


def test_the_merged_model_shares_parameters() -> None:
    model = small().train()
    merged = merged_model(model, 2)
    assert merged.training
    assert [p.data_ptr() for p in merged.parameters()] == [p.data_ptr() for p in model.parameters()]
    assert merged_model(merged, 0).config.merge == ()
    with pytest.raises(ModelError, match="ResNet cannot merge"):
        merged_model(vitrail.create_model("resnet20_32"), 2)


@pytest.mark.parametrize(
    ("amount", "expected"),
    [(2, (2, 2, 0)), (0.25, (3, 3, 0)), (0.3, (4, 3, 0)), (0, ()), (0.0, ()), ((5, 1, 0), (5, 1, 0))],
)
def test_a_number_or_a_share_is_spread_evenly(amount: Any, expected: tuple[int, ...]) -> None:
    config = configure(ViTConfig(**SMALL), merge=amount)
    assert isinstance(config, ViTConfig)
    assert config.merge == expected


def test_with_average_pooling_the_last_block_merges_too() -> None:
    config = configure(ViTConfig(**SMALL | KINDS["average"]), merge=0.5)
    assert isinstance(config, ViTConfig)
    assert config.merge == (4, 4, 4)


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ((1, 1), "3 numbers, one per block"),
        ((1, -1, 0), "at least 0"),
        ((1, 1, 1), "end with 0"),
        ((12, 7, 0), "merge=7 in block 1: it has 12 patch tokens"),
        (13, "merge=13 in block 0: it has 24"),
        (1.5, "a share below 1"),
        (-1, "a share below 1"),
    ],
)
def test_what_cannot_be_merged_is_refused(merge: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        configure(ViTConfig(**SMALL), merge=merge)


def test_other_architectures_have_no_merge() -> None:
    with pytest.raises(ModelError, match="Swin has no option 'merge'"):
        vitrail.create_model("swin_tiny_patch4_window7_224", merge=4)


def classifier(merge: Any = 40) -> vitrail.Classifier:
    model = vitrail.create_model("vit_tiny_patch16_224", num_classes=3, depth=2, merge=merge)
    return vitrail.Classifier(model, Preprocess(size=(224, 224)), ("a", "b", "c"))


def test_a_model_folder_keeps_what_is_merged_and_timm_refuses_it(tmp_path: Path) -> None:
    clf = classifier()
    with pytest.warns(UserWarning, match=r"merged tokens \(40, 0 by block\): timm cannot"):
        clf.save(tmp_path / "model")
    again = vitrail.load(tmp_path / "model")
    assert again.model.config == clf.model.config
    assert again.model.config.merge == (40, 0)
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    for parameter in again.model.parameters():  # to the alignment of others: with AVX2, it changes the rounding
        parameter.data = parameter.data.clone()
    assert again.predict(image) == clf.predict(image)
    assert "timm cannot merge tokens" in (tmp_path / "model" / "README.md").read_text()
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    record = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "merge" not in record["model_args"]


def test_the_weights_of_a_merged_model_load_without_merging(tmp_path: Path) -> None:
    clf = vitrail.Classifier(
        vitrail.create_model("vit_nano_patch2_8", num_classes=3, merge=2), Preprocess(size=(8, 8)), ("a", "b", "c")
    )
    assert clf.architecture == "vit_nano_patch2_8"
    clf.save(tmp_path / "model")
    folder = tmp_path / "model"
    assert vitrail.create_model("vit_nano_patch2_8", weights=folder).config.merge == (2, 2, 2, 0)
    assert vitrail.create_model("vit_nano_patch2_8", weights=folder, merge=0).config.merge == ()


def test_folders_written_before_there_was_merging_still_load(tmp_path: Path) -> None:
    classifier(merge=0).save(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    record = json.loads(path.read_text())
    del record["vitrail"]["config"]["merge"]
    path.write_text(json.dumps(record))
    (tmp_path / "model" / "SHA256SUMS").unlink()  # which these folders did not have either
    assert vitrail.load(tmp_path / "model").model.config.merge == ()


def test_another_image_size_has_to_have_enough_patches() -> None:
    clf = classifier(merge=90)
    assert clf.resize(256).preprocess.size == (256, 256)
    with pytest.raises(ModelError, match=r"merge=90 .*144 patch tokens"):
        clf.resize(192)


def test_methods_that_need_single_patches_refuse_a_merged_model() -> None:
    clf = classifier()
    image = np.zeros((224, 224, 3), np.uint8)
    for method in ("relevance", "gradcam", "rollout", "integrated_gradients"):
        with pytest.raises(ModelError, match=r"merged vit.*use occlusion"):
            vitrail.explain(clf, image, method=method)
    with pytest.raises(ModelError, match="merges tokens"):
        attention_weights(clf.model, torch.zeros(1, 3, 224, 224))
    assert vitrail.explain(clf, image).method == "occlusion"


def test_merging_belongs_to_the_fingerprint() -> None:
    from vitrail.utils.fingerprint import model_fingerprint

    model = small()
    assert model_fingerprint(model) != model_fingerprint(merged_model(model, 2))


@pytest.mark.slow
def test_a_compiled_model_is_the_same() -> None:
    model, images = merged_model(small("average"), 3), torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        assert_near(torch.compile(model, backend="aot_eager", fullgraph=True)(images), model(images))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's exporter
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_runtime_and_openvino_merge_the_same(kind: str, tmp_path: Path) -> None:
    import onnxruntime

    from vitrail.inference.openvino_runtime import openvino_core

    model = merged_model(small(kind), (8, 4, 0))
    path = tmp_path / "model.onnx"
    program = torch.onnx.export(
        model, (torch.randn(2, 3, 32, 48),), dynamo=True, opset_version=18, verbose=False,
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
    )  # fmt: skip
    assert program is not None
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    compiled = openvino_core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    expected: Tensor
    for batch in (1, 3):
        images = torch.randn(batch, 3, 32, 48)
        with torch.no_grad():
            expected = model(images)
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        assert_near(torch.from_numpy(logits), expected, 1e-4)
        assert_near(torch.from_numpy(compiled(images.numpy())[0].copy()), expected, 1e-4)
