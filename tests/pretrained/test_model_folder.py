"""The model folder: what timm makes of it, what comes back, and what is refused. Oracle: timm."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vitrail.classifier import load
from vitrail.errors import ModelError, RunError, WeightsError
from vitrail.images.preprocess import Preprocess
from vitrail.models.build import build_model
from vitrail.models.catalog import VARIANTS
from vitrail.models.config_io import ADDED_FIELDS
from vitrail.models.configs import ConvNeXtConfig, ModelConfig, ResNetConfig, SwinConfig, ViTConfig
from vitrail.pretrained.load import load_pretrained
from vitrail.pretrained.model_folder import Contents, name_of, read_model_folder, to_json, write_model_folder

VIT = ViTConfig(img_size=(32, 32), patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=7)
SWIN = SwinConfig(img_size=(64, 64), embed_dim=12, depths=(1, 2, 1), num_heads=(1, 2, 4), window_size=4, num_classes=7)
CONVNEXT = ConvNeXtConfig(img_size=(64, 64), depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=7)

CONFIGS: dict[str, ModelConfig] = {
    "vit": VIT,
    "vit, ImageNet's classes": replace(VIT, num_classes=1000),
    "vit, no head": replace(VIT, num_classes=0),
    "vit, 1 channel, not square": replace(VIT, in_chans=1, img_size=(24, 48)),
    "vit, 5 channels": replace(VIT, in_chans=5),
    "vit, no qkv bias, other MLP": replace(VIT, qkv_bias=False, mlp_ratio=2.5),
    "vit, average pooling": replace(VIT, global_pool="avg", fc_norm=True),
    "vit, average pooling, norm before it": replace(VIT, global_pool="avg"),
    "vit, no class token": replace(VIT, global_pool="avg", class_token=False),
    "distilled": replace(VIT, dist_token=True),
    "distilled, 1 channel, not square": replace(VIT, dist_token=True, in_chans=1, img_size=(24, 48)),
    "registers": replace(VIT, reg_tokens=4, no_embed_class=True),
    "deit3": replace(VIT, no_embed_class=True, init_values=1e-6),
    "dinov2": replace(VIT, init_values=1e-5, patch_size=7, img_size=(35, 28)),
    "swin": SWIN,
    "swin, 5 channels, not square": replace(SWIN, in_chans=5, img_size=(64, 128)),
    "swin, smaller than its windows": replace(SWIN, window_size=8, img_size=(32, 64)),
    "resnet, basic": ResNetConfig(img_size=(64, 64), block="basic", layers=(1, 1, 1, 1), num_classes=7),
    "resnet, bottleneck, 1 channel": ResNetConfig(img_size=(64, 48), layers=(1, 1, 1, 1), num_classes=7, in_chans=1),
    "convnext": CONVNEXT,
    "convnext, 5 channels, not square": replace(CONVNEXT, in_chans=5, img_size=(64, 96)),
}


def stir(model: nn.Module) -> nn.Module:
    """No tensor at its initial value, so that one that is initialised anew cannot be equal by chance."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.1, 0.3) if tensor.ndim < 2 else nn.init.normal_(tensor, std=0.1)
    return model


def make(config: ModelConfig, size: tuple[int, int] | None = None, name: str | None = None) -> Contents:
    channels, classes = config.in_chans, config.num_classes
    return Contents(
        model=stir(build_model(config)).eval(),
        preprocess=Preprocess(
            size=size or config.img_size, mean=(0.4,) * channels, std=(0.3,) * channels, channels=channels
        ),
        class_names=tuple(f"class {k}" for k in range(classes)),
        architecture=name or name_of(config),
        notes={},
    )


