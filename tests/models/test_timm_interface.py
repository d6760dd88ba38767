"""timm's interface on our models: what timm's tests of feature extraction call, and timm's own tools.

The oracle is timm's model with the same weights.
"""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.models import FeatureInfo, group_parameters
from timm.models._features import FeatureGetterNet
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from models.test_intermediates import MODELS, SQUARE, VITS
from models.test_parity import assert_close, pair
from test_classifier import classifier
from vitrail.errors import ModelError
from vitrail.images.preprocess import Preprocess
from vitrail.models.build import build_model
from vitrail.models.configs import ModelConfig, ResNetConfig, SwinConfig, ViTConfig
from vitrail.pretrained.create import create_model

CONFIGS = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


def images(config: ModelConfig, size: tuple[int, int] | None = None) -> Tensor:
    return torch.randn(2, 3, *(size or config.img_size), generator=torch.Generator().manual_seed(0))


def pair_of(config: ModelConfig) -> tuple[Any, Any]:
    ours, theirs = pair(config)
    return ours.eval(), theirs.eval()


@CONFIGS
def test_attributes(config: ModelConfig) -> None:
    ours, theirs = pair_of(config)
    for name in ("num_features", "head_hidden_size", "num_classes"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert getattr(ours, "output_fmt", None) == getattr(theirs, "output_fmt", None)
    if hasattr(theirs, "embed_dim"):
        assert ours.embed_dim == theirs.embed_dim
    heads = [model.get_classifier() for model in (ours, theirs)]
    assert isinstance(heads[0], tuple) is isinstance(heads[1], tuple)
    for one, other in zip(*(head if isinstance(head, tuple) else (head,) for head in heads), strict=True):
        assert torch.equal(one.weight, other.weight)
    expected = theirs.no_weight_decay() if hasattr(theirs, "no_weight_decay") else set()
    assert ours.no_weight_decay() == expected & {name for name, _ in ours.named_parameters()}


@CONFIGS
@torch.no_grad()
def test_feature_info_is_timms_and_that_of_the_maps(config: ModelConfig) -> None:
    ours, theirs = pair_of(config)
    infos = [FeatureInfo(model.feature_info, len(model.feature_info)) for model in (ours, theirs)]
    assert infos[0].channels() == infos[1].channels()
    assert infos[0].reduction() == infos[1].reduction()
    modules = dict(ours.named_modules())
    maps = ours.forward_intermediates(images(config), intermediates_only=True)
    assert len(maps) == len(ours.feature_info)
    for found, info in zip(maps, ours.feature_info, strict=True):
        assert info["module"] in modules
        assert found.shape[1] == info["num_chs"]
        assert tuple(found.shape[2:]) == tuple(-(-side // info["reduction"]) for side in config.img_size)


@CONFIGS
@torch.no_grad()
def test_outputs_as_a_dict(config: ModelConfig) -> None:
    ours, theirs = pair_of(config)
    options: dict[str, Any] = {"output_dict": True}
    if isinstance(config, ViTConfig):
        options["return_prefix_tokens"] = True
        reference = theirs.forward_intermediates(images(config), **options)
    else:
        features, maps = theirs.forward_intermediates(images(config))
        reference = {"image_features": features, "image_intermediates": maps}
    found = ours.forward_intermediates(images(config), **options)
    assert found.keys() == reference.keys()
    assert_close(found["image_features"], reference["image_features"])
    for name in reference.keys() - {"image_features"}:
        for one, other in zip(found[name], reference[name], strict=True):
            assert_close(one, other)
    assert "image_features" not in ours.forward_intermediates(images(config), intermediates_only=True, **options)


@pytest.mark.parametrize("config", VITS.values(), ids=VITS)
@torch.no_grad()
def test_get_intermediate_layers(config: ViTConfig) -> None:
    ours, theirs = pair_of(config)
    for options in ({}, {"n": 2, "reshape": True}, {"n": [0, 2], "norm": True, "return_prefix_tokens": True}):
        found, expected = (model.get_intermediate_layers(images(config), **options) for model in (ours, theirs))
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (one, other)), strict=True):
                assert_close(a, b)


@CONFIGS
@pytest.mark.parametrize("indices", [1, 2, [0], [0, 1], [-2]])
@pytest.mark.parametrize("norm", [False, True])
@torch.no_grad()
def test_timms_feature_getter(config: ModelConfig, indices: Any, norm: bool) -> None:
    """timm's wrapper prunes the model and extracts features from what is left."""
    ours, theirs = pair_of(config)
    nets = [FeatureGetterNet(model, indices, norm=norm) for model in (ours, theirs)]
    assert nets[0].out_indices == nets[1].out_indices
    assert nets[0].feature_info.channels() == nets[1].feature_info.channels()
    for one, other in zip(*(net(images(config)) for net in nets), strict=True):
        assert_close(one, other)
    names = [{name for name, _ in net.named_parameters()} for net in nets]
    assert names[0] - {"model.fc_norm.weight", "model.fc_norm.bias"} == names[1]


NAMES = ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224", "resnet18",
         "convnext_tiny")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "out_indices"), [*((name, None) for name in NAMES), ("swin_tiny_patch4_window7_224", (1, 3))]
)
@torch.no_grad()
def test_features_only(name: str, out_indices: Any) -> None:
    options = {"out_indices": out_indices} if out_indices else {}
    theirs = timm.create_model(name, features_only=True, **options).eval()
    ours = create_model(name, features_only=True, out_indices=out_indices).eval()
    state = {key.removeprefix("model."): value for key, value in theirs.state_dict().items()}
    # timm flattens the stages of CNNs to modules of the wrapper: layers.0 is layers_0 there.
    same = {key: state.get(key, state.get(key.replace(".", "_", 1))) for key in ours.model.state_dict()}
    ours.model.load_state_dict(same)
    for attribute in ("channels", "reduction"):
        assert getattr(ours.feature_info, attribute)() == getattr(theirs.feature_info, attribute)()
    assert tuple(ours.feature_info.out_indices) == tuple(theirs.feature_info.out_indices)
    assert ours.default_cfg["input_size"] == [3, 224, 224]
    batch = images(ours.model.config)
    found, expected = ours(batch), theirs(batch)
    assert len(found) == len(expected) == len(ours.feature_info.module_name())
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other.permute(0, 3, 1, 2) if "swin" in name else other)  # timm's of a Swin are B H W C


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet18"])
@torch.no_grad()
def test_created_without_pooling(name: str) -> None:
    model = create_model(name, num_classes=0, global_pool="").eval()
    batch = images(model.config)
    features = model(batch)
    assert_close(features, model.forward_head(model.forward_features(batch)))
    theirs = timm.create_model(name, num_classes=0, global_pool="").eval()
    assert features.shape == theirs(batch).shape
    if (pool := model.pretrained_cfg["pool_size"]) is not None:
        assert tuple(pool) == tuple(theirs.pretrained_cfg["pool_size"])
    with pytest.raises(ModelError, match="0 classes"):
        create_model(name, global_pool="")
    with pytest.raises(ModelError, match="features_only"):
        create_model(name, out_indices=2)


