"""The model config, preprocessing and class names in a config.json of vitrail, timm or transformers.

Options that change the model's output and that our configs do not have are refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import Tensor

from vitrail.errors import ModelError
from vitrail.images.preprocess import Preprocess
from vitrail.models import config_io
from vitrail.models.build import build_on_meta
from vitrail.models.catalog import VARIANTS
from vitrail.models.configs import ConvNeXtConfig, ModelConfig, ResNetConfig, SwinConfig, ViTConfig
from vitrail.models.timm_compat import family_of
from vitrail.utils.text import one_line, printable
from vitrail.weights.record import WeightsRecord

Config = Mapping[str, Any]
_SMALL = 2**20  # elements: models below this size are built without a comparison with the file
# Options of timm that do not change the output for an image of the model's size.
_IGNORED = {
    "always_partition",
    "drop_path_rate",
    "drop_rate",
    "dynamic_img_pad",
    "dynamic_img_size",
    "features_only",
    "pretrained",
    "scriptable",
    "strict_img_size",
    "weight_init",
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """None where the file does not specify it."""

    name: str | None = None  # in the catalog
    config: ModelConfig | None = None
    preprocess: Preprocess | None = None
    class_names: tuple[str, ...] | None = None


def read_config(config: Config, processor: Config | None, where: str) -> Architecture:
    """Parse config.json, and preprocessor_config.json if there is one.

    Raises:
        ModelError: an invalid value, or an option that is not supported.
    """
    try:
        if isinstance(config.get("vitrail"), Mapping):
            return _vitrail(config["vitrail"], where)
        if isinstance(config.get("architecture"), str):
            return _timm(config, where)
        if "model_type" in config:
            return _transformers(config, processor, where)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise ModelError(f"{where} is invalid: {one_line(error)}") from None
    return Architecture()


def check(config: ModelConfig, tensors: Mapping[str, Tensor], where: str) -> None:
    """Check that an untrusted config is valid and not much larger than its tensors, before a model is allocated.

    Raises:
        ModelError: it is invalid, or describes another model.
    """
    config_io.from_json(family_of(config), asdict(config), where)
    model = build_on_meta(replace(config, num_classes=0), len(tensors), where)
    size = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if size > 2 * sum(tensor.numel() for tensor in tensors.values()) + _SMALL:
        raise ModelError(f"{where} describes a different model from the weights next to it")


def from_record(record: WeightsRecord) -> Architecture:
    """From a record of published weights."""
    config = VARIANTS[record.model].config
    config = replace(config, num_classes=record.num_classes, img_size=record.preprocess.size)
    return Architecture(name=record.model, config=config, preprocess=record.preprocess)


def _vitrail(section: Config, where: str) -> Architecture:
    return Architecture(
        name=section["architecture"] if section.get("architecture") in VARIANTS else None,
        config=config_io.from_json(section.get("family"), section["config"], where),
        preprocess=Preprocess.from_dict(section["preprocess"]),
        class_names=_names(section.get("class_names")),
    )


def _timm(config: Config, where: str) -> Architecture:
    """A variant of the catalog, changed by `model_args`."""
    cfg: Config = config.get("pretrained_cfg") or config  # older files have no such section
    preprocess = Preprocess.from_timm(cfg) if "input_size" in cfg else None
    names = _names(config.get("label_names") or cfg.get("label_names"))
    name = config["architecture"]
    if name not in VARIANTS:
        return Architecture(preprocess=preprocess, class_names=names)
    args = {key: value for key, value in (config.get("model_args") or {}).items() if key not in _IGNORED}
    base = VARIANTS[name].config
    known = {field.name for field in fields(base)}
    if args.get("global_pool") == "avg" and "global_pool" not in known:
        del args["global_pool"]  # the only pooling of these architectures
    for key in args.keys() - known:
        raise ModelError(f"{where}: {name} with {printable(key)}={one_line(args[key], 40)} is not supported")
    args = {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}
    if isinstance(args.get("img_size"), int):
        args["img_size"] = (args["img_size"],) * 2
    if isinstance(base, ResNetConfig | ConvNeXtConfig) and preprocess is not None:
        args["img_size"] = preprocess.size  # timm's configs of these have no image size
    classes = config.get("num_classes", cfg.get("num_classes", base.num_classes))
    return Architecture(
        name=name,
        config=replace(base, **{"num_classes": classes, **args}),
        preprocess=preprocess,
        class_names=names if names and len(names) == classes else None,
    )


def _names(names: object) -> tuple[str, ...] | None:
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)


# ---- transformers


def _transformers(config: Config, processor: Config | None, where: str) -> Architecture:
    kind = config["model_type"]
    reader = _READERS.get(kind)
    if reader is None:
        raise ModelError(f"{where}: model_type {one_line(kind, 40)!r} is not supported, only {', '.join(_READERS)}")
    act = config.get("hidden_act", "gelu")
    if act != "gelu":
        raise ModelError(f"{where}: activation {one_line(act, 40)!r} is not supported, only 'gelu'")
    preprocess = None if processor is None else _processor(processor)
    return Architecture(config=reader(config, where), preprocess=preprocess, class_names=_labels(config))


def _common(config: Config, patch: int) -> dict[str, Any]:
    size, patch = config.get("image_size", 224), config.get("patch_size", patch)
    return {
        "img_size": (size, size) if isinstance(size, int) else tuple(size),
        "in_chans": config.get("num_channels", 3),
        "patch_size": patch if isinstance(patch, int) else patch[0],
        "qkv_bias": config.get("qkv_bias", True),
    }


def _vit(config: Config, where: str) -> ViTConfig:
    width = config.get("hidden_size", 768)
    return ViTConfig(
        **_common(config, 16),
        embed_dim=width,
        depth=config.get("num_hidden_layers", 12),
        num_heads=config.get("num_attention_heads", 12),
        mlp_ratio=config.get("intermediate_size", 3072) / width,
        norm_eps=config.get("layer_norm_eps", 1e-12),
        dist_token=config["model_type"] == "deit",
    )


def _dinov2(config: Config, where: str) -> ViTConfig:
    if config.get("use_swiglu_ffn"):
        raise ModelError(f"{where}: SwiGLU blocks (DINOv2 giant) are not supported")
    registers = config.get("num_register_tokens", 4) if config["model_type"] == "dinov2_with_registers" else 0
    return ViTConfig(
        **_common(config, 16 if registers else 14),
        embed_dim=config.get("hidden_size", 768),
        depth=config.get("num_hidden_layers", 12),
        num_heads=config.get("num_attention_heads", 12),
        mlp_ratio=float(config.get("mlp_ratio", 4)),
        norm_eps=config.get("layer_norm_eps", 1e-6),
        init_values=1e-5,
        reg_tokens=registers,
        no_embed_class=registers > 0,  # as in timm: the class token includes its position
        num_classes=0,
    )


def _swin(config: Config, where: str) -> SwinConfig:
    if config.get("use_absolute_embeddings"):
        raise ModelError(f"{where}: Swin with absolute position embeddings is not supported")
    return SwinConfig(
        **_common(config, 4),
        embed_dim=config.get("embed_dim", 96),
        depths=tuple(config.get("depths", (2, 2, 6, 2))),
        num_heads=tuple(config.get("num_heads", (3, 6, 12, 24))),
        window_size=config.get("window_size", 7),
        mlp_ratio=float(config.get("mlp_ratio", 4.0)),
        norm_eps=config.get("layer_norm_eps", 1e-5),
    )


_READERS: dict[str, Callable[[Config, str], ModelConfig]] = {
    "vit": _vit,
    "deit": _vit,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "swin": _swin,
}


def _labels(config: Config) -> tuple[str, ...] | None:
    """None for the placeholders LABEL_0, LABEL_1, ..."""
    table = config.get("id2label")
    if not isinstance(table, Mapping) or not table:
        return None
    names = _names([table.get(str(index), table.get(index)) for index in range(len(table))])
    return None if names is None or names[0] == "LABEL_0" else names


def _processor(config: Config) -> Preprocess | None:
    """The preprocessing of a transformers image processor; None if `Preprocess` cannot express it."""
    size = _sides(config.get("size"))
    crop = _sides(config.get("crop_size")) if config.get("do_center_crop") else None
    if not config.get("do_resize", True) or size is None:
        return None
    if abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        return None
    final = crop or size
    normalise = config.get("do_normalize", True)
    by_shortest = isinstance(config.get("size"), Mapping) and "shortest_edge" in config["size"]
    return Preprocess(
        size=final,
        mean=tuple(config["image_mean"]) if normalise else (0.0,) * 3,
        std=tuple(config["image_std"]) if normalise else (1.0,) * 3,
        interpolation={0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}[config.get("resample", 2)],
        crop_pct=final[0] / size[0],
        crop_mode="center" if by_shortest else "squash",
    )


def _sides(size: object) -> tuple[int, int] | None:
    match size:
        case int():
            return size, size
        case {"height": int(height), "width": int(width)}:
            return height, width
        case {"shortest_edge": int(side)}:
            return side, side
    return None
