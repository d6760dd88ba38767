"""The strict fit: sizes, channels, heads, and what it refuses."""

from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer as TimmViT
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from tolerance import assert_near
from vitrail.errors import WeightsError
from vitrail.models.build import build_model, configure
from vitrail.models.configs import SwinConfig, ViTConfig
from vitrail.weights.heads import decide_head
from vitrail.weights.load import load_weights
from vitrail.weights.tensors import Tensors
from weights.checkpoints import SWIN, all_cases, images, state, worst

VIT = ViTConfig(embed_dim=24, depth=2, num_heads=3, patch_size=8, img_size=(32, 32), num_classes=5)


SIZES = [  # at patches of 8; for others the image grows with them
    pytest.param(size, patch, marks=[] if patch == 8 or size == (24, 40) else [pytest.mark.slow])
    for size in [(16, 16), (24, 24), (40, 40), (48, 48), (64, 64), (24, 40), (40, 24), (8, 120)]
    for patch in (4, 8, 16)
]


def vit(**options: Any) -> nn.Module:
    return build_model(configure(VIT, **options)).eval()


def weights(case: str = "timm vit") -> Tensors:
    return Tensors(all_cases()[case].content)


def test_the_report_in_one_line_and_as_a_table() -> None:
    report = load_weights(vit(img_size=48, num_classes=7), weights(), num_classes=7, source="a.pth", layout="timm ViT")
    text = str(report)
    assert "\n" not in text
    assert "weights from a.pth: 29 tensors loaded" in text
    assert "1 resized (pos_embed 1x17x24 -> 1x37x24, bicubic, from a grid of 4x4 to 6x6)" in text
    assert "2 new (head.weight, head.bias: 7 classes in place of 5)" in text
    table = report.table().splitlines()
    assert len([line for line in table if line.startswith(("loaded", "resized", "new", "unused"))]) == len(
        report.entries
    )