@torch.inference_mode()
def assert_equal_logits(one: nn.Module, other: nn.Module, config: ModelConfig, size: tuple[int, int]) -> None:
    x = torch.randn(2, config.in_chans, *size)
    ours, theirs = one(x), other(x)
    assert ours.abs().max() > 0
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_timm_loads_the_folder_to_the_same_logits(
    config: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    contents = make(config)
    write_model_folder(tmp_path / "m", contents)
    with caplog.at_level(logging.INFO):
        guest = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    assert "Missing keys" not in caplog.text
    assert "Unexpected keys" not in caplog.text
    assert "Converted input conv" not in caplog.text
    ours, theirs = contents.model.state_dict(), guest.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert_equal_logits(contents.model, guest, config, config.img_size)
    assert guest.pretrained_cfg["input_size"] == (config.in_chans, *config.img_size)
    assert (
        guest.pretrained_cfg["mean"] == (0.4,) * config.in_chans
        or guest.pretrained_cfg["mean"] == [0.4] * config.in_chans
    )
    assert list(guest.pretrained_cfg["label_names"]) == list(contents.class_names)


@pytest.mark.parametrize("config", [VIT, CONFIGS["distilled"], CONFIGS["registers"], SWIN])
def test_timm_runs_at_the_preprocessing_size_where_that_is_another(config: ModelConfig, tmp_path: Path) -> None:
    contents = make(config, size=(64, 128))
    write_model_folder(tmp_path / "m", contents)
    guest = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    assert_equal_logits(contents.model, guest, config, (64, 128))


def test_timm_fits_the_folder_to_other_classes_and_channels_by_itself(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "m", make(VIT))
    guest = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True, num_classes=3, in_chans=1)
    assert guest(torch.zeros(1, 1, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(
    "config",
    [replace(VIT, stem="conv"), replace(VIT, dist_token=True, dist_head=False), replace(VIT, norm_eps=1e-5)],
    ids=["convolutional stem", "distillation token without a head", "other epsilon"],
)
def test_what_timm_has_not_is_refused_by_timm_as_unknown(config: ModelConfig, tmp_path: Path) -> None:
    for name in ("ours", "vit_tiny_patch16_224"):
        write_model_folder(tmp_path / name, make(config, name=name))
        with pytest.raises(RuntimeError, match="Unknown model"):
            timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True)
        assert read_model_folder(tmp_path / name).architecture == name


@pytest.mark.parametrize(("built", "size"), [((56, 56), (56, 56)), ((64, 64), (64, 72)), ((62, 64), (62, 64))])
def test_a_swin_that_masks_padding_as_timm_does_not_is_refused_by_timm(
    built: tuple[int, int], size: tuple[int, int], tmp_path: Path
) -> None:
    config = replace(SWIN, img_size=built)
    write_model_folder(tmp_path / "m", make(config, size, name="swin_tiny_patch4_window7_224"))
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True)
    assert read_model_folder(tmp_path / "m").model.config == config


def test_a_name_that_timm_builds_otherwise_is_not_used(tmp_path: Path) -> None:
    """resnet50 with basic blocks: timm's resnet50 would have bottlenecks."""
    config = ResNetConfig(block="basic", layers=(1, 1, 1, 1), num_classes=3)
    contents = make(config, name="resnet50")
    write_model_folder(tmp_path / "m", contents)
    guest = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    assert_equal_logits(contents.model, guest, config, (64, 64))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_the_same_model_in_timm_or_unknown_to_it(name: str) -> None:
    config = VARIANTS[name].config
    with torch.device("meta"):
        model = build_model(config)
    record = to_json(
        Contents(
            model=model,
            preprocess=VARIANTS[name].preprocess.replace(size=config.img_size),
            class_names=tuple(str(k) for k in range(config.num_classes)),
            architecture=name,
            notes={},
        )
    )
    if not timm.is_model(record["architecture"]):
        assert getattr(config, "stem", "") == "conv" or getattr(config, "small_stem", False)
        return
    assert record["architecture"] == name or not timm.is_model(name)
    with torch.device("meta"):
        guest = timm.create_model(record["architecture"], num_classes=config.num_classes, **record["model_args"])
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in guest.state_dict().items()}
    cfg = timm.get_pretrained_cfg(record["architecture"])
    assert record["pretrained_cfg"]["first_conv"] == cfg.first_conv
    heads = record["pretrained_cfg"]["classifier"]
    assert (tuple(heads) if isinstance(heads, list) else heads) == cfg.classifier
    assert record["pretrained_cfg"]["fixed_input_size"] == cfg.fixed_input_size


@pytest.mark.parametrize(
    "config", [*CONFIGS.values(), replace(VIT, stem="conv"), replace(VIT, dist_token=True, dist_head=False)]
)
def test_what_is_written_comes_back(config: ModelConfig, tmp_path: Path) -> None:
    contents = replace(make(config), notes={"split": {"split_seed": 3}})
    write_model_folder(tmp_path / "m", contents)
    back = read_model_folder(tmp_path / "m")
    assert back.model.config == config
    assert type(back.model) is type(contents.model)
    assert (back.preprocess, back.class_names) == (contents.preprocess, contents.class_names)
    assert (back.architecture, back.notes) == (contents.architecture, contents.notes)
    assert not back.model.training
    assert_equal_logits(contents.model, back.model, config, config.img_size)
    assert all(p.requires_grad and p.is_leaf and not p.is_meta for p in back.model.parameters())
    assert not any(buffer.is_meta for buffer in back.model.buffers())


