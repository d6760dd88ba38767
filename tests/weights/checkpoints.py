"""Small checkpoints of every layout, made by the implementation that publishes it, with random weights."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm.models as timm_models
import torch
import torchvision.models as tv
from timm.models import convnext as timm_convnext
from timm.models import deit as timm_deit
from timm.models import swin_transformer as timm_swin
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from vitrail.models.build import build_model
from vitrail.models.configs import ConvNeXtConfig, ModelConfig, ResNetConfig, SwinConfig, ViTConfig
from vitrail.models.vit import VisionTransformer

SIDE, CLASSES = 32, 5


@dataclass
class Case:
    """`content` is what the file holds; `reference` maps images to logits; `config` is of our model for it."""

    name: str
    layout: str
    content: dict[str, Any]
    reference: Callable[[Tensor], Tensor]
    config: ModelConfig
    build: Callable[[Any], nn.Module] = field(default=build_model)

    def model(self) -> nn.Module:
        return self.build(self.config).eval()


def shake(model: nn.Module) -> nn.Module:
    """Random numbers everywhere, so that no zero or one hides a tensor in the wrong place."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.normal_(std=0.3 if tensor.ndim < 2 else tensor[0].numel() ** -0.5)
    return model.eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy: the references go on changing."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def images() -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def worst(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _vit_config(**options: Any) -> ViTConfig:
    base = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": (SIDE, SIDE)}
    return ViTConfig(**{**base, "num_classes": CLASSES, **options})


def _timm_vit(kind: type[nn.Module] = timm_vit.VisionTransformer, **options: Any) -> nn.Module:
    base = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": SIDE, "num_classes": CLASSES}
    return shake(kind(**{**base, **options}))


SWIN = {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "patch_size": 4}


def _swin_config() -> SwinConfig:
    return SwinConfig(**SWIN, img_size=(SIDE, SIDE), num_classes=CLASSES)


def _timm_swin() -> nn.Module:
    return shake(timm_swin.SwinTransformer(**SWIN, img_size=SIDE, num_classes=CLASSES))


DINOV2 = {"init_values": 1e-5, "num_classes": 0}


def timm_cases() -> list[Case]:
    registers = {**DINOV2, "reg_tokens": 4, "no_embed_class": True}
    deit3 = {"no_embed_class": True, "init_values": 1e-6}
    vits = [
        ("vit", _timm_vit(), _vit_config()),
        ("vit, average pool", _timm_vit(global_pool="avg"), _vit_config(global_pool="avg", fc_norm=True)),
        ("deit", _timm_vit(timm_deit.VisionTransformerDistilled), _vit_config(dist_token=True)),
        ("deit3", _timm_vit(**deit3), _vit_config(**deit3)),
        ("dinov2", _timm_vit(**DINOV2), _vit_config(**DINOV2)),
        ("dinov2 with registers", _timm_vit(**registers), _vit_config(**registers)),
    ]
    cases = [Case(f"timm {name}", "timm ViT", state(m), m, config) for name, m, config in vits]
    swin = _timm_swin()
    cases.append(Case("timm swin", "timm Swin", state(swin), swin, _swin_config()))
    for kind, block in (("basic", timm_models.resnet.BasicBlock), ("bottleneck", timm_models.resnet.Bottleneck)):
        resnet = shake(timm_models.ResNet(block, [1, 1, 1, 1], num_classes=CLASSES))
        config = ResNetConfig(block=kind, layers=(1, 1, 1, 1), img_size=(SIDE, SIDE), num_classes=CLASSES)
        cases.append(Case(f"timm resnet, {kind}", "ResNet", state(resnet), resnet, config))
    convnext = shake(timm_convnext.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 32, 64), num_classes=CLASSES))
    cases.append(Case("timm convnext", "timm ConvNeXt", state(convnext), convnext, CONVNEXT))
    return cases


CONVNEXT = ConvNeXtConfig(depths=(1, 1, 1, 1), dims=(8, 16, 32, 64), img_size=(SIDE, SIDE), num_classes=CLASSES)


