import contextlib
import dataclasses
import errno
import hashlib
import io
import os
import threading
import time
import urllib.request
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data.serving import serving
from data.test_catalog import cifar_files, tar
from vitrail.data.catalog import DATASETS, DatasetFile, open_dataset
from vitrail.errors import DownloadError
from vitrail.utils import download as module
from vitrail.utils.download import cache_dir, fetch

CONTENT = os.urandom(700_001)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT. `cuts`: lengths after which the next connections break. `requests`: the Range headers seen."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.cuts, self.requests, self.delay = CONTENT, True, [], [], 0.0
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append(self.headers.get("Range"))
        time.sleep(server.delay)
        if self.path != "/data.bin":
            return self.send_error(404, "Not Found")
        start = 0
        if server.ranges and (wanted := self.headers.get("Range")):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(server.content):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        else:
            self.send_response(200)
        body = server.content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 10_000)
    monkeypatch.setattr(module, "_PAUSE", 0.001)
    with serving(Server()) as server:
        yield server


def left(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_download(server, tmp_path):
    seen = []
    path = tmp_path / "deep" / "data.bin"
    got = fetch(f"{server.url}/data.bin", path, sha256=SHA256, md5=MD5, progress=lambda *x: seen.append(x))
    assert got == path
    assert path.read_bytes() == CONTENT
    assert left(path.parent) == ["data.bin"]
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    fetch("http://127.0.0.1:9/unused", path, sha256=SHA256)  # there already: nothing is asked for
    assert len(server.requests) == 1


def test_a_cut_connection_is_taken_up_where_it_broke(server, tmp_path):
    server.cuts = [123_456, 200_000]
    fetch(f"{server.url}/data.bin", tmp_path / "x", sha256=SHA256)
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=123456-", "bytes=323456-"]


def test_what_an_earlier_run_left_is_used(server, tmp_path):
    server.cuts = [100_000] * 4
    with pytest.raises(DownloadError, match="400,000 bytes are kept") as error:
        fetch(f"{server.url}/data.bin", tmp_path / "x", md5=MD5)
    assert "\n" not in str(error.value)
    assert left(tmp_path) == ["x.part"]
    fetch(f"{server.url}/data.bin", tmp_path / "x", md5=MD5)
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.requests[-1] == "bytes=400000-"


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.ranges, server.cuts = False, [123_456]
    fetch(f"{server.url}/data.bin", tmp_path / "x", sha256=SHA256)
    assert (tmp_path / "x").read_bytes() == CONTENT


@pytest.mark.parametrize("leftover", [b"of another file", CONTENT, CONTENT + b"too much"])
def test_a_leftover_that_is_wrong_is_thrown_away(leftover, server, tmp_path):
    (tmp_path / "x.part").write_bytes(leftover)
    fetch(f"{server.url}/data.bin", tmp_path / "x", sha256=SHA256)
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert left(tmp_path) == ["x"]


def test_bad_checksum(server, tmp_path):
    server.content = CONTENT[:-1] + b"!"
    for checksum in ({"sha256": SHA256}, {"md5": MD5}):
        with pytest.raises(DownloadError, match="checksum") as error:
            fetch(f"{server.url}/data.bin", tmp_path / "x", **checksum)
        assert "\n" not in str(error.value)
        assert left(tmp_path) == []
    with pytest.raises(ValueError, match="checksum"):
        fetch(f"{server.url}/data.bin", tmp_path / "x")


def test_mirrors(server, tmp_path):
    fetch([f"{server.url}/gone", f"{server.url}/data.bin"], tmp_path / "x", sha256=SHA256)
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_not_found_and_offline(server, tmp_path, monkeypatch):
    with pytest.raises(DownloadError, match="404") as error:
        fetch(f"{server.url}/gone", tmp_path / "x", sha256=SHA256)
    assert "\n" not in str(error.value)
    assert error.value.status == 404
    pauses = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    with pytest.raises(DownloadError, match=r"data\.bin") as error:
        fetch("http://127.0.0.1:9/data.bin", tmp_path / "x", sha256=SHA256)
    assert pauses == [], "no second attempt without a connection"
    assert "\n" not in str(error.value)
    for url in ("file:///etc/hostname", "ftp://127.0.0.1/x"):
        with pytest.raises(DownloadError, match="http"):
            fetch(url, tmp_path / "x", sha256=SHA256)
    assert left(tmp_path) == []


def test_full_disk_leaves_nothing(server, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "x.part").write_bytes(CONTENT[:5000])
    monkeypatch.setattr(module._Download, "_copy", full)
    with pytest.raises(DownloadError, match=r"No space left .*VITRAIL_CACHE"):
        fetch(f"{server.url}/data.bin", tmp_path / "x", sha256=SHA256)
    assert left(tmp_path) == []


def test_a_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DownloadError, match="cannot write"):
        fetch(f"{server.url}/data.bin", tmp_path / "file" / "x", sha256=SHA256)


