"""The model card: a model folder's README.md in the hub's format, generated from its config.json.

Local paths are reduced to the file name.
"""

import re
from collections.abc import Mapping
from pathlib import PureWindowsPath
from typing import Any

from vitrail.utils.text import printable

FOLDER = "FOLDER"  # placeholder for the path in example code
_MAX_CLASSES = 100  # listed in the card
_FAMILIES = {"vit": "Vision Transformer", "swin": "Swin Transformer", "resnet": "ResNet", "convnext": "ConvNeXt"}
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
    """The text of README.md.

    record: the content of config.json. params: number of parameters. in_timm: whether timm can build the model.
    timm_note: why its logits differ from timm's, if they do. repo: "org/name", if it is on the hub.
    """
    ours = record["vitrail"]
    figures, data = _figures(ours["notes"]), _data(ours["notes"])
    parts = [
        f"---\n{_front_matter(record, in_timm, figures, data)}\n---",
        f"# {_escape(ours['architecture'])}" + (f" on {_escape(data)}" if data else ""),
        _summary(record, params, data),
        "## Classes",
        _classes(record["label_names"]),
        "## Preprocessing",
        _preprocessing(ours["preprocess"]),
        "## Metrics",
        _metrics(figures, data),
        "## How to load it",
        _how_to_load(record, in_timm, repo),
        *([f"Logits differ from timm's: {timm_note}."] if timm_note else []),
        "## Licence and origin",
        _licence(ours["notes"]),
    ]
    return "\n\n".join(parts) + "\n"


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


def _front_matter(record: Mapping[str, Any], in_timm: bool, figures: Mapping[str, Any] | None, data: str | None) -> str:
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


def _summary(record: Mapping[str, Any], params: int, data: str | None) -> str:
    ours, prepared = record["vitrail"], record["vitrail"]["preprocess"]
    height, width = prepared["size"]
    kind, channels = _FAMILIES[ours["family"]], {1: "grey", 3: "colour"}.get(prepared["channels"])
    what = f"an image classifier of {record['num_classes']:,} classes" if record["num_classes"] else "image features"
    images = f"{channels} images" if channels else f"images of {prepared['channels']} channels"
    trained = f", trained on {_escape(data)}" if data else ""
    return (
        f"A {kind} (`{_code(ours['architecture'])}`, {params:,} parameters): {what} for {images} of {height}x{width} "
        f"pixels{trained}. Saved by vitrail {ours['version']}; class names and preprocessing are in `config.json`."
    )


def _classes(names: list[str]) -> str:
    if not names:
        return "None: the model has no head and returns features."
    more = (
        f"\n\nand {len(names) - _MAX_CLASSES:,} more, in `config.json` under `label_names`."
        if len(names) > _MAX_CLASSES
        else ""
    )
    return ", ".join(f"{_escape(name)} ({index})" for index, name in enumerate(names[:_MAX_CLASSES])) + more


def _preprocessing(prepared: Mapping[str, Any]) -> str:
    height, width = prepared["size"]
    crop = {
        "center": "the shorter side is resized, then a center crop",
        "squash": "the image is resized without keeping its aspect ratio",
        "border": "the longer side is resized, then padded with the mean colour",
    }[prepared["crop_mode"]]
    rows = {
        "size": f"{height}x{width} (height x width), {prepared['channels']} channel(s)",
        "fit": f"`{prepared['crop_mode']}`: {crop}",
        "crop fraction": prepared["crop_pct"],
        "interpolation": prepared["interpolation"],
        "mean": ", ".join(f"{value:g}" for value in prepared["mean"]),
        "standard deviation": ", ".join(f"{value:g}" for value in prepared["std"]),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"| | |\n|---|---|\n{table}\n\nMean and deviation are on the scale 0 to 1."


def _metrics(figures: Mapping[str, Any] | None, data: str | None) -> str:
    if figures is None:
        return "None were measured when the model was saved."
    images = f", {figures['images']:,} images" if isinstance(figures.get("images"), int) else ""
    rows = [
        f"| {label} | {figures[key]:{form}} |"
        for key, label, form in (("top1", "top-1, %", ".2f"), ("top5", "top-5, %", ".2f"), ("loss", "loss", ".4f"))
        if isinstance(figures.get(key), int | float)
    ]
    where = f"On the `{_code(figures['split'])}` split of {_escape(data or 'the data')}{images}."
    if figures["split"] == "val":
        where += " The best epoch was selected on the same split, so these figures are slightly optimistic."
    return "\n".join([where, "", "| metric | value |", "|---|---|", *rows])


def _how_to_load(record: Mapping[str, Any], in_timm: bool, repo: str | None) -> str:
    """Example code."""
    path = {
        "vitrail": f"hf:{repo}" if repo else FOLDER,
        "timm": f"hf-hub:{repo}" if repo else f"local-dir:{FOLDER}",
        "transformers": repo or FOLDER,
    }
    classes, channels = record["num_classes"] > 0, record["vitrail"]["preprocess"]["channels"]
    call = 'print(classifier.predict("photo.jpg")[0])' if classes else 'print(classifier.embed("photo.jpg").shape)'
    blocks = [f'import vitrail\n\nclassifier = vitrail.load("{path["vitrail"]}")\n{call}']
    if in_timm and channels in (1, 3):
        mode = "RGB" if channels == 3 else "L"
        blocks.append(_timm_code(path["timm"], mode, classes))
        if classes:
            blocks.append(_transformers_code(path["transformers"], mode))
    intro = "" if repo else f"`{FOLDER}` is the folder of this file.\n\n"
    named = zip(("vitrail", "timm", "transformers"), blocks, strict=False)
    return intro + "\n\n".join(f"With {name}:\n\n```python\n{code}\n```" for name, code in named)


def _timm_code(where: str, mode: str, classes: bool) -> str:
    answer = (
        'scores = out.softmax(dim=1)[0]\nprint(model.pretrained_cfg["label_names"][scores.argmax()], scores.max())'
        if classes
        else "print(out.shape)"
    )
    return f"""import timm
import torch
from PIL import Image

model = timm.create_model("{where}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config({{}}, model=model))
with torch.inference_mode():
    out = model(transform(Image.open("photo.jpg").convert("{mode}"))[None])
{answer}"""


def _transformers_code(where: str, mode: str) -> str:
    return f"""from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("{where}")
processor = AutoImageProcessor.from_pretrained("{where}")
logits = model(**processor(Image.open("photo.jpg").convert("{mode}"))).logits
print(model.config.id2label[int(logits.argmax())])"""


def _licence(notes: Mapping[str, Any]) -> str:
    source, licence = _source(notes), notes.get("licence")
    if source is None:
        return "No pretrained weights are recorded as its origin, and no licence is stated."
    terms = f"licence is `{_code(str(licence))}`" if licence else "licence is not stated"
    return f"The weights come from {_escape(source)}, whose {terms}. Weights fine-tuned from them inherit it."


def _escape(text: str) -> str:
    """Untrusted text, escaped for Markdown and HTML."""
    return re.sub(r"([\\`*{}\[\]<>#|!~&$]|\b_|_\b)", r"\\\1", printable(text, 300))


def _code(text: str) -> str:
    """Untrusted text for use between backticks."""
    return printable(text, 300).replace("`", "'")
