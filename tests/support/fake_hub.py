"""A hub of models on this computer: the few HTTP answers that downloading and uploading an adapter need."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """Serves `files`, `{(repository, revision, path): bytes}`, to those who may see them, and takes commits.

    Attributes:
        files: what can be downloaded.
        private: repository -> the token that opens it.
        seen: `(method, path, token or None)` of every request.
        committed: path -> content of what was uploaded.
    """

    def __init__(self) -> None:
        self.files: dict[tuple[str, str, str], bytes] = {}
        self.private: dict[str, str] = {}
        self.seen: list[tuple[str, str, str | None]] = []
        self.committed: dict[str, bytes] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        token = self._note()
        repository, found, rest = self.path.strip("/").partition("/resolve/")
        revision, _, path = rest.partition("/")
        if not found:
            return self._answer(404, {"X-Error-Code": "RepoNotFound"})
        known = {name for name, *_ in self.hub.files}
        if repository not in known or self.hub.private.get(repository) not in (None, token):
            return self._answer(
                401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."}
            )
        if not any((repository, revision) == key[:2] for key in self.hub.files):
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        commit = {"X-Repo-Commit": hashlib.sha1(revision.encode()).hexdigest()}
        content = self.hub.files.get((repository, revision, path))
        if content is None:
            return self._answer(404, {"X-Error-Code": "EntryNotFound"} | commit)
        return self._answer(200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'} | commit, content)

    def do_POST(self) -> None:
        token = self._note()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if token is None:
            return self._answer(401, {"X-Error-Message": "Invalid username or password."})
        if self.path == "/api/repos/create":
            return self._json({"url": f"{self.hub.url}/me/{json.loads(body)['name']}"})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self._json(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        if "/commit/" in self.path:
            rows = [json.loads(line) for line in body.splitlines()]
            files = {row["value"]["path"]: row["value"]["content"] for row in rows if row["key"] == "file"}
            self.hub.committed |= {path: base64.b64decode(content) for path, content in files.items()}
            oid = hashlib.sha1(body).hexdigest()
            return self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/me/x/commit/{oid}"})
        return self._json({"errors": [], "warnings": []})  # the check of a card's front matter

    def _note(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.seen.append((self.command, self.path, token))
        return token

    def _json(self, content: dict) -> None:
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def _answer(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass
