"""Who may call, limits of time and size, health, the orderly stop, and the page's files."""

import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from service.running import NAMES, Running, encoded, running, small_classifier
from vitrail.cli import main
from vitrail.errors import ConfigError, DeviceError, ModelError
from vitrail.service.server import bind, model_name, serve
from vitrail.service.settings import ServeSettings

CLASSIFIER = small_classifier()


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with running(CLASSIFIER, header_timeout=0.5, body_timeout=0.6, max_body=200_000) as found:
        yield found


def raw(service: Running, *parts: bytes, pause: float = 0.0, timeout: float = 5.0) -> bytes:
    """Everything that the service answers to these bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", service.port), timeout) as connection:
        received = b""
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            while chunk := connection.recv(65536):
                received += chunk
        except ConnectionError:
            pass
        return received


def test_labels_and_health(service: Running) -> None:
    assert service.request("GET", "/labels").body == {"labels": list(NAMES)}
    assert service.request("GET", "/healthz").body == {"status": "ok"}
    assert service.request("GET", "/readyz").status == 200
    card = service.request("GET", "/model").body
    assert card["preprocess"] == CLASSIFIER.preprocess.to_dict()
    assert card["classes"] == len(NAMES)
    assert card["explain_methods"][0] == "relevance"


def test_the_page_asks_nothing_of_another_site(service: Running) -> None:
    kinds = {
        "/": "text/html",
        "/page.css": "text/css",
        "/page.js": "text/javascript",
        "/images.js": "text/javascript",
        "/icon.svg": "image/svg+xml",
    }
    for path, kind in kinds.items():
        answer = service.request("GET", path)
        assert answer.status == 200
        assert answer.headers["content-type"].startswith(kind)
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        text = answer.content.decode().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text


def test_no_folder_is_served(service: Running) -> None:
    for path in ("/page/", "/page/index.html", "/../app.py", "/%2e%2e/app.py", "/static", "/docs", "/redoc"):
        assert service.request("GET", path).status == 404


def test_unknown_methods(service: Running) -> None:
    answer = service.request("PUT", "/predict", encoded())
    assert answer.status == 405
    assert "POST" in answer.headers["allow"]
    assert "error" in answer.body


def test_a_large_body_is_refused_before_it_is_read(service: Running) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 99999999\r\n\r\n"
    assert raw(service, head).startswith(b"HTTP/1.1 413")


def test_a_large_body_without_a_length_is_refused(service: Running) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    assert raw(service, head, *[chunk] * 6).startswith(b"HTTP/1.1 413")


def test_compressed_bodies_are_refused(service: Running) -> None:
    answer = service.request("POST", "/predict", b"x", Content_Type="image/png", Content_Encoding="gzip")
    assert answer.status == 415


def test_a_slow_body_is_given_up(service: Running) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 100\r\n\r\n"
    start = time.perf_counter()
    assert raw(service, head, b"a", b"b", pause=0.2).startswith(b"HTTP/1.1 408")
    assert time.perf_counter() - start < 4


def test_a_slow_header_is_given_up(service: Running) -> None:
    start = time.perf_counter()
    assert raw(service, b"GET /healthz HTTP/1.1\r\n", b"X-A: b\r\n", b"X-B: b\r\n", pause=0.2) == b""
    assert time.perf_counter() - start < 4


def test_a_slow_second_header_is_given_up(service: Running) -> None:
    first = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    start = time.perf_counter()
    assert raw(service, first, b"GET /hea", b"lthz HTTP", pause=0.2).count(b"HTTP/1.1") == 1
    assert time.perf_counter() - start < 4


@pytest.mark.parametrize(
    "parts",
    [
        [b"X-A: " + b"a" * 100_000 + b"\r\n\r\n"],
        [b"X-A: " + b"a" * 20_000, *[b"a" * 20_000] * 4],  # one line that does not end
        [b"X-A: " + b"a" * 1_000 + b"\r\n"] * 100,
        [b"a: b\r\n"] * 20_000,
        [b"a:\r\n" * 8_000],
    ],
    ids=["one line", "no end", "many lines", "short lines", "empty lines"],
)
def test_a_huge_header_is_refused(service: Running, parts: list[bytes]) -> None:
    answer = raw(service, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n", *parts)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")  # closed before the answer was read, or with it
    assert service.request("GET", "/healthz").status == 200


def test_a_huge_url_is_refused(service: Running) -> None:
    answer = raw(service, b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")


_CHUNKED = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_a_body_in_chunks_of_one_byte(service: Running) -> None:
    chunks = b"".join(b"1\r\n" + bytes([byte]) + b"\r\n" for byte in encoded(1))
    assert len(chunks) > 6 * 2000
    assert b'"label"' in raw(service, _CHUNKED.replace(b"Host", b"Connection: close\r\nHost"), chunks + b"0\r\n\r\n")


@pytest.mark.parametrize(
    "parts",
    [[b"X: " + b"a" * 20_000 + b"\r\n"] * 20, [b"X: " + b"a" * 20_000, *[b"a" * 20_000] * 20]],
    ids=["many lines", "no end"],
)
def test_what_follows_a_body_has_a_limit(service: Running, parts: list[bytes]) -> None:
    """Trailers, which nobody reads."""
    answer = raw(service, _CHUNKED, b"3\r\nabc\r\n0\r\n", *parts)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert service.request("GET", "/healthz").status == 200


@pytest.mark.parametrize("together", [False, True])
def test_a_request_for_another_protocol_is_answered_in_this_one(service: Running, together: bool) -> None:
    """As Java's client sends by default."""
    more = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
    image, last = encoded(1), b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(image)}\r\n{more}\r\n".encode()
    parts = [head + image + last] if together else [head[:100], head[100:], image[:50], image[50:], last]
    answers = raw(service, *parts, pause=0.02)
    assert answers.count(b"HTTP/1.1 200") == 2
    assert b'"label"' in answers