def test_loading_a_vit_neither_loads_the_compiler_nor_draws_random_numbers(tmp_path: Path) -> None:
    for number, config in enumerate((VIT, CONVNEXT, CONFIGS["resnet, basic"], CONFIGS["distilled"])):
        write_model_folder(tmp_path / str(number), make(config))
    code = (
        "import sys, torch; from pathlib import Path; from vitrail.pretrained.model_folder import read_model_folder\n"
        "state = torch.get_rng_state()\n"
        f"for folder in sorted(Path({str(tmp_path)!r}).iterdir()): read_model_folder(folder)\n"
        "assert torch.equal(state, torch.get_rng_state())\n"
        "assert not {'torch._dynamo', 'sympy', 'sklearn', 'timm', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_half_precision_weights_come_back_as_float32(tmp_path: Path) -> None:
    contents = make(VIT)
    write_model_folder(tmp_path / "m", contents)
    half = {name: tensor.half() for name, tensor in load_file(tmp_path / "m" / "model.safetensors").items()}
    save_file(half, tmp_path / "m" / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged or was replaced.*remove SHA256SUMS"):
        read_model_folder(tmp_path / "m")
    (tmp_path / "m" / "SHA256SUMS").unlink()
    with pytest.warns(UserWarning, match=f"{len(half)} cast from float16 to float32"):
        found = read_model_folder(tmp_path / "m")
    assert {tensor.dtype for tensor in found.model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.to(torch.int8), "int8, not float32"),
        (lambda x: x > 0, "bool, not float32"),
        (lambda x: x.to(torch.complex64), "complex64, not float32"),
        (lambda x: x.double() * 1e300, "NaN or infinity in head.weight"),
        (lambda x: torch.full_like(x, float("nan")), "NaN or infinity in head.weight"),
        (lambda x: x.index_fill(0, torch.tensor([0]), float("inf")), "NaN or infinity in head.weight"),
    ],
)
def test_weights_of_another_kind_or_not_finite_are_refused_by_every_reader(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], words: str
) -> None:
    write_model_folder(tmp_path / "m", make(VIT))
    weights = load_file(tmp_path / "m" / "model.safetensors")
    save_file({**weights, "head.weight": change(weights["head.weight"])}, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "SHA256SUMS").unlink()
    with pytest.raises(WeightsError, match=words):
        read_model_folder(tmp_path / "m")
    with pytest.raises(WeightsError, match=r"head\.weight"):
        load_pretrained(tmp_path / "m")


def test_loading_takes_time_in_proportion_to_the_classes(tmp_path: Path) -> None:
    """100,000 names: comparing each with all others would take minutes."""
    names = tuple(f"class {number}" for number in range(100_000))
    contents = make(replace(VIT, num_classes=len(names)))
    write_model_folder(tmp_path / "m", replace(contents, class_names=names))
    start = time.process_time()
    assert read_model_folder(tmp_path / "m").class_names == names
    assert load(tmp_path / "m").class_names == names
    assert time.process_time() - start < 10


def test_an_edited_config_is_told(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "m", make(VIT))
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text().replace('"crop_pct": 1.0', '"crop_pct": 0.9'))
    with pytest.warns(UserWarning, match="edited or damaged"):
        assert read_model_folder(tmp_path / "m").preprocess.crop_pct == 0.9


def test_a_head_that_was_replaced_is_written_with_its_own_number_of_classes(tmp_path: Path) -> None:
    contents = make(VIT)
    contents.model.reset_classifier(3)
    write_model_folder(tmp_path / "m", replace(contents, class_names=("a", "b", "c")))
    assert read_model_folder(tmp_path / "m").model.config.num_classes == 3


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (VARIANTS["deit3_small_patch16_384"].config, "deit3_small_patch16_384"),
        (replace(VARIANTS["resnet34"].config, num_classes=3, img_size=(96, 96)), "resnet34"),
        (replace(VARIANTS["swin_tiny_patch4_window7_224"].config, drop_path_rate=0.3), "swin_tiny_patch4_window7_224"),
        (VIT, "vit"),
    ],
)
def test_name_of_finds_the_variant_whatever_its_classes_size_and_rates(config: ModelConfig, name: str) -> None:
    assert name_of(config) == name


