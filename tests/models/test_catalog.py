"""The parameter counts and costs in the catalog; names, options and their errors."""

import subprocess
import sys

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitrail.errors import ModelError
from vitrail.models.build import build_model
from vitrail.models.catalog import VARIANTS, list_models, variant
from vitrail.models.configs import ResNetConfig, ViTConfig
from vitrail.pretrained.create import create_model

IN_TIMM = [name for name in VARIANTS if timm.is_model(name)]


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_count_and_gmacs_are_exact(name: str) -> None:
    row = VARIANTS[name]
    with torch.device("meta"):
        model = build_model(row.config).eval()
        image = torch.empty(1, row.config.in_chans, *row.config.img_size)
        with FlopCounterMode(display=False) as flops:
            model.forward_head(model.forward_features(image))
    assert count(model) == row.params
    assert flops.get_total_flops() / 2e9 == pytest.approx(row.gmacs, rel=1e-3)


@pytest.mark.parametrize("name", IN_TIMM)
def test_parameters_equal_timms_in_name_shape_and_number(name: str) -> None:
    with torch.device("meta"):
        ours = create_model(name)
        theirs = timm.create_model(name, num_classes=ours.num_classes)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert VARIANTS[name].params == count(theirs)
    exempt = theirs.no_weight_decay() if hasattr(theirs, "no_weight_decay") else set()
    assert ours.no_weight_decay() >= {n for n, _ in theirs.named_parameters() if any(word in n for word in exempt)}


def test_required_variants_exist() -> None:
    assert {row.family for row in VARIANTS.values()} >= {"vit", "deit", "deit3", "dinov2", "swin", "resnet", "convnext"}
    for size in ("tiny", "small", "base", "large"):
        assert {f"vit_{size}_patch16_{side}" for side in (224, 384)} <= VARIANTS.keys()
        assert f"swin_{size}_patch4_window7_224" in VARIANTS


def test_every_other_variant_is_in_timm() -> None:
    ours = [row.config for name, row in VARIANTS.items() if name not in IN_TIMM]
    assert ours
    small = (isinstance(config, ResNetConfig) and config.small_stem for config in ours)
    assert all(
        other or (isinstance(config, ViTConfig) and config.stem == "conv")
        for config, other in zip(ours, small, strict=True)
    )


def test_list_models_takes_a_pattern_or_a_part() -> None:
    assert list_models("swin*") == [name for name in VARIANTS if name.startswith("swin")]
    assert list_models("distilled") == list_models("*distilled*") != []
    assert list_models("nothing-like-it") == []


def test_unknown_name_suggests_close_names() -> None:
    with pytest.raises(ModelError, match="vit_base_patch16_224"):
        variant("vit_bas_patch16_224")


def test_unknown_option_suggests_close_names() -> None:
    with pytest.raises(ModelError, match="drop_path_rate"):
        create_model("vit_tiny_patch16_224", drop_path=0.1)
    with pytest.raises(ModelError, match="100x100"):
        create_model("vit_tiny_patch16_224", img_size=100)
    with pytest.raises(ModelError, match="num_heads=5"):
        create_model("vit_tiny_patch16_224", num_heads=5)


def test_options_reach_the_model() -> None:
    model = create_model("vit_tiny_patch16_224", img_size=(32, 48), in_chans=1, num_classes=7, depth=2)
    assert model.eval()(torch.zeros(2, 1, 32, 48)).shape == (2, 7)
    assert create_model("swin_tiny_patch4_window7_224", img_size=64, num_classes=0).eval()(
        torch.zeros(1, 3, 64, 64)
    ).shape == (1, 768)


def test_reading_the_catalog_imports_no_torch() -> None:
    code = "import sys, vitrail.models.catalog; assert not {'torch', 'numpy', 'PIL'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
