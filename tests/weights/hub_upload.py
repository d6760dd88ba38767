"""The other half of the hub on localhost: making a repository and committing files to it, small ones in the commit and
large ones beforehand by Git LFS's protocol."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote

import yaml

from weights.hub_server import Hub, Repo, downloads, serving


@dataclass
class Uploads:
    """`tokens` says who may write; `commits` what was said of each commit; `stored` the large files by their sha256."""

    tokens: dict[str, bool] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    damage: bool = False  # the next large file arrives with a bit turned


@contextmanager
def receiving() -> Iterator[tuple[Hub, Uploads]]:
    uploads = Uploads()
    with serving(lambda hub: _handler(hub, uploads)) as hub:
        yield hub, uploads


def _handler(hub: Hub, uploads: Uploads) -> type[BaseHTTPRequestHandler]:
    class Handler(downloads(hub)):  # type: ignore[misc]
        def do_POST(self) -> None:
            self.receive()

        def do_PUT(self) -> None:
            self.receive()

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def reply(self, record: Any, status: int = 200) -> None:
            content = json.dumps(record).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def receive(self) -> None:
            path, _, query = self.path.partition("?")
            path, body = unquote(path), self.body()
            hub.requests.append(f"{self.command} {path}")
            if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
                return self.store(match[1], body)
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token not in uploads.tokens:
                return self.reply({"error": "Invalid credentials in Authorization header"}, 401)
            if not uploads.tokens[token]:
                return self.reply({"error": "You don't have the rights to do this"}, 403)
            if path == "/api/repos/create":
                return self.create(json.loads(body))
            if path == "/api/validate-yaml":
                return self.validate(json.loads(body)["content"])
            if path == "/verify":
                return self.verify(json.loads(body))
            if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
                return self.batch(json.loads(body))
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)", path):
                if match[1] not in hub.repos:
                    return self.refuse(404, "RepoNotFound")
                return getattr(self, match[2])(match[1], match[3], body, "create_pr=1" in query)
            return self.refuse(404, "EntryNotFound")

        def create(self, wanted: dict[str, Any]) -> None:
            name = f"{wanted.get('organization', 'me')}/{wanted['name']}"
            known = name in hub.repos
            if not known:
                private = bool(wanted.get("private") or wanted.get("visibility") == "private")
                hub.repos[name] = Repo({"0" * 40: {}}, {"main": "0" * 40}, private=private)
            self.reply({"url": f"{hub.url}/{name}", "id": name, "name": name}, 409 if known else 200)

        def validate(self, card: str) -> None:
            front = yaml.safe_load(card.split("---\n")[1])
            errors = [] if isinstance(front, dict) else [{"message": "the metadata is no mapping"}]
            self.reply({"errors": errors, "warnings": []}, 400 if errors else 200)

        def branch(self, name: str, revision: str, body: bytes, create_pr: bool) -> None:
            revisions = hub.repos[name].revisions
            known = revision in revisions
            revisions.setdefault(revision, revisions["main"])
            self.reply({}, 409 if known else 201)

        def preupload(self, name: str, revision: str, body: bytes, create_pr: bool) -> None:
            if revision not in hub.repos[name].revisions:
                return self.refuse(404, "RevisionNotFound")
            files = [
                {"path": f["path"], "shouldIgnore": False, "uploadMode": _mode(f["path"])}
                for f in json.loads(body)["files"]
            ]
            return self.reply({"files": files})

        def batch(self, wanted: dict[str, Any]) -> None:
            objects = []
            for entry in wanted["objects"]:
                actions = {"upload": {"href": f"{hub.url}/lfs/{entry['oid']}"}, "verify": {"href": f"{hub.url}/verify"}}
                objects.append(entry | ({} if entry["oid"] in uploads.stored else {"actions": actions}))
            self.reply({"transfer": "basic", "objects": objects})

        def store(self, oid: str, content: bytes) -> None:
            if uploads.damage:
                content = bytes([content[0] ^ 1]) + content[1:]
            if hashlib.sha256(content).hexdigest() != oid:
                return self.reply({"error": "the content does not have this checksum"}, 400)
            uploads.stored[oid] = content
            return self.reply({})

        def verify(self, wanted: dict[str, Any]) -> None:
            found = uploads.stored.get(wanted["oid"])
            self.reply({}, 200 if found is not None and len(found) == wanted["size"] else 404)

        def commit(self, name: str, revision: str, body: bytes, create_pr: bool) -> None:
            repo = hub.repos[name]
            files = dict(repo.commits[repo.revisions[revision]])
            for line in body.splitlines():
                entry = json.loads(line)
                match entry["key"], entry["value"]:
                    case "header", header:
                        uploads.commits.append({**header, "revision": revision, "create_pr": create_pr})
                    case "file", value:
                        files[value["path"]] = base64.b64decode(value["content"])
                    case "lfsFile", value:
                        files[value["path"]] = uploads.stored[value["oid"]]
            commit = hashlib.sha1(body).hexdigest()
            repo.commits[commit] = files
            repo.revisions["refs/pr/1" if create_pr else revision] = commit
            answer = {"commitUrl": f"{hub.url}/{name}/commit/{commit}", "commitOid": commit}
            self.reply(answer | ({"pullRequestUrl": f"{hub.url}/{name}/discussions/1"} if create_pr else {}))

    return Handler


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"