def torchvision_cases() -> list[Case]:
    vit = shake(
        tv.VisionTransformer(
            image_size=SIDE, patch_size=8, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=96, num_classes=CLASSES
        )
    )
    old = {k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v for k, v in state(vit).items()}
    swin = shake(
        tv.SwinTransformer(
            patch_size=[4, 4], embed_dim=12, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=CLASSES
        )
    )
    resnet = shake(tv.ResNet(tv.resnet.Bottleneck, [1, 1, 1, 1], num_classes=CLASSES))
    blocks = [tv.convnext.CNBlockConfig(a, b, 1) for a, b in ((8, 16), (16, 32), (32, 64), (64, None))]
    convnext = shake(tv.ConvNeXt(blocks, num_classes=CLASSES))
    resnet_config = ResNetConfig(layers=(1, 1, 1, 1), img_size=(SIDE, SIDE), num_classes=CLASSES)
    return [
        Case("torchvision vit", "torchvision ViT", state(vit), vit, _vit_config()),
        Case("torchvision vit of before 0.12", "torchvision ViT", old, vit, _vit_config()),
        Case("torchvision swin", "torchvision Swin", state(swin), swin, _swin_config()),
        Case("torchvision resnet", "ResNet", state(resnet), resnet, resnet_config),
        Case("torchvision convnext", "torchvision ConvNeXt", state(convnext), convnext, CONVNEXT),
    ]


def transformers_models() -> dict[str, nn.Module]:
    """As transformers builds them; the tests save them as it does."""
    import transformers as hf

    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": SIDE, "patch_size": 8}
    labels = {"id2label": {i: f"class {i}" for i in range(CLASSES)}}
    vit, dino = {**sizes, **labels, "intermediate_size": 96}, {**sizes, **labels}
    swin = hf.SwinConfig(**SWIN | {"depths": [2, 2], "num_heads": [2, 4]}, **labels, image_size=SIDE)
    models = {
        "vit": hf.ViTForImageClassification(hf.ViTConfig(**vit)),
        "vit, features": hf.ViTModel(hf.ViTConfig(**vit)),
        "deit with teacher": hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**vit)),
        "deit": hf.DeiTForImageClassification(hf.DeiTConfig(**vit)),
        "swin": hf.SwinForImageClassification(swin),
        "dinov2": hf.Dinov2Model(hf.Dinov2Config(**dino)),
        "dinov2 with registers": hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**dino)),
    }
    return {name: shake(model) for name, model in models.items()}


def transformers_cases() -> list[Case]:
    from vitrail.pretrained.local import read_architecture
    from vitrail.weights.read import read_file

    cases = []
    for name, model in transformers_models().items():
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            config = read_architecture(Path(folder)).config
            content = {k: v.clone() for k, v in read_file(Path(folder) / "model.safetensors").items()}
        assert config is not None
        features = "features" in name or "dinov2" in name
        layout = "DINOv2" if "dinov2" in name else "Swin" if "swin" in name else "ViT"
        cases.append(
            Case(
                f"transformers {name}",
                f"transformers {layout}",
                content,
                functools.partial(_transformers_output, model),
                type(config)(**{**vars(config), "num_classes": 0 if features else CLASSES}),
                VisionTransformer if name == "deit" else build_model,
            )
        )
    return cases


