"""10,000 hostile requests to a service in a process of its own: no 5xx, each answered or closed within its limit, no
memory or file descriptors kept, and the next honest request as fast as before."""

import io
import os
import random
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from service.running import encoded, form, small_classifier

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc"),
]

REQUESTS = 10_000
LIMIT = 20.0  # seconds in which every request is answered or closed
SHORT = ("header_timeout", 2.0), ("body_timeout", 2.0)  # of the service under test, so that slow senders take 2 s


@dataclass
class Service:
    port: int
    pid: int

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def memory(self) -> float:
        """MB in use."""
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        found = re.search(r"Pss:\s+(\d+) kB", text)
        assert found
        return int(found[1]) / 1000

    def honest(self) -> float:
        """Milliseconds of an honest request."""
        start = time.perf_counter()
        answer = exchange(self.port, [post(encoded(1))])
        assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
        return 1000 * (time.perf_counter() - start)


@contextmanager
def serving(model: Path) -> Iterator[Service]:
    program = (
        "import sys; from vitrail.service.server import serve; "
        f"serve(sys.argv[1], port=0, access_log=False, **{dict(SHORT)!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(model)], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    port = None
    while port is None and (line := process.stderr.readline()):
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
            port = int(found[1])
    assert port is not None
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if exchange(port, [b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"]):
                break
        except ConnectionError:
            time.sleep(0.1)
    yield Service(port, process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) in (0, -signal.SIGTERM)
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


@pytest.fixture
def services(tmp_path: Path) -> Iterator[tuple[Service, Service]]:
    """The service under test, and one that nobody attacks: the speed of a machine drifts by more than 10 %."""
    small_classifier().save(tmp_path / "model")
    with serving(tmp_path / "model") as service, serving(tmp_path / "model") as control:
        yield service, control


def relative(service: Service, control: Service) -> float:
    """Milliseconds of an honest request over those of the control, asked in turn."""
    return statistics.median(service.honest() / control.honest() for _ in range(300))


def exchange(port: int, parts: list[bytes], pause: float = 0.0, wait: bool = True) -> bytes:
    """Send parts, with a pause after each, and read the answer until the connection is closed, perhaps by a reset."""
    with socket.create_connection(("127.0.0.1", port), LIMIT) as connection:
        received = b""
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            while wait and (chunk := connection.recv(65536)):
                received += chunk
        except (ConnectionError, BrokenPipeError):
            pass
        return received


def post(
    body: bytes, path: str = "/predict", kind: str = "image/png", *, length: int | None = None, more: str = ""
) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: {kind}\r\n{more}"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )


BOMB = bomb()
THIN = io.BytesIO()
Image.new("L", (1, 20_000)).save(THIN, "PNG")


def mutated(draw: random.Random) -> bytes:
    data = bytearray(encoded(draw.randrange(50), kind=draw.choice(("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"))))
    for _ in range(draw.randrange(1, 8)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data[: draw.randrange(len(data))] if draw.random() < 0.3 else data)


@dataclass
class Attack:
    """Bytes to send, the seconds to wait after each part, and whether to wait for the answer."""

    parts: list[bytes]
    pause: float = 0.0
    wait: bool = True


FORM = form([])[1]
CHUNKED = "Transfer-Encoding: chunked\r\n"
TRAILER = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n{CHUNKED}\r\n0\r\nX: ".encode()
TYPES = ("text/html", "application/json", "x", "multipart/form-data")
PATHS = ("%00", "../../etc/passwd", "%2e%2e/", "a" * 9000, "*", "?" * 500)
INFER = "/v2/models/model/infer"


def get(path: str) -> bytes:
    return f"GET /{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()


ATTACKS: dict[str, tuple[int, Callable[[random.Random], Attack]]] = {  # share in percent, and one request
    "mutated image": (26, lambda draw: Attack([post(mutated(draw))])),
    "bomb": (5, lambda draw: Attack([post(BOMB)])),
    "thin image": (2, lambda draw: Attack([post(THIN.getvalue())])),
    "polyglot": (5, lambda draw: Attack([post(encoded(1) + b"<script>PK\x03\x04%PDF" + draw.randbytes(200))])),
    "no image": (5, lambda draw: Attack([post(draw.randbytes(draw.randrange(2000)))])),
    "lying length": (4, lambda draw: Attack([post(encoded(1), length=draw.choice((-1, 10**6, 10**15)))])),
    "no length": (2, lambda draw: Attack([b"POST /predict HTTP/1.1\r\nHost: localhost\r\n\r\n" + encoded(1)])),
    "bad chunks": (3, lambda draw: Attack([post(b"zz\r\n" + draw.randbytes(50), more=CHUNKED)])),
    "disconnect": (11, lambda draw: Attack([post(encoded(1))[: draw.randrange(20, 900)]], wait=False)),
    "wrong type": (6, lambda draw: Attack([post(encoded(1), kind=draw.choice(TYPES))])),
    "deep JSON": (5, lambda draw: Attack([post(draw.choice((b"[", b'{"a":')) * 50_000, INFER, "application/json")])),
    "broken form": (6, lambda draw: Attack([post(form([("a", bytes(500))])[0][: draw.randrange(500)], kind=FORM)])),
    "many files": (2, lambda draw: Attack([post(form([("a", b"x")] * 500)[0], "/predict/batch", FORM)])),
    "huge header": (4, lambda draw: Attack([b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000])),
    "long trailer": (2, lambda draw: Attack([TRAILER + b"a" * 200_000])),
    "sent ahead": (2, lambda draw: Attack([b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5000])),
    "no HTTP": (4, lambda draw: Attack([draw.randbytes(500) + b"\r\n\r\n"])),
    "strange path": (4, lambda draw: Attack([get(draw.choice(PATHS))])),
    "slow header": (1, lambda draw: Attack([b"GET / HTTP/1.1\r\n", b"X: a\r\n", b"Y"], pause=0.8)),
    "slow body": (1, lambda draw: Attack([post(b"", length=10), b"a", b"b"], pause=0.9)),
}


def test_hostile_requests(services: tuple[Service, Service]) -> None:
    service, control = services
    kinds = [kind for kind, (share, _) in ATTACKS.items() for _ in range(share * REQUESTS // 100)]
    assert len(kinds) == REQUESTS
    random.Random(0).shuffle(kinds)

    def attack(number: int) -> tuple[str, float, bytes]:
        kind, start = kinds[number], time.perf_counter()
        made = ATTACKS[kind][1](random.Random(number))
        answer = exchange(service.port, made.parts, made.pause, made.wait)
        return kind, time.perf_counter() - start, answer.split(b"\r\n", 1)[0][9:12]

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(attack, range(500)))  # what is loaded once, such as Pillow's plugins
        for _ in range(20):
            service.honest(), control.honest()
        memory, descriptors = service.memory(), service.descriptors()
        before = relative(service, control)
        found = list(pool.map(attack, range(REQUESTS)))
    statuses = Counter((kind, status.decode("latin-1") or "closed") for kind, _, status in found)
    print(*(f"{kind}: {status} x {count}" for (kind, status), count in sorted(statuses.items())), sep="\n")
    assert not [key for key in statuses if key[1].startswith("5")]
    assert max(seconds for _, seconds, _ in found) < LIMIT
    deadline = time.monotonic() + 30
    while service.descriptors() > descriptors and time.monotonic() < deadline:
        time.sleep(0.2)
    after = relative(service, control)
    print(f"memory {memory:.0f} to {service.memory():.0f} MB, honest request {after / before:.3f} of the time before")
    assert after <= 1.3 * before
    assert service.descriptors() <= descriptors
    assert service.memory() - memory <= 30