@CONFIGS
@torch.no_grad()
def test_pruned_models_run(config: ModelConfig) -> None:
    ours, theirs = pair_of(config)
    for model in (ours, theirs):
        assert model.prune_intermediate_layers([0]) == [0]
    assert ours.num_features == theirs.num_features
    if isinstance(config, ViTConfig) and config.dist_token:
        return  # timm's forward then still averages two tokens
    assert_close(ours(images(config)), theirs(images(config)))


def test_a_pruned_model_is_not_saved(tmp_path: Any) -> None:
    clf = classifier()
    clf.model.prune_intermediate_layers([0], prune_head=False)
    with pytest.raises(ModelError, match="state_dict"):
        clf.save(tmp_path / "model")


@CONFIGS
@torch.no_grad()
def test_reset_classifier_and_pooling(config: ModelConfig) -> None:
    ours, theirs = pair_of(config)
    if not (isinstance(config, ViTConfig) and config.dist_token):
        for model in (ours, theirs):
            model.reset_classifier(0, "")
        assert ours.global_pool == ""
        assert_close(ours(images(config)), theirs(images(config)))
        assert_close(ours(images(config)), ours.forward_head(ours.forward_features(images(config))))
    for model in (ours, theirs):
        model.reset_classifier(0, "token" if isinstance(config, ViTConfig) and config.class_token else "avg")
    assert_close(ours(images(config)), theirs(images(config)))
    ours.reset_classifier(7)
    assert ours(images(config)).shape == (2, 7)
    with pytest.raises(ModelError):
        ours.reset_classifier(7, "")
    with pytest.raises(ModelError):
        ours.reset_classifier(7, "max")


