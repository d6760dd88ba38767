"""Explain: which pixels of an image decided, as an `Explanation` in the coordinates of the original image.

Shapes: B batch, C channels, H W height and width of the model's input, h w of a map, K classes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitrail.classifier import Classifier, load_torch
from vitrail.errors import ConfigError, DataError, ModelError
from vitrail.explanation.faithfulness import Faithfulness, choose_baseline, measure
from vitrail.explanation.methods.attention import attention_heads
from vitrail.explanation.methods.gradients import plain
from vitrail.explanation.methods.method import Method, Request
from vitrail.explanation.methods.table import METHODS, choose_method
from vitrail.explanation.rendering import reduced
from vitrail.explanation.result import Explanation, Unreadable
from vitrail.explanation.targets import Target, parse_target
from vitrail.images.convert import Pixels
from vitrail.images.decode import BadImage, decode
from vitrail.images.limits import computing
from vitrail.images.reader import Input, Inputs, NoImages, crop, expand, path_of
from vitrail.inference.engine import default_workers
from vitrail.inference.runtime import default_batch_size
from vitrail.prediction import Score
from vitrail.pretrained.external import open_external_model
from vitrail.utils.eval_view import eval_view

_MAX_BATCH = 16  # a backward pass keeps the attention weights of every block
_TOP = 5


def explain(
    clf: Classifier | str | os.PathLike[str],
    inputs: Inputs,
    method: str | None = None,
    target: str | int | None = None,
    *,
    score: bool = False,
    baseline: str = "mean",
    block: int | None = None,
    head: int | str | None = None,
    batch_size: int | None = None,
) -> Any:
    """Which pixels decided: an `Explanation` of one image, or a list of them, in order, for several images.

    Args:
        clf: a Classifier, or what `vitrail.load` takes, or timm:NAME or torchvision:NAME.
        inputs: as in `Classifier.predict`. A folder, a pattern and an array of 4 dimensions are several images.
        method: a name in `METHODS`; by default "relevance" for ViT, DeiT and Swin, "gradcam" for others.
        target: what to explain: a label, an index, or a pair "cat:dog" (why cat and not dog); by default the predicted
            class of each image.
        score: measure the faithfulness of each map, by 46 more forward passes.
        baseline: what the score puts in place of pixels: "mean" (the mean colour) or "blur".
        block, head: for methods that draw a single block or head; negative numbers count from the end. head may be
            "all": the picture is then a grid of the maps of every head.
        batch_size: images that are explained together.

    Returns:
        An Explanation or a list; in a list, an image that could not be read is an `Unreadable`.

    Raises:
        DataError: the single image could not be read.
        ModelError: the model does not have this method, or has no classes.
        ConfigError: no such class, or an option that the method does not have.
    """
    found = list(
        explain_stream(
            clf,
            inputs,
            method,
            target,
            score=score,
            baseline=baseline,
            block=block,
            head=head,
            batch_size=batch_size,
        )
    )
    if not _is_single(inputs):
        return found
    if isinstance(found[0], Unreadable):
        raise DataError(f"{found[0].path or 'the image'} {found[0].error}")
    return found[0]


def _is_single(inputs: Inputs) -> bool:
    if isinstance(inputs, str | os.PathLike):
        return list(itertools.islice(expand(inputs), 2)) == [inputs]
    if isinstance(inputs, np.ndarray):
        return inputs.ndim != 4
    return isinstance(inputs, bytes | Image.Image)


def explain_stream(
    clf: Classifier | str | os.PathLike[str],
    inputs: Inputs,
    method: str | None = None,
    target: str | int | None = None,
    *,
    score: bool = False,
    baseline: str = "mean",
    block: int | None = None,
    head: int | str | None = None,
    batch_size: int | None = None,
) -> Iterator[Explanation | Unreadable]:
    """`explain` as an iterator in the order of `inputs`. Options are checked at once, images are read as it goes on."""
    clf = clf if isinstance(clf, Classifier) else open_classifier(clf)
    chosen = choose_method(method, clf.model)
    if not clf.class_names and (chosen.class_specific or target is not None or score):
        without = ", ".join(each.name for each in METHODS.values() if not each.class_specific)
        raise ModelError(f"this model has no classes to explain: use a method that needs none ({without})")
    for option, value, allowed in (("block", block, chosen.selects_block), ("head", head, chosen.selects_head)):
        if value is not None and not allowed:
            raise ConfigError(f"the method {chosen.name} has no option {option}")
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
    # The score of one image is batches of its own: image by image is as fast, and each result is there at once.
    size = batch_size or (1 if score else min(_MAX_BATCH, default_batch_size(clf.preprocess, clf.device.type)))
    choose_baseline(baseline)
    if isinstance(head, str) and head != "all":
        raise ConfigError(f"head must be a number or 'all', not {head!r}")
    options = _Options(
        method=chosen,
        target=parse_target(target, clf.class_names),
        baseline=baseline if score else None,
        block=block,
        head=None if isinstance(head, str) else head,
        all_heads=head == "all",
    )
    return _stream(clf, inputs, options, size)


@dataclass(frozen=True)
class _Options:
    """baseline: of the faithfulness score; None without one."""

    method: Method
    target: Target
    baseline: str | None
    block: int | None
    head: int | None
    all_heads: bool


@dataclass(frozen=True)
class ReadImage:
    """An image that was read. path: None in memory. pixels: the crop. size: H W of the upright original."""

    path: str | None
    pixels: Pixels
    size: tuple[int, int]
    reduced: Image.Image


def _stream(clf: Classifier, inputs: Inputs, options: _Options, batch_size: int) -> Iterator[Explanation | Unreadable]:
    with ThreadPoolExecutor(default_workers(), thread_name_prefix="decode") as pool:
        rest = expand(inputs)
        while part := list(itertools.islice(rest, batch_size)):
            items = list(pool.map(lambda source: read_image(source, clf), part))
            pictures = [item for item in items if isinstance(item, ReadImage)]
            explained = iter(_explain_batch(clf, pictures, options) if pictures else ())
            for item in items:
                yield item if isinstance(item, Unreadable) else next(explained)


def read_image(source: Input | NoImages, clf: Classifier) -> ReadImage | Unreadable:
    """What predict reads, and the image itself."""
    try:
        if isinstance(source, np.ndarray | NoImages):
            pixels = crop(source, clf.preprocess)
            image = _from_array(cast(Any, source))
        else:
            image = decode(source, clf.preprocess.channels)
            pixels = clf.preprocess.crop(image)
    except BadImage as bad:
        return Unreadable(path_of(source), bad.reason)
    return ReadImage(path_of(source), pixels, (image.height, image.width), reduced(image).convert("RGB"))


def _from_array(array: Any) -> Image.Image:
    """An array that `crop` accepts, as a picture; of more than 4 channels, the first three."""
    channels = 1 if array.ndim == 2 else array.shape[2]
    if channels not in (1, 3, 4):
        array = array[..., :3] if channels > 4 else array[..., 0]
    return decode(
        Image.fromarray(np.ascontiguousarray(array.squeeze(2) if channels == 1 and array.ndim == 3 else array))
    )


def _explain_batch(clf: Classifier, pictures: list[ReadImage], options: _Options) -> Iterator[Explanation]:
    images = normalized(clf, pictures)
    maps, logits = compute_maps(clf.model, images, options.method, options.target, options.block, options.head)
    scores: list[Faithfulness | None] = [None] * len(pictures)
    if options.baseline is not None:
        scores[:] = compute_scores(clf.model, images, maps, options.target, options.baseline)
    targets: list[str | None] = [None] * len(pictures)
    values: list[float | None] = [None] * len(pictures)
    top: list[tuple[Score, ...]] = [()] * len(pictures)
    if clf.class_names:
        targets[:], values[:] = options.target.names(logits), options.target.score(logits)
        top = [_best(row, clf.class_names) for row in logits.softmax(1)]
    parts = compute_heads(clf.model, images, options.block).cpu().numpy() if options.all_heads else None
    for number, picture in enumerate(pictures):
        yield Explanation(
            path=picture.path,
            method=options.method.name,
            target=targets[number],
            is_pair=options.target.against is not None,
            score=values[number],
            top=top[number],
            values=maps[number].cpu().numpy(),
            input_size=clf.preprocess.size,
            box=clf.preprocess.crop_box(*picture.size),
            size=picture.size,
            picture=picture.reduced,
            faithfulness=scores[number],
            class_specific=options.method.class_specific,
            signed=options.method.signed or bool((maps[number] < 0).any()),
            reference=options.method.reference,
            parts=None if parts is None else parts[number],
        )


def normalized(clf: Classifier, pictures: list[ReadImage]) -> Tensor:
    """The model's input, float32 B C H W."""
    pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures])).to(clf.device)
    return clf.preprocess.normalize(pixels.permute(0, 3, 1, 2).contiguous())