def _transformers_output(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out.last_hidden_state[:, 0] if "last_hidden_state" in out else out.logits


def google_case() -> Case:
    """augreg's names, as vit_jax writes them; timm reads the same file."""
    rng = np.random.default_rng(0)

    def table(*shape: int) -> Any:
        return rng.normal(size=shape, scale=0.3).astype(np.float32)

    content = {
        "embedding/kernel": table(8, 8, 3, 24),
        "embedding/bias": table(24),
        "cls": table(1, 1, 24),
        "Transformer/posembed_input/pos_embedding": table(1, 17, 24),
        "Transformer/encoder_norm/scale": table(24),
        "Transformer/encoder_norm/bias": table(24),
        "head/kernel": table(24, CLASSES),
        "head/bias": table(CLASSES),
    }
    for block in range(2):
        p = f"Transformer/encoderblock_{block}/"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            content |= {f"{p}{norm}/scale": table(24), f"{p}{norm}/bias": table(24)}
        for part in ("query", "key", "value"):
            content[f"{p}MultiHeadDotProductAttention_1/{part}/kernel"] = table(24, 3, 8)
            content[f"{p}MultiHeadDotProductAttention_1/{part}/bias"] = table(3, 8)
        content[f"{p}MultiHeadDotProductAttention_1/out/kernel"] = table(3, 8, 24)
        content[f"{p}MultiHeadDotProductAttention_1/out/bias"] = table(24)
        for layer, (a, b) in enumerate(((24, 96), (96, 24))):
            content[f"{p}MlpBlock_3/Dense_{layer}/kernel"] = table(a, b)
            content[f"{p}MlpBlock_3/Dense_{layer}/bias"] = table(b)
    model = _timm_vit()
    with TemporaryDirectory() as folder:
        np.savez(f"{folder}/w.npz", **content)
        model.load_pretrained(f"{folder}/w.npz")
    tensors = {name: torch.from_numpy(array) for name, array in content.items()}
    return Case("google npz", "Google ViT", tensors, model, _vit_config())


def authors_cases() -> list[Case]:
    """The authors' names; what they mean is what timm's own conversion makes of them."""
    cases = []
    deit = _timm_vit(timm_deit.VisionTransformerDistilled)
    cases.append(Case("authors' deit", "timm ViT", {"model": state(deit)}, deit, _vit_config(dist_token=True)))
    deit3 = _timm_vit(no_embed_class=True, init_values=1e-6)
    content = {k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for k, v in state(deit3).items()}
    config = _vit_config(no_embed_class=True, init_values=1e-6)
    cases.append(Case("authors' deit3", "authors' ViT", {"model": content}, deit3, config))

    registers = {**DINOV2, "reg_tokens": 4, "no_embed_class": True}
    for name, options in (("dinov2", DINOV2), ("dinov2 with registers", registers)):
        model = _timm_vit(**options)
        content = dict(state(model))
        content["mask_token"] = torch.randn(1, 24)
        if "reg_tokens" in options:
            content["register_tokens"] = content.pop("reg_token")
            content["pos_embed"] = torch.randn(1, 17, 24)
        model.load_state_dict(timm_vit.checkpoint_filter_fn(dict(content), model))
        cases.append(Case(f"authors' {name}", "authors' ViT", content, model, _vit_config(**options)))

    swin = _timm_swin()
    content = {}
    for key, value in state(swin).items():
        stage = key.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc.", "head.")
        content[stage] = value
    for block in ("layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1"):
        content[f"{block}.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    content["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    swin.load_state_dict(timm_swin.checkpoint_filter_fn(dict(content), swin))
    cases.append(Case("authors' swin", "authors' Swin", {"model": content}, swin, _swin_config()))

    convnext = shake(timm_convnext.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 32, 64), num_classes=CLASSES))
    content = {_authors_convnext(key): value for key, value in state(convnext).items()}
    convnext.load_state_dict(timm_convnext.checkpoint_filter_fn(dict(content), convnext))
    cases.append(Case("authors' convnext", "authors' ConvNeXt", {"model": content}, convnext, CONVNEXT))
    return cases


def _authors_convnext(key: str) -> str:
    import re

    key = re.sub(r"^stem\.", "downsample_layers.0.", key)
    key = re.sub(r"^stages\.(\d+)\.downsample", r"downsample_layers.\1", key)
    key = key.replace(".blocks.", ".").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
    return key.replace("head.norm", "norm").replace("head.fc", "head")


@functools.cache
def all_cases() -> dict[str, Case]:
    """Made once; nobody changes them."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = [*timm_cases(), *torchvision_cases(), *authors_cases(), google_case(), *transformers_cases()]
    return {case.name: case for case in cases}


NAMES = [
    *(f"timm {x}" for x in ("vit", "vit, average pool", "deit", "deit3", "dinov2", "dinov2 with registers", "swin")),
    *("timm resnet, basic", "timm resnet, bottleneck", "timm convnext"),
    *(f"torchvision {x}" for x in ("vit", "vit of before 0.12", "swin", "resnet", "convnext")),
    *(f"authors' {x}" for x in ("deit", "deit3", "dinov2", "dinov2 with registers", "swin", "convnext")),
    "google npz",
    *(f"transformers {x}" for x in ("vit", "vit, features", "deit with teacher", "deit", "swin")),
    *(f"transformers {x}" for x in ("dinov2", "dinov2 with registers")),
]