# --- writing


def test_saving_again_replaces_the_folder_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "m", make(VIT))
    (tmp_path / "m" / "README.md").write_text("of the old model")
    second = make(replace(VIT, num_classes=2))
    write_model_folder(tmp_path / "m", second)
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "README.md", "SHA256SUMS", "config.json", "model.safetensors",
    ]  # fmt: skip
    assert "of the old model" not in (tmp_path / "m" / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert read_model_folder(tmp_path / "m").model.config.num_classes == 2


def test_a_good_folder_stands_when_the_new_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model_folder(tmp_path / "m", make(VIT))
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}

    def full(*args: Any, **options: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitrail.pretrained.model_folder.save_file", full)
    with pytest.raises(RunError, match=r"/m: the disk is full"):
        write_model_folder(tmp_path / "m", make(replace(VIT, num_classes=2)))
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_folder_of_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"dear to someone")
    with pytest.raises(WeightsError, match=r"photos contains other files \(cat\.jpg\)"):
        write_model_folder(tmp_path / "photos", make(VIT))
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "real", make(VIT))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_model_folder(tmp_path / "link", make(replace(VIT, num_classes=2)))
    assert (tmp_path / "link").is_symlink()
    assert read_model_folder(tmp_path / "real").model.config.num_classes == 2


# --- what is refused


def spoil_weights(change: Any) -> Any:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return spoil


def spoil_config(*path: str, value: Any = ...) -> Any:
    """Set the value at a path of keys; without one, take the key away."""

    def spoil(folder: Path) -> None:
        record = json.loads((folder / "config.json").read_text())
        part = record
        for key in path[:-1]:
            part = part[key]
        if value is ...:
            del part[path[-1]]
        else:
            part[path[-1]] = value
        (folder / "config.json").write_text(json.dumps(record))

    return spoil


def spoil_bytes(name: str, content: bytes | None, keep: int = 0) -> Any:
    def spoil(folder: Path) -> None:
        old = (folder / name).read_bytes()
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(old[:keep] + content)

    return spoil


OURS = ("vitrail", "config")


@pytest.mark.parametrize("config", [replace(VIT, stem="conv"), CONFIGS["resnet, basic"]], ids=["vit", "resnet"])
def test_folders_of_before_a_field_was_added_load_as_they_were(config: ModelConfig, tmp_path: Path) -> None:
    contents = make(config)
    write_model_folder(tmp_path / "m", contents)
    for name in {field.name for field in fields(config)} & ADDED_FIELDS:
        spoil_config(*OURS, name)(tmp_path / "m")
    (tmp_path / "m" / "SHA256SUMS").unlink()
    loaded = read_model_folder(tmp_path / "m")
    assert loaded.model.config == config
    assert_equal_logits(contents.model, loaded.model, config, config.img_size)


