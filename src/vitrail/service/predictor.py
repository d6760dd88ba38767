"""What a service computes: an uploaded image to the most probable classes, and to a heatmap.

Shapes: H W height and width, C channels, K classes.
"""

from __future__ import annotations

import asyncio
import base64
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from vitrail.classifier import Classifier, ExportedClassifier
from vitrail.errors import ModelError, VitrailError
from vitrail.images.convert import Pixels
from vitrail.images.decode import BadImage, read_header
from vitrail.images.reader import crop
from vitrail.inference.engine import NOT_FINITE, Engine, default_workers
from vitrail.inference.probabilities import ranking, softmax
from vitrail.inference.runtime import Images, Outputs
from vitrail.pretrained.model_card import without_paths
from vitrail.service.batching import Batcher, choose_batch
from vitrail.service.bodies import Refused
from vitrail.service.metrics import Metrics
from vitrail.service.schemas import ClassScore, Heatmap, ModelBody, PredictionBody
from vitrail.service.settings import ServeSettings

UNSURE = 0.5  # below this probability of the best class, all others together are more probable
_HEAT_SIDE = 512  # pixels: longer side of a heatmap at most
_MAX_EXPLANATIONS = 8  # that wait or are computed


class Predictor:
    """A classifier behind a batcher. Images are decoded on threads, and explained on one thread of their own."""

    def __init__(self, classifier: Classifier | ExportedClassifier, settings: ServeSettings, metrics: Metrics) -> None:
        if not classifier.class_names:
            raise ModelError("this model has no classes to predict: serve a classifier")
        self.classifier = classifier
        self.settings = settings
        self.engine: Engine = classifier.engine(cuda_graphs=settings.cuda_graphs, frozen=True)
        self.preprocess = self.engine.runtime.preprocess
        self.class_names: tuple[str, ...] = tuple(classifier.class_names)
        self.explain_methods = _explain_methods(classifier)
        self._decoders = ThreadPoolExecutor(default_workers(), thread_name_prefix="decode")
        self._explainer = ThreadPoolExecutor(1, thread_name_prefix="explain")
        self._explaining = 0
        size = (*self.preprocess.size, self.preprocess.channels)
        at_once = 1 if settings.max_batch else getattr(self.engine.runtime, "at_once", 1)
        max_batch = settings.max_batch or choose_batch(self.compute, size, at_once)
        spare = at_once > 1 and max_batch == 1  # a call that a core goes on with, while the next one is started
        self.batcher = Batcher(
            self.compute,
            max_batch=max_batch,
            parallel=at_once + spare,
            max_delay=settings.max_delay,
            max_queue=settings.max_queue,
            observe_batch=metrics.observe_batch,
            observe_queue=metrics.observe_queue,
        )

    def compute(self, images: Images) -> Outputs:
        """Logits B K, by the engine; NaN in rows that are not finite."""
        (result,) = self.engine.run(images, lambda image: image, len(images), workers=0)
        outputs = np.full((len(images), *result.outputs.shape[1:]), np.nan, np.float32)
        outputs[[error is None for error in result.errors]] = result.outputs
        return outputs

    async def stop(self) -> None:
        await self.batcher.stop()
        for pool in (self._decoders, self._explainer):
            pool.shutdown(wait=False, cancel_futures=True)

    async def predict(self, data: bytes, top: int, explain: str | None = None) -> PredictionBody:
        """The `top` most probable classes of an encoded image. explain: a method of `explain_methods`, or None.

        Raises:
            BadImage: it cannot be read.
            Overloaded: too many images wait.
            Refused: too many explanations wait (429).
        """
        body = ranked(await self.logits_of_file(data), self.class_names, top)
        if explain is not None:
            body.heatmap = await self._explain(data, explain)
        return body

    def describe(self, name: str) -> ModelBody:
        """The model's card. name: of the model."""
        runtime = self.engine.runtime
        return ModelBody(
            name=name,
            architecture=runtime.name,
            runtime=type(runtime).__name__,
            classes=len(self.class_names),
            preprocess=self.preprocess.to_dict(),
            explain_methods=list(self.explain_methods),
            max_body=self.settings.max_body,
            max_files=self.settings.max_files,
            notes=without_paths(getattr(self.classifier, "notes", {})),
        )

    async def logits(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """The logits K of an image that has the model's size, uint8 H W C."""
        with self.batcher.admit():
            return _finite(await self.batcher.submit(pixels))

    async def logits_of_file(self, data: bytes) -> npt.NDArray[np.float32]:
        """The logits K of an encoded image."""
        with self.batcher.admit():
            with self.batcher.decoding():
                pixels = await self._decode(data)
            return _finite(await self.batcher.submit(pixels))

    async def _decode(self, data: bytes) -> Pixels:
        seconds = self.settings.decode_timeout
        future = asyncio.get_running_loop().run_in_executor(self._decoders, self._read, data)
        try:
            return await asyncio.wait_for(future, seconds)
        except TimeoutError:
            raise BadImage(f"could not be decoded within {seconds:g} s") from None

    def _read(self, data: bytes) -> Pixels:
        header = read_header(data)
        if (pixels := header.height * header.width) > self.settings.max_pixels:
            raise BadImage(f"has {pixels:,} pixels, more than the limit of {self.settings.max_pixels:,}")
        return crop(data, self.preprocess)

    async def _explain(self, data: bytes, method: str) -> Heatmap:
        if self._explaining >= _MAX_EXPLANATIONS:
            raise Refused(429, "too many explanations wait", {"Retry-After": "2"})
        self._explaining += 1
        try:
            job = partial(make_heatmap, self.classifier, data, method)
            return await asyncio.get_running_loop().run_in_executor(self._explainer, job)
        except VitrailError as error:
            raise Refused(400, str(error)) from None
        finally:
            self._explaining -= 1


def _finite(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The same. Raises BadImage if they are not finite."""
    if not np.isfinite(logits).all():
        raise BadImage(NOT_FINITE)
    return logits


def ranked(logits: npt.NDArray[np.float32], names: tuple[str, ...], top: int) -> PredictionBody:
    """The most probable classes of logits K, as in `vitrail predict`."""
    probabilities = softmax(logits[None])[0]
    scores = [
        ClassScore(label=names[index], score=float(probabilities[index])) for index in ranking(logits[None], top)[0]
    ]
    best = scores[0]
    return PredictionBody(label=best.label, score=best.score, unsure=best.score < UNSURE, top=scores)


def _explain_methods(classifier: Classifier | ExportedClassifier) -> tuple[str, ...]:
    """The methods of `vitrail explain` for this model, the default first; none for an exported one."""
    if isinstance(classifier, ExportedClassifier):
        return ()
    from vitrail.explanation.methods.table import default_method, methods_of

    default = default_method(classifier.model)
    return (default, *(name for name in methods_of(classifier.model) if name != default))


def make_heatmap(classifier: Any, data: bytes, method: str) -> Heatmap:
    """The heatmap of an encoded image for its predicted class.

    Raises:
        VitrailError: it cannot be explained.
    """
    from vitrail.explanation.explain import explain
    from vitrail.explanation.rendering import encode_png

    found = explain(classifier, data, method)
    height, width = found.size
    scale = min(1.0, _HEAT_SIDE / max(found.size))
    heat = found.heat((max(1, round(height * scale)), max(1, round(width * scale))))
    return Heatmap(
        method=found.method,
        target=found.target,
        class_specific=found.class_specific,
        png=base64.b64encode(encode_png(heat)).decode(),
        width=width,
        height=height,
    )
