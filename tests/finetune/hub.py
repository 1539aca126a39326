"""A stand-in for the Hugging Face hub: a server in a thread that takes a repository and remembers what it was sent."""

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

TOKEN = "hf_secretsecret"
USER = "me"


class Hub(ThreadingHTTPServer):
    """Knows one user by one token, who may write to repositories of their own."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[str] = []
        self.stored: dict[str, bytes] = {}
        """Large files by their SHA-256."""
        self.committed: dict[str, bytes] = {}
        """The repository's files."""
        self.is_private = False
        self.breaks_uploads = False

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    do_PUT = do_POST

    def _answer(self, body: bytes) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        if self.path.startswith("/lfs/"):
            if self.server.breaks_uploads:
                return self._send(400, {"error": "no space"})
            self.server.stored[self.path.removeprefix("/lfs/")] = body
            return self._send(200, {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid credentials"})
        if "other" in self.path or b'"organization":"other"' in body.replace(b" ", b""):
            return self._send(403, {"error": "You don't have the rights"})
        return self._send(200, self._content(body))

    def _content(self, body: bytes) -> Any:
        endpoint = self.server.endpoint
        if self.path.startswith("/api/whoami"):
            return {"name": USER}
        if self.path == "/api/repos/create":
            return {"url": f"{endpoint}/{USER}/{json.loads(body)['name']}"}
        if self.path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if "/preupload/" in self.path:
            modes = {True: "lfs", False: "regular"}
            files = [file["path"] for file in json.loads(body)["files"]]
            told = [{"path": path, "shouldIgnore": False} for path in files]
            return {"files": [{**file, "uploadMode": modes[file["path"].endswith("safetensors")]} for file in told]}
        if self.path.endswith("/info/lfs/objects/batch"):
            return {"transfer": "basic", "objects": [self._upload_action(one) for one in json.loads(body)["objects"]]}
        if "/commit/" in self.path:
            self._commit([json.loads(line) for line in body.splitlines()])
            return {"success": True, "commitUrl": f"{endpoint}/{USER}/x/commit/1", "commitOid": "1" * 40}
        assert self.path.startswith("/api/models/"), self.path
        return {"id": self.path.removeprefix("/api/models/"), "private": self.server.is_private}

    def _upload_action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {**wanted, "actions": {"upload": {"href": f"{self.server.endpoint}/lfs/{wanted['oid']}"}}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.committed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.committed[value["path"]] = self.server.stored[value["oid"]]

    def _send(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process takes for Hugging Face's, with its user logged in."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # large files by plain HTTP
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
        hub.shutdown()
        thread.join()