FAULTS = {
    "no config": (spoil_bytes("config.json", None), "cannot read .*config.json: no such file"),
    "empty config": (spoil_bytes("config.json", b""), "config.json is not valid JSON"),
    "cut config": (spoil_bytes("config.json", b"", keep=200), "config.json is not valid JSON"),
    "binary config": (spoil_bytes("config.json", b"\xff\xfe\x00"), "config.json is not valid JSON"),
    "a list": (spoil_bytes("config.json", b"[1, 2]"), r"config\.json.*list"),
    "endless nesting": (spoil_bytes("config.json", b"[" * 100_000), "config.json is not valid JSON"),
    "not ours": (spoil_config("vitrail"), "no section 'vitrail'; it was not written by vitrail"),
    "newer format": (spoil_config("vitrail", "format", value=2), "format 2, not 1: update vitrail"),
    "unknown family": (spoil_config("vitrail", "family", value="cvt"), "family 'cvt'; known are vit, swin"),
    "family is a list": (spoil_config("vitrail", "family", value=[]), "family"),
    "unknown key": (spoil_config(*OURS, "embed_dims", value=3), r"unknown key 'embed_dims' .*'embed_dim'"),
    "no key": (spoil_config(*OURS, "depth"), "config has no 'depth'"),
    "a word for a number": (spoil_config(*OURS, "depth", value="two"), "config.depth cannot be 'two'"),
    "a truth for a number": (spoil_config(*OURS, "depth", value=True), "config.depth cannot be True"),
    "negative size": (spoil_config(*OURS, "img_size", value=[-1, 32]), "img_size"),
    "no heads": (spoil_config(*OURS, "num_heads", value=0), "config.json does not describe a valid model"),
    "heads that do not divide": (spoil_config(*OURS, "num_heads", value=5), "num_heads=5"),
    "no patches": (spoil_config(*OURS, "patch_size", value=0), "not describe a valid model|invalid ViTConfig"),
    "negative width": (spoil_config(*OURS, "embed_dim", value=-24), "not describe a valid model|invalid ViTConfig"),
    "endless depth": (spoil_config(*OURS, "depth", value=10**12), "config.json .* too many blocks"),
    "huge width": (spoil_config(*OURS, "embed_dim", value=3 * 10**7), "shape mismatch: .* and [0-9]+ more"),
    "drop path of 7": (spoil_config(*OURS, "drop_path_rate", value=7), "drop path rate .* 7"),
    "too few names": (spoil_config("vitrail", "class_names", value=["a"]), "1 class names for 7 classes"),
    "names are numbers": (spoil_config("vitrail", "class_names", value=[1] * 7), "no list of class_names"),
    "no preprocessing": (spoil_config("vitrail", "preprocess"), "no section 'preprocess'"),
    "size is a word": (spoil_config("vitrail", "preprocess", "size", value="ab"), "preprocessing"),
    "size is a number": (spoil_config("vitrail", "preprocess", "size", value=32), "preprocessing"),
    "mean of words": (spoil_config("vitrail", "preprocess", "mean", value=["a", "b", "c"]), "preprocessing"),
    "channels differ": (spoil_config(*OURS, "in_chans", value=1), "preprocesses 3 channels for a model with 1"),
    "notes are a list": (spoil_config("vitrail", "notes", value=[]), "no section 'notes'"),
    "no weights": (spoil_bytes("model.safetensors", None), "model.safetensors does not exist"),
    "empty weights": (spoil_bytes("model.safetensors", b""), "damaged or not a safetensors file"),
    "cut weights": (spoil_bytes("model.safetensors", b"", keep=3000), "damaged or not a safetensors file"),
    "a pickle": (spoil_bytes("model.safetensors", b"\x80\x04cos\nsystem\n."), "damaged or not a safetensors file"),
    "huge header": (spoil_bytes("model.safetensors", b"\xff" * 64), "damaged or not a safetensors file"),
    "missing tensor": (
        spoil_weights(lambda t: t.pop("norm.bias")),
        "does not match its config.json: missing: norm.bias$",
    ),
    "extra tensor": (spoil_weights(lambda t: t.update(x=torch.zeros(1))), "unexpected: x$"),
    "other shape": (
        spoil_weights(lambda t: t.update({"head.bias": torch.zeros(3)})),
        r"shape mismatch: head\.bias 3 for 7$",
    ),
    "all three": (
        spoil_weights(lambda t: t.update(x=t.pop("norm.bias"), y=torch.zeros(1), cls_token=torch.zeros(2))),
        r"missing: norm\.bias; unexpected: x, y; shape mismatch: cls_token 2 for 1x1x24$",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_spoilt_folder_is_refused_in_one_clear_line(spoil: Any, message: str, tmp_path: Path) -> None:
    write_model_folder(tmp_path / "m", make(VIT))
    spoil(tmp_path / "m")
    with pytest.raises((WeightsError, ModelError), match=message) as caught:
        read_model_folder(tmp_path / "m")
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500


@pytest.mark.slow  # transformers takes its time to import
@pytest.mark.parametrize("name", ["vit", "distilled", "swin", "resnet, basic", "convnext"])
def test_transformers_loads_the_folder_to_the_same_logits(name: str, tmp_path: Path) -> None:
    from transformers import TimmWrapperForImageClassification

    config = CONFIGS[name]
    contents = make(config)
    write_model_folder(tmp_path / "m", contents)
    guest = TimmWrapperForImageClassification.from_pretrained(tmp_path / "m").eval()
    x = torch.randn(2, config.in_chans, *config.img_size)
    with torch.inference_mode():
        ours, theirs = contents.model(x), guest(pixel_values=x).logits
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
    assert guest.config.id2label[6] == "class 6"