@pytest.mark.parametrize("start", [b"CONNECT localhost:80", b"OPTIONS *", b"GET http://localhost", b"PRI *"])
def test_unusual_targets(service: Running, start: bytes) -> None:
    answer = raw(service, start + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 4"))


def test_a_request_for_another_protocol_may_ask_to_close(service: Running) -> None:
    start, more = time.perf_counter(), b"Host: localhost\r\nConnection: close, Upgrade\r\nUpgrade: h2c\r\n\r\n"
    assert b"200" in raw(service, b"GET /healthz HTTP/1.1\r\n" + more)
    assert b"200" in raw(
        service, b"GET /healthz HTTP/1.0\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n" + more[:17] + b"\r\n"
    )
    assert time.perf_counter() - start < 3


def test_a_client_that_does_not_read_is_given_up() -> None:
    """Also where little is unsent."""
    with running(CLASSIFIER, request_timeout=0.5, keep_alive=1) as service, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", service.port))
        while True:
            connection.sendall(b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n")
            time.sleep(0.005)
            (protocol,) = service.server.server_state.connections
            if unsent := protocol.transport.get_write_buffer_size():
                break
        assert unsent < 64 << 10  # at which writing pauses by default
        deadline = time.monotonic() + 10
        while service.server.server_state.connections and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not service.server.server_state.connections


def test_a_body_that_was_not_read_ends_the_connection() -> None:
    """What follows would be taken for it."""
    with running(CLASSIFIER, token="abc") as service:
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 400\r\n\r\n"
        answer = raw(service, head, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", pause=0.1)
        assert answer.startswith(b"HTTP/1.1 401")
        assert answer.lower().count(b"connection: close") == 1


@pytest.mark.parametrize("target", [b"http://localhost", b"http://localhost?x=1"])
def test_an_absolute_target_without_a_path(service: Running, target: bytes) -> None:
    assert b"200 OK" in raw(service, b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")


def test_a_long_content_type_is_refused(service: Running) -> None:
    assert service.request("POST", "/predict", b"x", Content_Type="multipart/form-data; " + 2000 * ";").status == 400


def test_requests_that_are_sent_ahead(service: Running) -> None:
    """A few are answered in order; thousands are not even parsed."""
    one = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = one.replace(b"Host", b"Connection: close\r\nHost")
    assert raw(service, one * 4 + last).count(b"HTTP/1.1 200") == 5
    assert raw(service, one * 5000).count(b"HTTP/1.1 200") < 50
    assert service.request("GET", "/healthz").status == 200


def test_what_is_no_http(service: Running) -> None:
    assert raw(service, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_more_connections_than_allowed_are_closed() -> None:
    with running(CLASSIFIER, max_connections=3) as service:
        held = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(3)]
        time.sleep(0.1)
        assert raw(service, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n") == b""
        for connection in held:
            connection.close()
        time.sleep(0.1)
        assert service.request("GET", "/healthz").status == 200


def test_a_token() -> None:
    with running(CLASSIFIER, token="secret") as service:
        assert service.request("GET", "/labels").status == 401
        assert service.request("GET", "/labels", Authorization="Bearer wrong").status == 401
        assert service.request("GET", "/labels", Authorization="Basic secret").status == 401
        assert service.request("GET", "/labels", Authorization="Bearer secret").status == 200
        assert service.predict(encoded()).headers["www-authenticate"] == "Bearer"
        for path in ("/", "/healthz", "/readyz", "/v2/health/live"):
            assert service.request("GET", path).status == 200


def test_other_pages_may_not_call(service: Running) -> None:
    """Neither by another origin, nor by a name that is made to point to this machine."""
    foreign = service.request("POST", "/predict", encoded(), Origin="https://evil.example", Content_Type="image/png")
    assert foreign.status == 403
    assert "access-control-allow-origin" not in foreign.headers
    own = f"127.0.0.1:{service.port}"
    assert service.request("GET", "/labels", Origin=f"http://{own}", Host=own).status == 200
    assert service.request("GET", "/labels", Host=f"evil.example:{service.port}").status == 403


def test_an_origin_that_is_allowed() -> None:
    origin = "https://shop.example"
    with running(CLASSIFIER, origins=(origin,)) as service:
        answer = service.request("POST", "/predict", encoded(), Origin=origin, Content_Type="image/png")
        assert answer.status == 200
        assert answer.headers["access-control-allow-origin"] == origin
        preflight = service.request("OPTIONS", "/predict", Origin=origin, Access_Control_Request_Method="POST")
        assert preflight.status == 204
        assert "POST" in preflight.headers["access-control-allow-methods"]
        assert service.request("OPTIONS", "/predict", Origin="https://other.example").status == 403


def test_the_access_log_is_one_json_object_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    with running(CLASSIFIER) as service:
        object.__setattr__(service.guard._settings, "access_log", True)
        service.request("GET", "/labels")
        service.request("GET", "/none%0a%1b[31m")
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [(line["path"], line["status"]) for line in lines] == [("/labels", 200), ("/none\\n\\x1b[31m", 404)]


def test_a_stop_answers_what_was_accepted() -> None:
    """Requests whose images are being computed, and one whose body is still being sent."""
    answers: list[int] = []
    data = encoded()
    with running(CLASSIFIER) as service:
        head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
        head += f"Content-Length: {len(data)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", service.port), 10) as connection:
            connection.sendall(head.encode() + data[:20])
            threads = [threading.Thread(target=lambda: answers.append(service.predict(data).status)) for _ in range(16)]
            for thread in threads:
                thread.start()
            time.sleep(0.1)
            start = time.perf_counter()
            service.server.should_exit = True
            time.sleep(0.5)
            connection.sendall(data[20:])
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            for thread in threads:
                thread.join()
    assert answers == [200] * 16
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    "options", [{"port": 70000}, {"workers": 0}, {"token": ""}, {"token": "a\nb"}, {"origins": ("example.org",)}]
)
def test_settings_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        ServeSettings(**options)  # type: ignore[arg-type]


def test_an_empty_token_in_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VITRAIL_TOKEN", "")
    with pytest.raises(SystemExit) as caught:
        main(["serve", "exports/photos"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: the token must be printable ASCII and not empty\n"


def test_several_workers_need_a_folder() -> None:
    with pytest.raises(ConfigError, match="folder"):
        serve(CLASSIFIER, workers=2)


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(DeviceError, match="in use"):
            bind(ServeSettings(port=taken.getsockname()[1]))


def test_a_model_without_classes() -> None:
    clf = small_classifier()
    clf.model.reset_classifier(0)
    clf.class_names = ()
    with pytest.raises(ModelError, match="no classes"), running(clf):
        pass


def test_names_of_models() -> None:
    assert model_name("hf:timm/vit_tiny") == "vit_tiny"
    assert model_name(None) == "model"
    assert model_name("a b/c?d") == "c-d"
