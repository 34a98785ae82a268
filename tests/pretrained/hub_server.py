"""A hub in the test: the few addresses that huggingface_hub asks for a download, on localhost."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"
OTHERS = ("clip", "taesd")  # networks beside the reference model that no Stable Diffusion has


@dataclass
class Hub:
    """What the server holds, and what it was asked.

    Attributes:
        files: the files of every repository in `repos`: name -> content.
        repos: those that are there.
        refused: repository -> status and X-Error-Code of every answer about it.
        asked: (method, path) of every request, in order.
        posted: JSON bodies of POST requests, in order.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    repos: set[str] = field(default_factory=lambda: {"owner/tiny-sd"})
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    posted: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def downloads(self) -> set[str]:
        """Names of the files whose content was asked for."""
        start = f"/resolve/{SHA}/"
        return {p.split(start)[1] for m, p in self.asked if m == "GET" and start in p}

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body for a path."""
        api = path.removeprefix("/api/models/")
        repo = "/".join(api.strip("/").split("/")[:2])
        if repo in self.refused:
            status, code = self.refused[repo]
            return status, {"X-Error-Code": code, "X-Error-Message": code}, b"{}"
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        rest = api.strip("/").split("/", 2)[2:]
        kind, _, tail = (rest[0] if rest else "").partition("/")
        revision, _, name = tail.partition("/")
        if kind and revision not in ("main", SHA):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if kind == "resolve":
            return self._file(name)
        names = sorted(self.files)
        if kind == "tree":
            entries = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(self.files[name]),
                    "oid": hashlib.sha1(self.files[name]).hexdigest(),
                }
                for name in names
            ]
            return 200, {}, json.dumps(entries).encode()
        info = {"id": repo, "sha": SHA, "siblings": [{"rfilename": name} for name in names]}
        return 200, {}, json.dumps(info).encode()

    def _file(self, name: str) -> tuple[int, dict[str, str], bytes]:
        if name not in self.files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        content = self.files[name]
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return 200, {"ETag": etag, "X-Repo-Commit": SHA}, content


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` at `hub.url` while the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((self.command, path))
            self._send(*hub.answer(path))

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self) -> None:
            hub.asked.append((self.command, self.path))
            length = int(self.headers.get("Content-Length", 0))
            hub.posted.append(json.loads(self.rfile.read(length)))
            repo = "{organization}/{name}".format(**hub.posted[-1])
            status = 409 if repo in hub.repos else 200
            body = {"url": f"{hub.url}/{repo}"} if status == 200 else {"error": "exists"}
            self._send(status, {}, json.dumps(body).encode())

        def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def model_files(folder: Path) -> dict[str, bytes]:
    """The files below `folder` of an ordinary model: relative name -> content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] not in OTHERS
    }
