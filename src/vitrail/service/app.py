"""A service as an ASGI application: its routes, the page, and what errors become."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from vitrail._version import __version__
from vitrail.images.decode import BadImage
from vitrail.reports.browser import SCRIPT, STYLE, shared_file
from vitrail.service.batching import Overloaded
from vitrail.service.bodies import Bodies, Refused
from vitrail.service.free_memory import return_memory_while_idle
from vitrail.service.guard import Guard
from vitrail.service.metrics import Metrics
from vitrail.service.predictor import Predictor
from vitrail.service.routes.common import Parts
from vitrail.service.routes.predict import predict_routes
from vitrail.service.routes.protocol import protocol_routes
from vitrail.service.routes.status import status_routes
from vitrail.service.schemas import InferRequest
from vitrail.service.settings import ServeSettings
from vitrail.utils.text import one_line

_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_SHARED = {STYLE: "text/css", SCRIPT: "text/javascript"}


def create_app(classifier: Any, settings: ServeSettings, name: str = "model") -> Guard:
    """The service as an ASGI application.

    classifier: a Classifier, or one of an export. name: of the model, in /v2/models/NAME.
    """
    metrics = Metrics()
    parts = Parts(name, settings, Predictor(classifier, settings, metrics), Bodies(settings), metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        parts.predictor.batcher.start()
        returning = asyncio.create_task(return_memory_while_idle(parts.predictor.batcher))
        yield
        returning.cancel()
        await parts.predictor.stop()

    app = _App(
        title="vitrail",
        version=__version__,
        summary=f"Image classification by {name}",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from another site
        redoc_url=None,
    )
    guard = Guard(app, settings, metrics)

    def ready() -> bool:
        return not guard.draining

    _add_page(app)
    _add_error_handlers(app, metrics)
    app.include_router(predict_routes(parts))
    app.include_router(status_routes(parts, ready))
    app.include_router(protocol_routes(parts, ready))
    return guard


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """With the schemas of bodies that are read by `Bodies`, which FastAPI does not know."""
        document = super().openapi()
        _, found = models_json_schema([(InferRequest, "validation")], ref_template="#/components/schemas/{model}")
        document["components"]["schemas"] |= found["$defs"]
        return document


def _add_page(app: FastAPI) -> None:
    """The page's files, each by its own route: no folder is served."""
    folder = files("vitrail.service") / "page"
    contents = {path: ((folder / name).read_bytes(), kind) for path, (name, kind) in _PAGE.items()}
    contents |= {f"/{name}": (shared_file(name), kind) for name, kind in _SHARED.items()}
    for path, (content, kind) in contents.items():

        async def send(content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=kind)

        app.add_api_route(path, send, methods=["GET"], include_in_schema=False)


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Every error is a JSON object with one line, `error`."""

    def answer(status: int, reason: str, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"error": reason}, status, headers)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return answer(error.status, error.reason, error.headers)

    @app.exception_handler(BadImage)
    async def bad_image(request: Request, error: BadImage) -> Response:
        metrics.errors.labels("image").inc()
        return answer(422, f"the image {error.reason}")

    @app.exception_handler(Overloaded)
    async def overloaded(request: Request, error: Overloaded) -> Response:
        return answer(429, "too many images wait: try again later", {"Retry-After": str(error.retry_after)})

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return answer(422, one_line(f"{first['loc'][-1]}: {first['msg']}"))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return answer(error.status_code, one_line(error.detail), dict(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def disconnected(request: Request, error: ClientDisconnect) -> Response:
        return answer(400, "the client went away")  # nobody reads it
