"""What several routes share: the parts of a service, and the errors that they document."""

from dataclasses import dataclass
from typing import Any

from vitrail.service.bodies import Bodies
from vitrail.service.metrics import Metrics
from vitrail.service.predictor import Predictor
from vitrail.service.schemas import ErrorBody
from vitrail.service.settings import ServeSettings

_REASONS = {
    400: "The request is damaged, or names what does not exist",
    401: "No token, or a wrong one",
    403: "The caller's origin or host is not allowed",
    404: "There is no such model",
    408: "The request was not sent in time",
    413: "The request is too large",
    415: "The content is not of an accepted type",
    422: "The image cannot be read, or a parameter is out of range",
    429: "Too many images wait; see Retry-After",
    503: "The service stops, or did not answer in time",
}


@dataclass(frozen=True)
class Parts:
    """name: of the model, in responses and in /v2/models/NAME."""

    name: str
    settings: ServeSettings
    predictor: Predictor
    bodies: Bodies
    metrics: Metrics


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error responses of a route, for its `responses`."""
    return {status: {"model": ErrorBody, "description": _REASONS[status]} for status in statuses}
