"""Enough of the hub's API, on loopback, for snapshot_download of a data set; it can fail on purpose.

With HF_ENDPOINT set to its address, huggingface_hub asks for: the commit of a revision, the tree of that commit,
and then HEAD and GET of each file, the latter with Range when a connection broke.
"""

import json
import os
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/datasets/(?P<repo>[^/]+/[^/]+)(/(?P<what>revision|tree)/(?P<revision>[^/]+))?")
RESOLVE = re.compile(r"/datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None


@dataclass
class Repo:
    files: dict[str, bytes]
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    status: int = 200

    def __post_init__(self) -> None:
        digest = sha1(repr(sorted((path, sha1(data).hexdigest()) for path, data in self.files.items())).encode())
        self.commit = digest.hexdigest()
        self.branches.setdefault("main", self.commit)


class Hub:
    """`with Hub({"owner/name": Repo(files)}) as hub`; `hub.url`, and every request in `hub.requests`."""

    def __init__(self, repos: dict[str, Repo]) -> None:
        self.repos = repos
        self.requests: list[Request] = []
        # By path, for the GETs to come: after how many bytes the connection ends, or is reset.
        self.cut: dict[str, list[int]] = {}
        self.reset: dict[str, list[int]] = {}
        # By path: half of the file is sent, `stalled` is set, and the rest comes when `go_on` is set.
        self.stall: set[str] = set()
        self.stalled, self.go_on = threading.Event(), threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()

    def fetched(self) -> list[str]:
        """The files whose bytes were asked for, each once, in order of name."""
        found = (RESOLVE.fullmatch(request.path) for request in self.requests if request.method == "GET")
        return sorted({match["path"] for match in found if match})


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(Request(self.command, path, self.headers.get("Range")))
            if match := RESOLVE.fullmatch(path):
                if (repo := self.repo(match["repo"])) and self.commit(repo, match["revision"]):
                    self.send_file(repo, match["path"])
            elif match := API.fullmatch(path):
                if (repo := self.repo(match["repo"])) and (commit := self.commit(repo, match["revision"] or "main")):
                    self.send_json(_tree(repo) if match["what"] == "tree" else {"id": match["repo"], "sha": commit})
            else:
                self.refuse(404, "EntryNotFound")

        def repo(self, name: str) -> Repo | None:
            repo = hub.repos.get(name)
            if repo is None:
                # The hub does not tell a missing repository from one that is private.
                self.refuse(401, "RepoNotFound")
            elif repo.status != 200:
                self.refuse(repo.status, "")
                return None
            return repo

        def commit(self, repo: Repo, revision: str) -> str | None:
            commit = repo.branches.get(revision, revision)
            if commit != repo.commit:
                self.refuse(404, "RevisionNotFound")
                return None
            return commit

        def send_file(self, repo: Repo, path: str) -> None:
            if repo.gated:
                return self.refuse(403, "GatedRepo")
            if path not in repo.files:
                return self.refuse(404, "EntryNotFound")
            data = repo.files[path]
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if "Range" in self.headers else 0
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.send_header("ETag", f'"{sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", repo.commit)
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if self.command == "GET":
                self.send_body(path, data[start:])
            return None

        def send_body(self, path: str, data: bytes) -> None:
            if path in hub.stall:
                self.wfile.write(data[: len(data) // 2])
                hub.stalled.set()
                hub.go_on.wait()
                data = data[len(data) // 2 :]
            for faults, end in ((hub.cut, self.hang_up), (hub.reset, self.reset)):
                if faults.get(path):
                    self.wfile.write(data[: faults[path].pop(0)])
                    return end()
            self.wfile.write(data)
            return None

        def hang_up(self) -> None:
            self.close_connection = True

        def reset(self) -> None:
            # A linger of 0 seconds makes close send RST instead of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
            self.close_connection = True

        def send_json(self, content: object) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


def _tree(repo: Repo) -> list[dict[str, object]]:
    return [
        {"type": "file", "path": path, "size": len(data), "oid": sha1(data).hexdigest()}
        for path, data in repo.files.items()
    ]
