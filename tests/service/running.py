"""A service on loopback for tests, and requests to it by the standard library."""

import asyncio
import http.client
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitrail.classifier import Classifier
from vitrail.images.preprocess import Preprocess
from vitrail.models.build import build_model
from vitrail.models.configs import ViTConfig
from vitrail.service.app import create_app
from vitrail.service.guard import Guard
from vitrail.service.server import Server, bind, make_server
from vitrail.service.settings import ServeSettings

NAMES = ("cat", "dog", "<b>bird</b>", "Füchse")


def small_classifier() -> Classifier:
    torch.manual_seed(3)
    config = ViTConfig(img_size=(32, 32), patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=len(NAMES))
    model = build_model(config).eval()
    with torch.no_grad():
        model.head.weight.mul_(40)  # else every class has the same probability
    return Classifier(model, Preprocess(size=(32, 32)), NAMES)


def encoded(seed: int = 0, size: tuple[int, int] = (48, 40), kind: str = "PNG") -> bytes:
    """An image of smooth random colours. size: width, height."""
    colors = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(colors).resize(size, Image.Resampling.BICUBIC).save(stream, kind)
    return stream.getvalue()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.content)


@dataclass
class Running:
    """A service that runs. guard: the application."""

    port: int
    guard: Guard
    server: Server

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Header names are written with underscores."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            found = connection.getresponse()
            return Answer(found.status, {name.lower(): value for name, value in found.getheaders()}, found.read())
        finally:
            connection.close()

    def predict(self, data: bytes, path: str = "/predict", kind: str = "image/png") -> Answer:
        return self.request("POST", path, data, Content_Type=kind)


@contextmanager
def running(classifier: Any, name: str = "tiny", **options: Any) -> Iterator[Running]:
    settings = ServeSettings(port=0, access_log=False, **{"max_batch": 8, **options})
    with bind(settings) as listening:
        guard = create_app(classifier, settings, name)
        server = make_server(guard, settings)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            thread.join(0.01)
        try:
            yield Running(listening.getsockname()[1], guard, server)
        finally:
            server.should_exit = True
            thread.join(20)


def form(files: list[tuple[str, bytes]], field: str = "files", boundary: str = "limit") -> tuple[bytes, str]:
    """A multipart form, and its content type."""
    parts = []
    for name, data in files:
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
        parts.append(head.encode() + data + b"\r\n")
    return b"".join(parts) + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"