def test_two_at_once_download_once(server, tmp_path):
    server.delay = 0.2
    threads = [
        threading.Thread(target=fetch, args=(f"{server.url}/data.bin", tmp_path / "x"), kwargs={"sha256": SHA256})
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_a_dataset_is_downloaded_once_into_the_cache(server, tmp_path, monkeypatch):
    row = DATASETS["cifar10"]
    files, _, _ = cifar_files("cifar10")
    tar(tmp_path / "served.tar.gz", files)
    server.content = (tmp_path / "served.tar.gz").read_bytes()
    file = DatasetFile(
        name=row.files[0].name,
        urls=(f"{server.url}/data.bin",),
        md5=hashlib.md5(server.content).hexdigest(),
        sha256=hashlib.sha256(server.content).hexdigest(),
    )
    monkeypatch.setitem(DATASETS, "cifar10", dataclasses.replace(row, files=(file,)))
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    server.cuts = [50_000]
    for _ in range(2):
        assert open_dataset("cifar10").counts() == {"train": 90, "val": 10, "test": 20}
    assert server.requests == [None, "bytes=50000-"]
    assert left(tmp_path / "cache" / "cifar10") == ["cifar-10-binary.tar.gz"]
    server.content = server.content[:-1] + b"!"
    (tmp_path / "cache" / "cifar10" / "cifar-10-binary.tar.gz").unlink()
    with pytest.raises(DownloadError, match="checksum"):
        open_dataset("cifar10")


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("VITRAIL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(cache_dir()) == "/xdg/vitrail"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(cache_dir()) == "/home/someone/.cache/vitrail"


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1", "http://", "http:///x", "http://127.0.0.1:port/x", "http://127.0.0.1:99999/x", "http://a b/x",
        "http://127.0.0.1/\r\nHost: evil", "http://127.0.0.1/\x1b[2J", "https://ex\u00e4mple/x", "nonsense", "",
        "http://" + "a" * 70 + ".example/x", "http://127.0.0.1:0/x",
    ],
)  # fmt: skip
def test_a_broken_url_is_one_line(url, tmp_path):
    with pytest.raises(DownloadError) as error:
        fetch(url, tmp_path / "x", sha256=SHA256)
    assert str(error.value).isprintable()
    assert left(tmp_path) == []


