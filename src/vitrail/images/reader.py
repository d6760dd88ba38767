"""Inputs of `predict` and `embed` (paths, folders, patterns, images, arrays, tensors), decoded and cropped for a model.

Shapes: H W height and width, C channels.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitrail.errors import DataError, DataTypeError
from vitrail.images.convert import Pixels
from vitrail.images.decode import BadImage, decode, image_extensions
from vitrail.images.preprocess import Preprocess
from vitrail.images.tensors import is_tensor, tensor_pixels

Input = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any]
Inputs = Input | Iterable[Input] | Any  # also tensors, which become arrays
_TAKEN = "give paths, folders, patterns, Pillow images, uint8 arrays H W or H W C, or tensors C H W or B C H W"


@dataclass(frozen=True)
class NoImages:
    """A folder or pattern without images, and the reason."""

    path: str
    error: str


def expand(inputs: Inputs, channels: int | None = None) -> Iterator[Input | NoImages]:
    """The single images of `inputs`: folders are searched recursively, glob patterns are matched.

    A folder or pattern without images yields a NoImages. channels: of the model, for tensors.

    Raises:
        DataTypeError: an input is of another type, or a tensor of another shape or range.
    """
    if isinstance(inputs, str | os.PathLike | bytes | Image.Image) or is_tensor(inputs):
        inputs = [inputs]
    elif isinstance(inputs, np.ndarray):
        inputs = list(inputs) if inputs.ndim == 4 else [inputs]
    elif not isinstance(inputs, Iterable):
        raise DataTypeError(f"{type(inputs).__name__} is not an image: {_TAKEN}")
    for source in inputs:
        if is_tensor(source):
            yield from tensor_pixels(source, channels)
            continue
        if isinstance(source, NoImages | bytes | Image.Image | np.ndarray):  # NoImages: it was expanded before
            yield source
            continue
        if not isinstance(source, str | os.PathLike):
            raise DataTypeError(f"{type(source).__name__} is not an image: {_TAKEN}")
        path = os.fspath(source)
        if os.path.isdir(path):
            yield from _or_error(path, _images_below(path), "contains no images")
        elif not os.path.lexists(path) and glob.has_magic(path):
            yield from _or_error(path, _matching(path), "matches no image")
        else:
            yield source


def _or_error(path: str, found: Iterator[str], error: str) -> Iterator[str | NoImages]:
    first = next(found, None)
    yield NoImages(path, error) if first is None else first
    yield from found


def _matching(pattern: str) -> Iterator[str]:
    try:
        paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    except RecursionError:
        raise DataError(f"{pattern}: the folders are nested too deeply for a pattern; name the folder") from None
    for path in paths:
        if os.path.isdir(path):
            if "**" not in pattern:  # "**" matches its content too
                yield from _images_below(path)
        else:
            yield path


def _images_below(folder: str) -> Iterator[str]:
    """Files with an image's extension, in alphabetical order, without hidden ones. Links to folders are not followed.

    Without recursion, which would limit the depth.
    """
    waiting = [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as found:
                entries = sorted((each for each in found if not each.name.startswith(".")), key=lambda each: each.name)
        except OSError:
            continue
        folders = [each.path for each in entries if each.is_dir(follow_symlinks=False)]
        for entry in entries:
            if os.path.splitext(entry.name)[1].lower() in image_extensions() and not os.path.isdir(entry.path):
                yield entry.path
        waiting += reversed(folders)


def crop(source: Input | NoImages, preprocess: Preprocess) -> Pixels:
    """Decode and crop one image: uint8 H W C. Raises BadImage."""
    if isinstance(source, NoImages):
        raise BadImage(source.error)
    if isinstance(source, np.ndarray):
        return _crop_array(source, preprocess)
    return preprocess.crop(decode(source, preprocess.channels))


def path_of(source: Input | NoImages) -> str | None:
    """The path of an input, None for an image in memory."""
    if isinstance(source, NoImages):
        return source.path
    return os.fspath(source) if isinstance(source, str | os.PathLike) else None


def _crop_array(array: npt.NDArray[Any], preprocess: Preprocess) -> Pixels:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        raise BadImage(f"is an array of {array.dtype} {array.shape}; give uint8 H W or H W C")
    channels = 1 if array.ndim == 2 else array.shape[2]
    if channels == preprocess.channels and channels not in (1, 3):
        return _crop_bands(array, preprocess)
    if channels not in (1, 3, 4):
        raise BadImage(f"is an array of {channels} channels for a model of {preprocess.channels}")
    array = np.ascontiguousarray(array)
    image = Image.fromarray(array[..., 0] if channels == 1 and array.ndim == 3 else array)
    return preprocess.crop(decode(image, preprocess.channels))


def _crop_bands(array: npt.NDArray[Any], preprocess: Preprocess) -> Pixels:
    """More than 3 channels: each is resized and cropped as a grey image."""
    bands = [
        preprocess.replace(channels=1, mean=(mean,), std=(std,)).crop(Image.fromarray(np.ascontiguousarray(band)))
        for band, mean, std in zip(np.moveaxis(array, 2, 0), preprocess.mean, preprocess.std, strict=True)
    ]
    return np.concatenate(bands, axis=2)