def test_a_vit_changes_its_pooling() -> None:
    ours, theirs = pair_of(VITS["vit"])
    for model in (ours, theirs):
        model.reset_classifier(0, "avg")
    assert ours.config.global_pool == ours.global_pool == "avg"
    assert_close(ours(images(VITS["vit"])), theirs(images(VITS["vit"])))
    with pytest.raises(ModelError, match="class_token"):
        build_model(VITS["vit, average pooling"]).reset_classifier(3, "token")


@CONFIGS
@pytest.mark.parametrize("size", [(64, 96), 16])  # whole windows of Swin, where it is timm's
@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")  # in timm
@torch.no_grad()
def test_set_input_size(config: ModelConfig, size: Any) -> None:
    """As a model that is made for the new size and loaded with these weights, and as timm's method."""
    ours, theirs = pair_of(config)
    height, width = (size, size) if isinstance(size, int) else size
    if not isinstance(config, ViTConfig | SwinConfig):
        height, width = max(height, 32), max(width, 32)
    ours.set_input_size((height, width))
    assert ours.config.img_size == (height, width)
    if isinstance(config, ViTConfig):
        theirs.set_input_size((height, width))
    elif isinstance(config, SwinConfig):
        theirs.set_input_size((height, width), window_size=config.window_size)
    x = images(config, (height, width))
    assert_close(ours.forward_features(x), theirs.forward_features(x))
    assert_close(ours(x), theirs(x))
    rebuilt = build_model(replace(config, img_size=(height, width)))
    rebuilt.load_state_dict(ours.state_dict())
    assert_close(ours(x), rebuilt.eval()(x))


def test_sizes_that_cannot_be_set() -> None:
    vit = build_model(VITS["vit"])
    with pytest.raises(ModelError, match="not a multiple of the patch size"):
        vit.set_input_size((30, 32))
    with pytest.raises(ModelError, match="patch size"):
        vit.set_input_size(64, patch_size=4)
    assert vit.config.img_size == SQUARE
    vit.set_input_size(patch_size=8)
    swin = build_model(MODELS["swin"])
    swin.prune_intermediate_layers([0])
    with pytest.raises(ModelError, match="before pruning"):
        swin.set_input_size(64)


@CONFIGS
@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher(config: ModelConfig, coarse: bool) -> None:
    """timm's grouping by depth, and its optimizer groups with layer decay, are those of timm's model."""
    ours, theirs = pair_of(config)
    found, expected = (group_parameters(model, model.group_matcher(coarse), reverse=True) for model in (ours, theirs))
    assert found == expected
    if not coarse:
        groups = [param_groups_layer_decay(model, 0.05, layer_decay=0.7) for model in (ours, theirs)]
        counts = [
            sorted((group["lr_scale"], group["weight_decay"], len(group["params"])) for group in each)
            for each in groups
        ]
        assert counts[0] == counts[1]


@CONFIGS
def test_grad_checkpointing_gives_the_same_gradients(config: ModelConfig) -> None:
    ours = build_model(config).train()

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        ours.zero_grad()
        output = ours(images(config))
        torch.stack(output if isinstance(output, tuple) else (output,)).sum().backward()
        return [p.grad.clone() for p in ours.parameters() if p.grad is not None]

    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    plain = gradients()
    ours.set_grad_checkpointing()
    for one, other in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(one, other)


def test_pretrained_cfg_is_what_timm_needs() -> None:
    clf = classifier(ViTConfig(img_size=(32, 48), patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=4))
    clf.preprocess = clf.preprocess.replace(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.9)
    clf.model.preprocess = clf.preprocess
    found = resolve_model_data_config(clf.model)
    assert tuple(found["input_size"]) == (3, 32, 48)
    assert tuple(found["mean"]) == (0.1, 0.2, 0.3)
    assert tuple(found["std"]) == (0.4, 0.5, 0.6)
    assert found["crop_pct"] == 0.9
    assert create_transform(**found)
    cfg = clf.model.pretrained_cfg
    assert cfg == clf.model.default_cfg
    state = clf.model.state_dict()
    assert f"{cfg['classifier']}.weight" in state
    assert f"{cfg['first_conv']}.weight" in state


def test_without_known_preprocessing_it_is_imagenets() -> None:
    found = build_model(ResNetConfig(layers=(1, 1, 1, 1), img_size=(64, 64), num_classes=3)).pretrained_cfg
    assert tuple(found["input_size"]) == (3, 64, 64)
    assert tuple(found["mean"]) == timm.data.constants.IMAGENET_DEFAULT_MEAN
    assert Preprocess.from_timm(found).size == (64, 64)