@pytest.mark.parametrize(("size", "patch"), SIZES)
@torch.inference_mode()
def test_any_size_and_patch_is_timms(size: tuple[int, int], patch: int) -> None:
    size = (size[0] * patch // 8, size[1] * patch // 8)
    ours = vit(img_size=size, patch_size=patch)
    report = load_weights(ours, weights())
    theirs = TimmViT(embed_dim=24, depth=2, num_heads=3, patch_size=patch, img_size=size, num_classes=5).eval()
    theirs.load_state_dict(checkpoint_filter_fn(dict(weights()), theirs))
    for name, tensor in theirs.state_dict().items():
        assert worst(ours.state_dict()[name], tensor) <= 1e-5, name
    x = torch.randn(1, 3, *size)
    assert worst(ours(x), theirs(x)) <= 2e-5
    resized = {entry.name for entry in report.of("resized")}
    assert resized == {"pos_embed"} | ({"patch_embed.proj.weight"} if patch != 8 else set())


@pytest.mark.parametrize(
    ("family", "channels"), [*(("vit", n) for n in (1, 2, 3, 4, 7)), ("swin", 1), ("resnet", 4), ("convnext", 1)]
)
def test_channels_are_timms(family: str, channels: int) -> None:
    case = "timm resnet, basic" if family == "resnet" else f"timm {family}"
    first = {"resnet": "conv1", "convnext": "stem.0"}.get(family, "patch_embed.proj")
    model = build_model(configure(all_cases()[case].config, in_chans=channels))
    report = load_weights(model, weights(case))
    expected = timm.models._manipulate.adapt_input_conv(channels, weights(case)[f"{first}.weight"])
    assert torch.equal(model.state_dict()[f"{first}.weight"], expected)
    told = [entry.how for entry in report.of("adapted")]
    assert told == ([] if channels == 3 else [f"3 to {channels} channels"])


@torch.inference_mode()
@pytest.mark.parametrize(("window", "size"), [(2, 32), (8, 64), (4, 64), (6, 48)])
@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")  # in timm
def test_swin_for_another_window_is_timms(window: int, size: int) -> None:
    from timm.models import swin_transformer as ts

    options = {**SWIN, "window_size": window}
    ours = build_model(SwinConfig(**options, img_size=(size, size), num_classes=5)).eval()
    report = load_weights(ours, weights("timm swin"))
    theirs = ts.SwinTransformer(**options, img_size=size, num_classes=5).eval()
    theirs.load_state_dict(ts.checkpoint_filter_fn(dict(weights("timm swin")), theirs))
    x = torch.randn(1, 3, size, size)
    assert worst(ours(x), theirs(x)) <= 1e-5
    assert all(entry.name.endswith("bias_table") for entry in report.of("resized"))
    assert bool(report.of("resized")) == (window != 4)


def test_a_square_table_of_as_many_patches_is_resampled() -> None:
    """4x4 and 2x8 are 16 patches each: equal counts must not pass for equal grids."""
    report = load_weights(vit(img_size=(16, 64)), weights())
    assert report.of("resized")[0].how == "bicubic, from a grid of 4x4 to 2x8"


def test_a_grid_that_is_known_is_believed() -> None:
    long = vit(img_size=(16, 64))
    tensors = Tensors(state(long))
    same = load_weights(vit(img_size=(16, 64)), tensors, grid=(2, 8))
    assert not same.of("resized")
    assert (
        load_weights(vit(img_size=(64, 16)), tensors, grid=(2, 8))
        .of("resized")[0]
        .how.endswith("from a grid of 2x8 to 8x2")
    )


@torch.inference_mode()
def test_positions_with_and_without_the_class_token() -> None:
    """Published with a row for it, or with that row already added to it: the same network."""
    x = images()
    with_row, without = vit(), vit(no_embed_class=True)
    load_weights(with_row, weights())
    report = load_weights(without, weights())
    assert worst(without(x), with_row(x)) <= 1e-6
    assert [entry.name for entry in report.of("adapted")] == ["cls_token"]
    back = vit()
    load_weights(back, Tensors(state(without)))
    assert worst(back(x), with_row(x)) <= 1e-6
    larger = vit(no_embed_class=True, img_size=48)
    assert (
        "grid of 4x4 to 6x6; the position embedding of cls_token"
        in load_weights(larger, weights()).of("resized")[0].how
    )


@torch.inference_mode()
def test_a_model_runs_at_a_size_that_it_was_not_built_for() -> None:
    x = torch.randn(1, 3, 48, 64)
    small, large = vit(), vit(img_size=(48, 64))
    load_weights(small, weights())
    load_weights(large, weights())
    assert worst(small(x), large(x)) <= 1e-5


# ---- heads


@pytest.mark.parametrize("case", ["timm vit", "timm deit", "timm swin", "timm resnet, basic", "timm convnext"])
def test_a_new_number_of_classes_replaces_the_head(case: str) -> None:
    model = build_model(configure(all_cases()[case].config, num_classes=7))
    before = state(model)
    report = load_weights(model, weights(case), num_classes=7)
    new = [entry.name for entry in report.of("new")]
    assert len(new) == (4 if case == "timm deit" else 2)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in new)
    assert "7 classes in place of 5" in str(report)


def test_nobody_asked_for_another_number() -> None:
    with pytest.raises(WeightsError, match=r"head\.weight is 5x24 in the file and 7x24 in the model; give num_classes"):
        load_weights(vit(num_classes=7), weights())


def test_a_backbone_gets_a_head_only_if_asked() -> None:
    tensors = weights()
    del tensors["head.weight"], tensors["head.bias"]
    with pytest.raises(WeightsError, match=r"no head, and the model needs head\.weight, head\.bias; give"):
        load_weights(vit(), tensors)
    assert "the file has no head" in str(load_weights(vit(), tensors, num_classes=5))


def test_a_model_without_a_head_leaves_the_files() -> None:
    report = load_weights(vit(num_classes=0), weights())
    assert [(e.name, e.how) for e in report.of("unused")] == [
        ("head.weight", "the model has no head"),
        ("head.bias", "the model has no head"),
    ]


NAMES = ("a", "b", "c", "d", "e")


@torch.inference_mode()
@pytest.mark.parametrize("case", ["timm vit", "timm deit", "timm swin"])
def test_a_permutation_is_applied_by_name(case: str) -> None:
    straight, turned = all_cases()[case].model(), all_cases()[case].model()
    load_weights(straight, weights(case), class_names=NAMES, file_class_names=NAMES)
    report = load_weights(turned, weights(case), class_names="ecadb", file_class_names=NAMES)
    order = ["abcde".index(name) for name in "ecadb"]
    assert_near(turned(images()), straight(images())[:, order])
    assert "rows reordered to match the class names" in report.table()


