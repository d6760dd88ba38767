"""Health, metrics, labels and the model's card."""

from collections.abc import Callable

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from vitrail.service.metrics import CONTENT_TYPE
from vitrail.service.routes.common import Parts, errors
from vitrail.service.schemas import Health, Labels, ModelBody


def status_routes(parts: Parts, ready: Callable[[], bool]) -> APIRouter:
    """ready: whether new requests are welcome."""
    router = APIRouter(tags=["status"])
    predictor = parts.predictor
    guarded = errors(401, 403)

    @router.get("/healthz", responses=errors(403))
    async def healthz() -> Health:
        """Whether the process runs."""
        return Health(status="ok")

    @router.get("/readyz", response_model=Health, responses=errors(403, 503))
    async def readyz() -> Response | Health:
        """Whether requests are answered; 503 while the service stops."""
        return Health(status="ok") if ready() else JSONResponse({"error": "the service stops"}, 503)

    @router.get("/labels", responses=guarded)
    async def labels() -> Labels:
        """The class names, by index."""
        return Labels(labels=list(predictor.class_names))

    @router.get("/model", responses=guarded)
    async def model() -> ModelBody:
        """What the service predicts with: architecture, preprocessing, limits."""
        return predictor.describe(parts.name)

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **guarded},
    )
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(parts.metrics.expose(), media_type=CONTENT_TYPE)

    return router