class Odd(BaseHTTPRequestHandler):
    """Answers with the status, headers and body of its server; `drip`: seconds between the bytes of the body."""

    def do_GET(self):
        self.send_response_only(*self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            for byte in self.server.body:
                self.wfile.write(bytes([byte]) * self.server.times)
                time.sleep(self.server.drip)

    def log_message(self, *args):
        pass


@pytest.fixture
def odd(monkeypatch):
    monkeypatch.setattr(module, "_PAUSE", 0.001)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    server.daemon_threads = True
    server.status, server.headers, server.body, server.times, server.drip = (200, "OK"), {}, b"x" * 10, 1, 0.0
    with serving(server) as server:
        server.url = f"http://127.0.0.1:{server.server_port}/x"
        yield server


@pytest.mark.parametrize("length", ["abc", "-5", "1e3", "9" * 400, "\u0663"])
def test_a_length_that_is_no_number(length, odd, tmp_path):
    odd.headers = {"Content-Length": length.encode().decode("latin-1")}
    digest = hashlib.sha256(odd.body).hexdigest()
    with contextlib.suppress(DownloadError):  # http.client may refuse it
        assert fetch(odd.url, tmp_path / "x", sha256=digest).read_bytes() == odd.body


def test_more_bytes_than_allowed_are_refused_before_the_checksum(odd, tmp_path):
    odd.times = 1000
    with pytest.raises(DownloadError, match="more than 500 bytes"):  # no length is announced
        fetch(odd.url, tmp_path / "x", sha256=SHA256, max_bytes=500)
    odd.headers = {"Content-Length": str(1 << 40)}
    with pytest.raises(DownloadError, match="more than 17,179,869,184 bytes"):
        fetch(odd.url, tmp_path / "x", sha256=SHA256)
    assert all(path.stat().st_size == 0 for path in tmp_path.glob("x*"))


def test_a_server_that_drips_is_left(odd, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MAX_SECONDS", 0.5)
    odd.body, odd.drip = b"x" * 10_000, 0.02
    started = time.monotonic()
    with pytest.raises(DownloadError, match="too slow"):
        fetch(odd.url, tmp_path / "x", sha256=SHA256)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x", "gopher://x", "//[broken"])
def test_a_redirect_to_another_scheme_is_not_followed(target, odd, tmp_path):
    odd.status, odd.headers, odd.body = (302, "Found"), {"Location": target, "Content-Length": "0"}, b""
    with pytest.raises(DownloadError) as error:
        fetch(odd.url, tmp_path / "x", sha256=SHA256)
    assert str(error.value).isprintable()


def test_a_redirect_from_https_to_http_is_not_followed():
    request, headers = urllib.request.Request("https://127.0.0.1/x"), Message()
    headers["Location"] = "http://127.0.0.1/x"
    for code in (301, 302, 303, 307, 308):
        with pytest.raises(DownloadError, match="redirects to http://"):
            getattr(module._Redirects(), f"http_error_{code}")(request, io.BytesIO(), code, "Found", headers)


def test_a_redirect_within_http_is_followed(odd, server, tmp_path):
    odd.status, odd.headers, odd.body = (302, "Found"), {"Location": f"{server.url}/data.bin"}, b""
    assert fetch(odd.url, tmp_path / "x", sha256=SHA256).read_bytes() == CONTENT


def test_a_reason_with_escape_sequences_is_printed_plainly(odd, tmp_path):
    odd.status = (404, "\x1b[31mgone\x07")
    with pytest.raises(DownloadError, match="HTTP 404") as error:
        fetch(odd.url, tmp_path / "x", sha256=SHA256)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("digits", [1, 8, 15])
def test_a_checksum_of_few_digits_is_refused(digits, server, tmp_path):
    with pytest.raises(DownloadError, match="too few digits: give at least 16"):
        fetch(f"{server.url}/data.bin", tmp_path / "x", sha256=SHA256[:digits])
    for url in ("http://download.pytorch.org/x", "https://download.pytorch.org.evil.example/x"):
        with pytest.raises(DownloadError, match="too few digits: give at least 16"):
            fetch(url, tmp_path / "x", sha256=SHA256[:digits])
    assert server.requests == []
    fetch(f"{server.url}/data.bin", tmp_path / "x", sha256=SHA256[:16])


def test_eight_digits_are_enough_from_the_host_that_publishes_no_more():
    module._check_url("https://download.pytorch.org/models/vit_b_16-c867db91.pth", {"sha256": "c867db91"})
    with pytest.raises(DownloadError, match="at least 8"):
        module._check_url("https://download.pytorch.org/models/vit_b_16-c867db91.pth", {"sha256": "c867db9"})
