"""POST /predict and POST /predict/batch."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from vitrail.images.decode import BadImage
from vitrail.service.batching import Overloaded
from vitrail.service.bodies import Refused, Upload
from vitrail.service.routes.common import Parts, errors
from vitrail.service.schemas import BatchBody, BatchItem, PredictionBody
from vitrail.utils.text import printable

Top = Annotated[int, Query(ge=1, le=1000, description="Number of classes.")]
_FILE = {"type": "string", "format": "binary"}
_BYTES = {"schema": _FILE}


def _form(field: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A multipart form whose only field is an image, or several."""
    form = {"type": "object", "properties": {field: schema}, "required": [field], "additionalProperties": False}
    return {"multipart/form-data": {"schema": form, "encoding": {field: {"contentType": "image/jpeg, image/png"}}}}


_IMAGE = {
    "image/jpeg": _BYTES,
    "image/png": _BYTES,
    "image/webp": _BYTES,
    "application/octet-stream": _BYTES,
    **_form("file", _FILE),
}
_FILES = _form("files", {"type": "array", "items": _FILE, "minItems": 1})
_ERRORS = errors(400, 401, 403, 408, 413, 415, 422, 429)


def predict_routes(parts: Parts) -> APIRouter:
    router = APIRouter(tags=["predict"])
    methods = parts.predictor.explain_methods
    explain_query = Query(
        description="A method of `vitrail explain`: adds a heatmap of the predicted class.",
        json_schema_extra={"enum": list(methods)},
        include_in_schema=bool(methods),
    )
    Explain = Annotated[str | None, explain_query]  # a type

    async def predict_one(data: bytes, top: int, explain: str | None) -> PredictionBody:
        if explain is not None and explain not in methods:
            allowed = f"use one of {', '.join(methods)}" if methods else "an exported model has none"
            raise Refused(422, f"explain={printable(explain)!r} is not a method of this model: {allowed}")
        return await parts.predictor.predict(data, top, explain)

    @router.post(
        "/predict",
        response_model_exclude_none=True,
        responses=_ERRORS,
        openapi_extra={"requestBody": {"required": True, "content": _IMAGE}},
    )
    async def predict(request: Request, top: Top = 5, explain: Explain = None) -> PredictionBody:
        """The most probable classes of one image: its bytes, or a multipart form with one file."""
        async with parts.bodies.uploads(request, "file", most=1) as (upload,):
            return await predict_one(upload.data, top, explain)

    @router.post(
        "/predict/batch",
        response_model_exclude_none=True,
        responses=_ERRORS,
        openapi_extra={"requestBody": {"required": True, "content": _FILES}},
    )
    async def predict_batch(request: Request, top: Top = 5, explain: Explain = None) -> BatchBody:
        """The same for several files of a multipart form. An image that cannot be read has an `error` in its place."""

        async def item(upload: Upload) -> BatchItem:
            try:
                return BatchItem(name=upload.name, prediction=await predict_one(upload.data, top, explain))
            except BadImage as bad:
                parts.metrics.errors.labels("image").inc()
                return BatchItem(name=upload.name, error=f"the image {bad.reason}")

        async with parts.bodies.uploads(request, "files", most=parts.settings.max_files) as uploads:
            tasks = [asyncio.ensure_future(item(upload)) for upload in uploads]
            try:
                return BatchBody(images=list(await asyncio.gather(*tasks)))
            except (Overloaded, Refused):
                for task in tasks:
                    task.cancel()
                raise

    return router
