"""The routes of the Open Inference Protocol, version 2; see `inference_protocol.py`."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import JSONResponse

from vitrail._version import __version__
from vitrail.service.bodies import Refused
from vitrail.service.inference_protocol import VERSION, Inference, metadata
from vitrail.service.routes.common import Parts, errors
from vitrail.service.schemas import (
    InferResponse,
    Liveness,
    ModelMetadata,
    ModelReadiness,
    Readiness,
    ServerMetadata,
)
from vitrail.utils.text import printable

_BODY = {
    "required": True,
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/InferRequest"}}},
}
_GUARDED = errors(401, 403)
_FOUND = errors(401, 403, 404)


def protocol_routes(parts: Parts, ready: Callable[[], bool]) -> APIRouter:
    """ready: whether new requests are welcome."""
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])
    predictor = parts.predictor
    preprocess = predictor.preprocess
    described = metadata(parts.name, preprocess.size, preprocess.channels, len(predictor.class_names))
    _add_server_routes(router, ready)
    _add_model_routes(router, described, ready)
    _add_infer_routes(router, described, parts)
    return router


def _add_server_routes(router: APIRouter, ready: Callable[[], bool]) -> None:
    @router.get("", responses=_GUARDED)
    async def server_metadata() -> ServerMetadata:
        return ServerMetadata(name="vitrail", version=__version__, extensions=["binary_tensor_data"])

    @router.get("/health/live", responses=errors(403))
    async def live() -> Liveness:
        return Liveness(live=True)

    @router.get("/health/ready", response_model=Readiness, responses=errors(403, 503))
    async def server_ready() -> Response | Readiness:
        return Readiness(ready=True) if ready() else JSONResponse({"error": "the service stops"}, 503)


def _path_parameters(name: str) -> tuple[Any, Any]:
    """The path's parts `model` and `version`, with their only values for /openapi.json."""
    model, version = (Path(json_schema_extra={"enum": [value]}) for value in (name, VERSION))
    return model, version


def _check(model: str, version: str, name: str) -> None:
    if model != name or version != VERSION:
        raise Refused(404, f"there is no model {printable(model)!r} of version {printable(version)!r}")


def _add_model_routes(router: APIRouter, described: ModelMetadata, ready: Callable[[], bool]) -> None:
    model_part, version_part = _path_parameters(described.name)

    @router.get("/models/{model}/versions/{version}", responses=_FOUND)
    async def model_version(model: str = model_part, version: str = version_part) -> ModelMetadata:
        _check(model, version, described.name)
        return described

    @router.get("/models/{model}", responses=_FOUND)
    async def model_metadata(model: str = model_part) -> ModelMetadata:
        return await model_version(model, VERSION)

    @router.get("/models/{model}/versions/{version}/ready", responses=_FOUND)
    async def version_ready(model: str = model_part, version: str = version_part) -> ModelReadiness:
        _check(model, version, described.name)
        return ModelReadiness(name=model, ready=ready())

    @router.get("/models/{model}/ready", responses=_FOUND)
    async def model_ready(model: str = model_part) -> ModelReadiness:
        return await version_ready(model, VERSION)


def _add_infer_routes(router: APIRouter, described: ModelMetadata, parts: Parts) -> None:
    model_part, version_part = _path_parameters(described.name)
    predictor = parts.predictor
    options: dict[str, Any] = {
        "response_model": InferResponse,
        "response_model_exclude_none": True,
        "responses": errors(400, 401, 403, 404, 408, 413, 415, 422, 429),
        "openapi_extra": {"requestBody": _BODY},
    }

    @router.post("/models/{model}/versions/{version}/infer", **options)
    async def infer_version(request: Request, model: str = model_part, version: str = version_part) -> Response:
        _check(model, version, described.name)
        async with parts.bodies.read(request) as body:
            inference = await asyncio.to_thread(Inference, body, request.headers, described, parts.settings.max_files)
            jobs = [predictor.logits_of_file(data) for data in inference.files]
            jobs += [predictor.logits(pixels) for pixels in inference.pixels]
            content, headers = inference.respond(np.stack(await asyncio.gather(*jobs)), list(predictor.class_names))
            return Response(content, headers=headers)

    @router.post("/models/{model}/infer", **options)
    async def infer(request: Request, model: str = model_part) -> Response:
        return await infer_version(request, model, VERSION)
