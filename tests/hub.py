"""A Hugging Face Hub on this machine: as much of it as huggingface_hub needs to list a model repository and download
from it. Files are sent the way the Hub sends large ones, by a redirect to another host."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "5a18a8761e45587e1c06cee58a33c1c1e51f5d4b"


class Hub:
    """files: what the repository holds. status: what every request is answered with, if not 200.
    asked: the requests about the repository so far."""

    def __init__(self, repository: str, home: Path) -> None:
        self.repository, self.home = repository, home
        self.files: dict[str, bytes] = {}
        self.listed: list[str] = []  # in the listing, and not there when asked for
        self.status = 200
        self.asked: list[str] = []
        self.port = 0

    @property
    def offline(self) -> dict[str, str]:
        """The environment of a command that may not ask, with the same cache."""
        return {**self.environment, "HF_HUB_OFFLINE": "1"}

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a command that asks this Hub, with a cache of its own."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        place = {"HF_ENDPOINT": f"http://127.0.0.1:{self.port}", "HF_HOME": str(self.home), "HF_HUB_OFFLINE": "0"}
        return {**kept, **place, "NO_PROXY": "127.0.0.1,localhost"}

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer."""
        if self.repository in path:
            self.asked.append(f"{method} {path}")
        stored = {f"/store/{hashlib.sha256(body).hexdigest()}": body for body in self.files.values()}
        if self.status != 200:
            return self.status, {}, b"not now"
        if path == f"/api/models/{self.repository}":
            siblings = [{"rfilename": name} for name in ("README.md", *self.files, *self.listed)]
            return 200, {}, json.dumps({"id": self.repository, "sha": COMMIT, "siblings": siblings}).encode()
        if path in stored:
            return 200, {}, stored[path]
        name = path.removeprefix(f"/{self.repository}/resolve/main/")
        if name not in self.files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"Entry not found"
        digest = hashlib.sha256(self.files[name]).hexdigest()
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(self.files[name]))}
        return 302, {"Location": f"http://localhost:{self.port}/store/{digest}", "X-Repo-Commit": COMMIT, **linked}, b""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """`hub`, answering on a port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.command, self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