def _best(probabilities: Tensor, names: tuple[str, ...]) -> tuple[Score, ...]:
    found = probabilities.sort(descending=True, stable=True)
    pairs = zip(found.indices[:_TOP].tolist(), found.values[:_TOP].tolist(), strict=True)
    return tuple(Score(names[index], value, index) for index, value in pairs)


def compute_maps(
    model: nn.Module,
    images: Tensor,
    method: Method,
    target: Target,
    block: int | None = None,
    head: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Maps B h w and logits B K of normalised images B C H W, both float32.

    The model may be in any mode, and the caller in any context: autocast, no_grad or inference_mode. Nothing of the
    model changes.
    """
    with _plain(images.device):
        view, images = eval_view(model), _for_model(model, images)
        logits = view(images).float()
        maps = method.compute(Request(view, images, target.fixed(logits).of, block, head))
        if method.negated_if_ruled_out:
            maps = torch.where(target.ruled_out(logits)[:, None, None], -maps, maps)
    return maps, logits


def compute_heads(model: nn.Module, images: Tensor, block: int | None = None) -> Tensor:
    """The attention of every head of one block: B heads h w, float32."""
    with _plain(images.device):
        return attention_heads(Request(eval_view(model), _for_model(model, images), lambda logits: logits[:, 0], block))


def compute_scores(
    model: nn.Module, images: Tensor, maps: Tensor, target: Target, baseline: str = "mean"
) -> list[Faithfulness]:
    """The faithfulness of each map, see `faithfulness.measure`. images: normalised, B C H W."""
    with _plain(images.device):
        view = eval_view(model)
        return measure(lambda masked: view(masked).float(), _for_model(model, images), maps, target, baseline=baseline)


@contextmanager
def _plain(device: torch.device) -> Iterator[None]:
    """Neither inference mode, whose tensors can have no gradient, nor gradients, nor autocast; and where little memory
    is free, no image is decoded meanwhile."""
    with computing(), torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _for_model(model: nn.Module, images: Tensor) -> Tensor:
    """In the model's precision; a copy where the images were made in inference mode."""
    return plain(images.to(next(model.parameters()).dtype))


def open_classifier(
    source: str | os.PathLike[str], device: str | torch.device = "cpu", img_size: str | None = None
) -> Classifier:
    """What `load_torch` loads, and external models: timm:NAME and torchvision:NAME, with ImageNet's class names if
    they have 1,000 classes."""
    external = open_external_model(os.fspath(source))
    if external is None:
        return load_torch(Path(source) if isinstance(source, os.PathLike) else source, device, img_size)
    model: Any = external.model.eval()
    if external.class_names is not None:
        model.num_classes = len(external.class_names)  # torchvision's models do not say
    names = external.class_names or tuple(str(number) for number in range(model.num_classes))
    clf = Classifier(model, external.preprocess, names, architecture=os.fspath(source)).to(device)
    return clf if img_size is None else clf.resize(img_size)
