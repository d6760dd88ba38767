"""The model card: a model folder's README.md in the hub's format, generated from its config.json.

Local paths are reduced to the file name.
"""

import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from vitrail.utils.text import printable

_HUB_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
}
# The hub's identifiers; any other licence is "other" with a license_name.
_HUB_LICENCES = (
    *("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "mpl-2.0", "unlicense", "zlib", "unknown"),
    *("gpl-2.0", "gpl-3.0", "lgpl-2.1", "lgpl-3.0", "agpl-3.0", "openrail", "creativeml-openrail-m", "odbl", "pddl"),
    *("cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nd-4.0"),
    *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
)
_PUBLIC = re.compile(r"^(hf:|https?://)|\((hf:|https?://)")
_PATH = re.compile(r"(/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\|file:)")


def model_card(
    record: Mapping[str, Any], params: int, *, in_timm: bool, timm_note: str | None = None, repo: str | None = None
) -> str:
    """The text of README.md, from the template `model_card.md`.

    record: the content of config.json. params: number of parameters. in_timm: whether timm can build the model.
    timm_note: why its logits differ from timm's, if they do. repo: "org/name", if it is on the hub.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"text": _escape, "code": _code}
    notes = record["vitrail"]["notes"]
    figures, data = _figures(notes), _data(notes)
    return environment.from_string(Path(__file__).with_suffix(".md").read_text(encoding="utf-8")).render(
        record=record,
        metadata=_metadata(record, in_timm, figures, data),
        params=params,
        figures=figures,
        data=data,
        source=_source(notes),
        licence=notes.get("licence"),
        in_timm=in_timm,
        timm_note=timm_note,
        repo=repo,
    )


def without_paths(value: Any) -> Any:
    """Copy of a JSON value in which every local path is reduced to its file name."""
    if isinstance(value, Mapping):
        return {key: without_paths(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(part) for part in value]
    return _file_name(value) if isinstance(value, str) and _PATH.match(value) else value


def _file_name(path: str) -> str:
    """The last part of a POSIX or Windows path."""
    return PureWindowsPath(path).name or "files"


def _figures(notes: Mapping[str, Any]) -> dict[str, Any] | None:
    """The measured metrics and their split; None if there are none."""
    figures = notes.get("figures")
    if not isinstance(figures, Mapping) or not isinstance(figures.get("split"), str):
        return None
    return dict(figures) if isinstance(figures.get("top1"), int | float) else None


def _data(notes: Mapping[str, Any]) -> str | None:
    data = notes.get("data")
    return printable(_file_name(data), 100) if isinstance(data, str) and data else None


def _source(notes: Mapping[str, Any]) -> str | None:
    """The origin of the weights, without local paths, credentials and URL parameters."""
    source = notes.get("source")
    if not isinstance(source, str) or not source:
        return None
    if not _PUBLIC.search(source):
        return f"a local file or folder, {printable(_file_name(source))}"
    return printable(re.sub(r"//[^/@\s]*@|[?#][^\s)]*", lambda found: "//" if found[0][0] == "/" else "", source), 300)


def _metadata(record: Mapping[str, Any], in_timm: bool, figures: Mapping[str, Any] | None, data: str | None) -> str:
    """The metadata, as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    ours = record["vitrail"]
    task = "image-classification" if record["num_classes"] else "image-feature-extraction"
    tags = [task, *(["timm"] if in_timm else []), "vitrail"]
    fields: dict[str, Any] = {**_licence_fields(ours["notes"]), "tags": tags, "pipeline_tag": task}
    fields["library_name"] = "timm" if in_timm else "vitrail"
    if in_timm:
        tags.append("transformers")
    if data in _HUB_DATASETS:
        fields["datasets"] = [_HUB_DATASETS[data]]
    origin = re.search(r"hf:([\w.-]+/[\w.-]+)", str(ours["notes"].get("source")))
    if origin:
        fields["base_model"] = origin[1]
    if figures:
        name = data or "unnamed"
        fields |= {"model_name": printable(ours["architecture"]), "metrics": ["accuracy"]}
        fields["eval_results"] = [
            EvalResult(
                task_type=task,
                dataset_type=_HUB_DATASETS.get(name, re.sub(r"[^\w.-]+", "-", name)),
                dataset_name=name,
                dataset_split=printable(figures["split"]),
                metric_type="accuracy",
                metric_name=label,
                metric_value=round(figures[key] / 100, 6),  # a fraction on the hub
            )
            for key, label in (("top1", "top-1"), ("top5", "top-5"))
            if isinstance(figures.get(key), int | float)
        ]
    return ModelCardData(**fields).to_yaml()


def _licence_fields(notes: Mapping[str, Any]) -> dict[str, str]:
    """Empty for a model trained from scratch, whose author chooses the licence."""
    licence = notes.get("licence")
    if not isinstance(licence, str) or not licence:
        return {"license": "other"} if notes.get("source") else {}
    if licence.lower() in _HUB_LICENCES:
        return {"license": licence.lower()}
    return {"license": "other", "license_name": printable(licence, 60)}


def _escape(text: str) -> str:
    """Untrusted text, escaped for Markdown and HTML."""
    return re.sub(r"([\\`*{}\[\]<>#|!~&$]|\b_|_\b)", r"\\\1", printable(text, 300))


def _code(value: object) -> str:
    """Untrusted text for use between backticks."""
    return printable(str(value), 300).replace("`", "'")
