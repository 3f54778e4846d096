"""A stand-in for the HF Hub's HTTP interface, on this machine, serving one repository.

with fake_hub(folder, "org/tiny", monkeypatch) as hub:
    fetch("org/tiny", models_dir=...)
    hub.requests                       # [("GET", "/api/models/org/tiny"), ...]
"""

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
from urllib.parse import unquote, urlparse

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(slots=True)
class FakeHub:
    """Files by name; those in `corrupt` are served with other bytes than their hashes say."""

    repo_id: str
    files: dict[str, bytes]
    corrupt: set[str] = field(default_factory=set)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def description(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        entry: dict[str, Any] = {"size": len(content), "blobId": git_blob(content)}
        if name.endswith(".safetensors"):
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"sha256": digest, "oid": digest, "size": len(content)}
            entry["lfs"]["pointerSize"] = 134
        return entry

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers for a path."""
        api, resolve = f"/api/models/{self.repo_id}", f"/{self.repo_id}/resolve/{COMMIT}/"
        if path.startswith(f"{api}/tree/"):
            rows = [
                {"type": "file", "path": n, "oid": git_blob(c), **self.description(n)}
                for n, c in self.files.items()
            ]
            return 200, json.dumps(rows).encode(), {"Content-Type": "application/json"}
        if path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": name, **self.description(name)} for name in self.files]
            body = {"id": self.repo_id, "sha": COMMIT, "siblings": siblings, "tags": []}
            return 200, json.dumps(body).encode(), {"Content-Type": "application/json"}
        name = path.removeprefix(resolve)
        if path.startswith(resolve) and name in self.files:
            content = self.files[name]
            entry = self.description(name)
            etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"]
            if name in self.corrupt:
                content = content[:-1] + bytes([content[-1] ^ 1])
            return 200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        return 404, b"{}", {}


def git_blob(content: bytes) -> str:
    """Git's object name of a file's content."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@contextmanager
def fake_hub(folder: Path, repo_id: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Serve `folder` as `repo_id`, and point the Hub library at it."""
    files = {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }
    hub = FakeHub(repo_id, files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self._respond(with_body=True)

        def do_HEAD(self) -> None:
            self._respond(with_body=False)

        def _respond(self, with_body: bool) -> None:
            path = unquote(urlparse(self.path).path)
            hub.requests.append((self.command, path))
            status, body, headers = hub.answer(path)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _point_hub_library_at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _point_hub_library_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants
    import huggingface_hub.file_download as file_download

    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
