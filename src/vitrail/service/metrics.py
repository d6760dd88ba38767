"""Prometheus metrics of a service."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_IMAGES = (1, 2, 4, 8, 16, 32, 64)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts of one process; `expose` adds those of other worker processes, which share PROMETHEUS_MULTIPROC_DIR."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self.requests = Counter("vitrail_requests_total", "Answered requests", ("route", "status"), registry=registry)
        self.seconds = Histogram(
            "vitrail_request_seconds", "Time of a request", ("route",), buckets=_SECONDS, registry=registry
        )
        self.errors = Counter("vitrail_errors_total", "Requests and images with an error", ("kind",), registry=registry)
        self._images = Histogram("vitrail_batch_images", "Images of a batch", buckets=_IMAGES, registry=registry)
        self._model = Histogram(
            "vitrail_batch_seconds", "Time of the model for a batch", buckets=_SECONDS, registry=registry
        )
        self._queue = Gauge(
            "vitrail_queue_images",
            "Images that wait or are computed",
            registry=registry,
            multiprocess_mode="livesum",
        )

    def observe_batch(self, images: int, seconds: float) -> None:
        self._images.observe(images)
        self._model.observe(seconds)

    def observe_queue(self, images: int) -> None:
        self._queue.set(images)

    def expose(self) -> bytes:
        """The text that Prometheus reads."""
        registry = self._registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
