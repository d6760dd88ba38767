"""A server on localhost that speaks as much of the hub's protocol as downloading a model takes."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote


@dataclass
class Repo:
    """`revisions` maps branches and tags to commits, `commits` a commit to its files."""

    commits: dict[str, dict[str, bytes]]
    revisions: dict[str, str]
    gated: bool = False
    private: bool = False


@dataclass
class Hub:
    """What is served, and what was asked for. `cut`: the next so many downloads break off in the middle. `lie`: the
    checksum that is stated is not the content's."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    cut: int = 0
    lie: bool = False

    def add(self, name: str, files: dict[str, bytes], commit: str = "c" * 40, revision: str = "main") -> None:
        repo = self.repos.setdefault(name, Repo({}, {}))
        repo.commits[commit] = files
        repo.revisions[revision] = commit


def listed(name: str, content: bytes) -> dict[str, Any]:
    """An entry of a repository's list of files, with what the hub says of large ones when asked for `blobs`."""
    digest = hashlib.sha256(content).hexdigest()
    large = {"lfs": {"sha256": digest, "size": len(content), "pointerSize": 134}} if len(content) > 2000 else {}
    return {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest(), **large}


def downloads(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def answer(self, body: bool) -> None:
            path = unquote(self.path.partition("?")[0])
            hub.requests.append(f"{self.command} {path}")
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
                self.find(match[1], match[2], None, body)
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
                self.find(match[1], "main", None, body)
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.find(match[1], match[2], match[3], body)
            else:
                self.refuse(404, "RepoNotFound")

        def find(self, name: str, revision: str, file: str | None, body: bool) -> None:
            repo = hub.repos.get(name)
            if repo is None:
                return self.refuse(401, "RepoNotFound")
            if repo.gated:
                return self.refuse(403, "GatedRepo")
            commit = repo.revisions.get(revision, revision)
            if commit not in repo.commits:
                return self.refuse(404, "RevisionNotFound")
            files = repo.commits[commit]
            if file is None:
                info = {
                    "id": name,
                    "sha": commit,
                    "siblings": [listed(*item) for item in files.items()],
                    "cardData": {},
                }
                info["private"] = repo.private
                return self.send(json.dumps(info).encode(), commit, body, "application/json")
            if file not in files:
                return self.refuse(404, "EntryNotFound")
            return self.send(files[file], commit, body, "application/octet-stream")

        def send(self, content: bytes, commit: str, body: bool, kind: str) -> None:
            large = kind.endswith("octet-stream") and len(content) > 2000  # the hub keeps these in LFS
            stated = b"another file" if hub.lie and large else content
            tag = hashlib.sha256(stated).hexdigest() if large else hashlib.sha1(stated).hexdigest()
            wanted = self.headers.get("Range")
            if wanted:
                hub.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
            part = content[start:]
            self.send_response(206 if wanted else 200)
            self.send_header("ETag", f'"{tag}"')
            self.send_header("X-Repo-Commit", commit)
            if large:
                self.send_header("X-Linked-Etag", f'"{tag}"')
                self.send_header("X-Linked-Size", str(len(content)))
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if not body:
                return
            if large and hub.cut:
                hub.cut -= 1
                self.wfile.write(part[: len(part) // 2])
                self.wfile.flush()
                self.connection.close()
                self.close_connection = True
                return
            self.wfile.write(part)

    return Handler


@contextmanager
def serving(handler: Callable[[Hub], type[BaseHTTPRequestHandler]] = downloads) -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