def test_other_names_of_the_same_number_warn() -> None:
    with pytest.warns(UserWarning, match="class 1 is 'b' in the file and 'x' here"):
        report = load_weights(vit(), weights(), class_names=("a", "x", "c", "d", "e"), file_class_names=NAMES)
    assert len(report.of("new")) == 2
    assert "warning: same number of classes, but a new head" in str(report)
    with pytest.warns(UserWarning, match="the file does not name its 5 classes"):
        load_weights(vit(), weights(), class_names=NAMES)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_names": NAMES, "file_class_names": tuple("abxde")}, "class 2 is 'x' in the file and 'c' here"),
        ({"class_names": NAMES}, "does not name its 5 classes"),
    ],
)
def test_to_keep_a_head_its_names_must_be_the_same(options: Any, words: str) -> None:
    with pytest.raises(WeightsError, match=f"cannot keep the head: .*{words}"):
        load_weights(vit(), weights(), heads="keep", **options)


def test_keep_and_new_are_obeyed() -> None:
    assert not load_weights(vit(), weights(), heads="keep", class_names=NAMES, file_class_names=NAMES).of("new")
    assert len(load_weights(vit(), weights(), heads="new").of("new")) == 2
    with pytest.raises(WeightsError, match="7 classes in place of 5"):
        load_weights(vit(num_classes=7), weights(), heads="keep", num_classes=7)
    with pytest.raises(WeightsError, match="no head"):
        decide_head(0, 5, requested=5, old_names=None, new_names=None, policy="keep")


# ---- what is refused


def test_another_models_weights() -> None:
    with pytest.raises(WeightsError, match="weights of a different model") as error:
        load_weights(vit(), weights("timm swin"))
    assert "missing from the file: cls_token" in str(error.value)
    assert len(str(error.value)) < 3000


def test_a_deeper_network_does_not_fit() -> None:
    with pytest.raises(WeightsError, match=r"unexpected in the file: blocks\.1\.norm1\.weight"):
        load_weights(vit(depth=1), weights())


def test_the_model_stays_as_it_was() -> None:
    model, tensors = vit(), weights()
    before = state(model)
    del tensors["norm.bias"]
    with pytest.raises(WeightsError, match=r"missing from the file: norm\.bias$"):
        load_weights(model, tensors)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "value", [torch.zeros(24, dtype=torch.int64), torch.zeros(24, dtype=torch.complex64), torch.zeros(24).to_sparse()]
)
def test_numbers_of_another_kind(value: Tensor) -> None:
    tensors = weights()
    tensors["norm.weight"] = value
    with pytest.raises(WeightsError, match=r"norm\.weight is"):
        load_weights(vit(), tensors)


def test_half_precision_is_widened_and_said() -> None:
    tensors = Tensors({name: tensor.half() for name, tensor in weights().items()})
    model = vit()
    report = load_weights(model, tensors)
    assert {entry.how for entry in report.entries} == {"float16 to float32"}
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())


def test_counters_of_old_resnets_may_be_missing() -> None:
    tensors = weights("timm resnet, basic")
    for name in [name for name in tensors if name.endswith("num_batches_tracked")]:
        del tensors[name]
    report = load_weights(all_cases()["timm resnet, basic"].model(), tensors)
    assert all(entry.name.endswith("num_batches_tracked") for entry in report.of("new"))
    assert report.of("new")


def test_hostile_names_stay_in_one_line() -> None:
    tensors = weights()
    tensors["\x1b[31m\nevil" + "x" * 10_000] = torch.zeros(1)
    with pytest.raises(WeightsError) as error:
        load_weights(vit(), tensors)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


def test_timm_models_are_guests() -> None:
    """A teacher or a student of timm's takes weights by the same rules."""
    model = TimmViT(embed_dim=24, depth=2, num_heads=3, patch_size=8, img_size=48, num_classes=7)
    report = load_weights(model, weights(), num_classes=7)
    assert {entry.name for entry in report.entries if entry.state != "loaded"} == {
        "pos_embed",
        "head.weight",
        "head.bias",
    }
