"""Loading of weights from a source named by a string.

Tried in this order: a tag of the model's published weights ("default" is the first); hf:org/repo[@revision];
timm:name[.tag]; torchvision:name[.WEIGHTS]; an https URL with #sha256=...; a file or a folder.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from torch import nn

from vitrail.errors import WeightsError, did_you_mean
from vitrail.models.configs import ViTConfig
from vitrail.pretrained.foreign_configs import Architecture, check, from_record
from vitrail.pretrained.hub import hub_unreachable, hub_weights, is_cached
from vitrail.pretrained.local import CONFIG, SUFFIXES, USUAL, find_weights, licence_of, read_architecture, read_tensors
from vitrail.utils.download import cache_dir, fetch, unreachable
from vitrail.utils.files import user_path
from vitrail.utils.text import printable
from vitrail.weights.formats.detect import convert_names
from vitrail.weights.heads import num_classes_of
from vitrail.weights.labels import label_names
from vitrail.weights.load import load_weights
from vitrail.weights.published import PUBLISHED
from vitrail.weights.record import WeightsRecord
from vitrail.weights.report import Report
from vitrail.weights.tensors import Tensors

_TORCHVISION = {  # torchvision's name -> ours
    "vit_b_16": ("vit_base_patch16_224", "vit_base_patch16_384"),
    "vit_b_32": ("vit_base_patch32_224",),
    "vit_l_16": ("vit_large_patch16_224",),
    "vit_l_32": ("vit_large_patch32_224",),
    "vit_h_14": ("vit_huge_patch14_224",),
    "swin_t": ("swin_tiny_patch4_window7_224",),
    "swin_s": ("swin_small_patch4_window7_224",),
    "swin_b": ("swin_base_patch4_window7_224",),
}
_UNKNOWN = Architecture()
_MAX_BYTES = 8 << 30  # of a weights file; the largest of the catalog has 2.5 GB


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Weights under our names, with their metadata.

    source: for messages, with the commit if there is one. layout: the checkpoint format. architecture: config,
    preprocessing and class names, as far as known.
    """

    tensors: Tensors
    layout: str
    source: str
    architecture: Architecture = _UNKNOWN
    licence: str | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes of the file's head; 0 if there is none."""
        return num_classes_of(self.tensors)

    def fit(
        self,
        model: nn.Module,
        *,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Report:
        """Load into `model`; see `vitrail.weights.load.load_weights`."""
        config = self.architecture.config
        grid = None
        if isinstance(config, ViTConfig):
            grid = (config.img_size[0] // config.patch_size, config.img_size[1] // config.patch_size)
        return load_weights(
            model,
            self.tensors,
            num_classes=num_classes,
            class_names=class_names,
            file_class_names=self.architecture.class_names,
            grid=grid,
            source=self.source,
            layout=self.layout,
        )


def load_source(source: str | Path, model: str | None = None) -> Loaded:
    """Find, download if necessary, and read weights.

    Args:
        source: see above.
        model: the model's name in the catalog; needed for tags.

    Raises:
        WeightsError: no such source, a failed download, or a file that is damaged or not trusted.
        ModelError: its config is invalid or not supported.
    """
    path = user_path(source)
    if isinstance(source, Path):
        return _local(path)
    if record := _by_tag(source, model):
        return _published(record)
    kind, _, rest = source.partition(":")
    match kind:
        case "hf" | "hf-hub":
            return _hub(rest)
        case "timm":
            name, _, tag = rest.partition(".")
            record = _by_tag(tag or "default", name)
            return _published(record) if record else _hub(f"timm/{rest}")
        case "torchvision":
            return _published(_by_torchvision_name(rest))
        case "http" | "https":
            return _url(source)
    if path.exists() or "/" in source or "\\" in source or source.endswith((*SUFFIXES, ".index.json")):
        return _local(path)
    raise WeightsError(_unknown(source, model))


def at_hand(model: str) -> bool:
    """Whether the default published weights of the catalog's model are on this machine, so that nothing is downloaded.

    False for a model without published weights.
    """
    record = _by_tag("default", model)
    if record is None:
        return False
    if record.source.startswith("hf:"):
        return is_cached(record.source.removeprefix("hf:"))
    return _cached_url(record.source, record.sha256 or "").is_file()


def unobtainable(model: str, may_download: bool) -> str | None:
    """Why the default published weights of the catalog's model cannot be had now; None if they can.

    They can if they are on this machine, or, with may_download, if their server can be reached within seconds.
    """
    record = _by_tag("default", model)
    if record is None:
        return "there are none"
    if at_hand(model):
        return None
    if not may_download:
        return "they are not on this machine"
    reason = hub_unreachable() if record.source.startswith("hf:") else unreachable(record.source)
    return reason and f"they are not on this machine, and their server cannot be reached ({reason})"


def is_catalog_source(source: str) -> bool:
    """Whether a source such as timm:resnet50.a1_in1k or torchvision:vit_b_16 is a model of the catalog."""
    kind, _, name = source.partition(":")
    model = name.partition(".")[0]
    return model in PUBLISHED or (kind == "torchvision" and model in _TORCHVISION)


def _unknown(text: str, model: str | None) -> str:
    tags = [record.tag for record in PUBLISHED.get(model or "", ())]
    if text == "default" or (model and not tags):
        return f"no published weights for {model or 'an unnamed model'}: give a file, a folder or hf:org/repo"
    known = f"{model} has the tags {', '.join(tags)}" if tags else "give a file, a folder, hf:org/repo or a URL"
    return f"unknown weights {printable(text)!r}{did_you_mean(text, tags or PUBLISHED)}; {known}"


def _by_tag(tag: str, model: str | None) -> WeightsRecord | None:
    records = PUBLISHED.get(model or "", ())
    if tag == "default":
        return records[0] if records else None
    return next((record for record in records if tag in (record.tag, record.name)), None)


def _by_torchvision_name(name: str) -> WeightsRecord:
    """By torchvision's "model.WEIGHTS"; without weights the newest trained on ImageNet-1k."""
    model, _, weights = name.partition(".")
    models = _TORCHVISION.get(model, (model,))
    records = {r.tag: r for m in models for r in PUBLISHED.get(m, ()) if r.tag.startswith("torchvision_")}
    if not records:
        known = [*_TORCHVISION, *(m for m in PUBLISHED if m.startswith(("resnet", "convnext")))]
        raise WeightsError(
            f"torchvision:{printable(name)} is not known{did_you_mean(model, known)}: choose from {', '.join(known)}"
        )
    tag = (
        weights.lower()
        .replace("imagenet1k", "torchvision")
        .replace("swag_e2e_v1", "swag")
        .replace("linear_v1", "linear")
    )
    if not weights or weights == "DEFAULT":
        tag = "torchvision_v2" if "torchvision_v2" in records else "torchvision_v1"
    if tag not in records:
        raise WeightsError(
            f"torchvision:{model} has no weights {printable(weights)!r}: choose from {', '.join(records)}"
        )
    return records[tag]


def _published(record: WeightsRecord) -> Loaded:
    """Published weights, with the preprocessing and licence of their record."""
    if record.source.startswith("hf:"):
        found = _hub(record.source.removeprefix("hf:"), record.sha256)
    else:
        found = _url(f"{record.source}#sha256={record.sha256}")
    known = from_record(record)
    in_file = found.architecture
    architecture = replace(
        known,
        config=in_file.config or known.config,
        class_names=in_file.class_names or label_names(record.labels),
    )
    source = f"{record.name} ({found.source})"
    return replace(found, source=source, architecture=architecture, licence=record.licence)


def _hub(name: str, sha256: str | None = None) -> Loaded:
    path, commit = hub_weights(name, sha256)
    repo = name.partition("@")[0]
    return _read(path, f"hf:{repo}@{commit[:12]}")


def _url(text: str) -> Loaded:
    """URL#sha256=..., with the checksum or the first of its digits, of which `fetch` needs 16 or more."""
    url, _, fragment = text.partition("#")
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{1,64})", fragment)
    if not match:
        raise WeightsError(f"{printable(text)} needs a checksum: append #sha256=... (from sha256sum on a trusted copy)")
    digest = match[1].lower()
    return _convert(fetch(url, _cached_url(url, digest), sha256=digest, max_bytes=_MAX_BYTES), url)


def _cached_url(url: str, digest: str) -> Path:
    name = unquote(urlsplit(url).path).rpartition("/")[2]
    name = re.sub(r"[^\w.-]", "_", name).lstrip(".") or "weights"
    return cache_dir() / "weights" / digest / name


def _local(path: Path) -> Loaded:
    if path.is_dir():
        return _read(find_weights(path), str(path))
    if not path.exists():
        hint = "write it without model=" if str(path).startswith("model=") else "check the path"
        raise WeightsError(f"{path} does not exist: {hint}")
    if path.name in USUAL:
        return _read(path, str(path))
    return _convert(path, str(path))


def _read(path: Path, source: str) -> Loaded:
    """A weights file with config and card in its folder."""
    known, found = read_architecture(path.parent), _convert(path, source)
    if known.config is not None:
        check(known.config, found.tensors, str(path.parent / CONFIG))
    return replace(found, architecture=known, licence=licence_of(path.parent))


def _convert(path: Path, source: str) -> Loaded:
    """A weights file without config and card."""
    try:
        tensors, layout = convert_names(read_tensors(path))
    except WeightsError as error:
        raise WeightsError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    return Loaded(tensors=tensors, layout=layout.name, source=source)
