"""A small Hub on this machine: the download half of the protocol, spoken to the real, unpatched client.

It proves which files are asked for, at which revision, and what our errors say; it knows nothing of the real
Hub's storage, quotas or sign-in. The client reads its endpoint when it is imported, so it runs in a process
of its own with `HubServer.environment`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit


@dataclass
class HubServer:
    """Repositories by id, each a folder with one commit on `main`."""

    repositories: dict[str, Path]
    gated: frozenset[str] = frozenset()
    requests: list[str] = field(default_factory=list)  # "METHOD path", in order
    endpoint: str = ""

    def commit(self, name: str) -> str:
        return hashlib.sha1(name.encode()).hexdigest()

    def environment(self, home: Path) -> dict[str, str]:
        """What the client's process needs to talk to this server, and to nothing else."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for one request."""
        self.requests.append(f"{method} {path}")
        api = path.startswith("/api/models/")
        owner, _, rest = path.removeprefix("/api/models/").removeprefix("/").partition("/")
        repository, _, rest = rest.partition("/")
        name = f"{owner}/{repository}"
        if name not in self.repositories:
            return _error(404, "RepoNotFound")
        if name in self.gated and not api:
            return _error(403, "GatedRepo")
        action, _, rest = rest.partition("/")
        revision, _, file = rest.partition("/")
        if revision not in ("", "main", self.commit(name)):
            return _error(404, "RevisionNotFound")
        if not api and action == "resolve":
            return self._file(name, file)
        if api and action in ("", "revision"):
            siblings = [{"rfilename": path.name} for path in self._files(name)]
            return _json({"id": name, "sha": self.commit(name), "siblings": siblings})
        if api and action == "tree":
            return _json(
                [
                    {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": _etag(path)}
                    for path in self._files(name)
                ]
            )
        return _error(404, "EntryNotFound")

    def _files(self, name: str) -> list[Path]:
        return sorted(self.repositories[name].iterdir())

    def _file(self, name: str, file: str) -> tuple[int, dict[str, str], bytes]:
        path = self.repositories[name] / file
        if not path.is_file():
            status, headers, body = _error(404, "EntryNotFound")
            return status, headers | {"X-Repo-Commit": self.commit(name)}, body
        return 200, {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": self.commit(name)}, path.read_bytes()


@contextmanager
def serve(repositories: dict[str, Path], gated: frozenset[str] = frozenset()) -> Iterator[HubServer]:
    """Run a HubServer on a free port until the block ends."""
    hub = HubServer(repositories, gated)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def log_message(self, *_: object) -> None:
            """Stay silent; `requests` keeps the log."""

        def _answer(self) -> None:
            status, headers, body = hub.answer(self.command, unquote(urlsplit(self.path).path))
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":  # a body on HEAD would be read as the next answer
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _json(content: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _error(status: int, code: str) -> tuple[int, dict[str, str], bytes]:
    return status, {"X-Error-Code": code, "X-Error-Message": code}, b""
