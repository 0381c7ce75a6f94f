"""Enough of the hub's API, on loopback, for snapshot_download and upload_folder of a data set; it can fail on purpose.

With HF_ENDPOINT set to its address, huggingface_hub requests the commit of a revision, the tree of that commit, and
then HEAD and GET of each file, the latter with Range after a broken connection. To upload without Xet, it requests the
user's name, creates the repository, asks which files go through LFS, PUTs those, and sends one commit as JSON lines.
"""

import base64
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

import yaml

TOKEN, USER = "hf_writes", "me"
"""The token that may write, and the namespace that it may write to."""
CUT = "hf_cut"
"""A token whose requests get no response: the connection is closed."""
UPLOAD = re.compile(r"/api/datasets/(?P<repo>[^/]+/[^/]+)/(?P<what>preupload|commit)/main")
API = re.compile(r"/api/datasets/(?P<repo>[^/]+/[^/]+)(/(?P<what>revision|tree)/(?P<revision>.+))?")
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
    private: bool = False

    def __post_init__(self) -> None:
        digest = sha1(repr(sorted((path, sha1(data).hexdigest()) for path, data in self.files.items())).encode())
        self.commit = digest.hexdigest()
        self.branches.setdefault("main", self.commit)


class Hub:
    """`with Hub({"owner/name": Repo(files)}) as hub` serves at `hub.url` and records requests in `hub.requests`."""

    def __init__(self, repos: dict[str, Repo]) -> None:
        self.repos = repos
        self.requests: list[Request] = []
        self.stored: dict[str, bytes] = {}
        # By path, for the next GETs: after how many bytes the connection is closed, or reset.
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
        """The files whose bytes were requested, each once, sorted by name."""
        found = (RESOLVE.fullmatch(request.path) for request in self.requests if request.method == "GET")
        return sorted({match["path"] for match in found if match})


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Otherwise each response takes 40 ms: the body waits for the acknowledgement of the headers.
        disable_nagle_algorithm = True

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
                    self.send_json(_tree(repo) if match["what"] == "tree" else _info(match["repo"], repo, commit))
            elif path == "/api/whoami-v2":
                if self.may_write(USER):
                    self.send_json({"type": "user", "name": USER, "orgs": []})
            else:
                self.refuse(404, "EntryNotFound")

        def do_PUT(self) -> None:
            data = self.body()
            hub.stored[sha256(data).hexdigest()] = data
            self.send_json({})

        def do_POST(self) -> None:
            path, body = unquote(urlsplit(self.path).path), self.body()
            hub.requests.append(Request(self.command, path, None))
            if path == "/api/validate-yaml":
                self.send_json({"errors": [], "warnings": []})
            elif path == "/api/repos/create":
                self.create(json.loads(body))
            elif path.endswith("/info/lfs/objects/batch"):
                self.send_json({"objects": [self.lfs(one) for one in json.loads(body)["objects"]]})
            elif (match := UPLOAD.fullmatch(path)) and self.may_write(match["repo"].split("/")[0]):
                if match["what"] == "preupload":
                    self.send_json({"files": [_mode(file["path"]) for file in json.loads(body)["files"]]})
                else:
                    self.change(match["repo"], [json.loads(line) for line in body.splitlines()])

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers["Content-Length"]))

        def may_write(self, owner: str) -> bool:
            token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
            if token == CUT:
                self.hang_up()
            elif token != TOKEN:
                self.refuse(401, "")
            elif owner != USER:
                self.refuse(403, "")
            else:
                return True
            return False

        def create(self, wanted: dict) -> None:
            name = f"{wanted['organization'] or USER}/{wanted['name']}"
            if name in hub.repos:
                self.send_json({"url": f"{hub.url}/datasets/{name}"}, 409)
            elif self.may_write(name.split("/")[0]):
                hub.repos[name] = Repo({".gitattributes": b"* lfs"}, private=wanted.get("visibility") == "private")
                self.send_json({"url": f"{hub.url}/datasets/{name}"})

        def lfs(self, one: dict) -> dict:
            return one | {"actions": {"upload": {"href": f"{hub.url}/put/{one['oid']}", "header": {}}}}

        def change(self, name: str, lines: list[dict]) -> None:
            files = dict(hub.repos[name].files)
            for line in lines:
                path = line["value"].get("path", "")
                if line["key"] == "file":
                    files[path] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    files[path] = hub.stored[line["value"]["oid"]]
                elif line["key"] == "deletedFile":
                    del files[path]
            repo = hub.repos[name] = Repo(files, private=hub.repos[name].private)
            url = f"{hub.url}/datasets/{name}/commit/{repo.commit}"
            self.send_json({"commitUrl": url, "commitOid": repo.commit, "commitMessage": "", "hookOutput": ""})

        def repo(self, name: str) -> Repo | None:
            repo = hub.repos.get(name)
            if repo is None:
                # The hub does not reveal whether a repository is missing or private.
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

        def send_json(self, content: object, status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
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


def _mode(path: str) -> dict[str, object]:
    return {"path": path, "uploadMode": "lfs" if path.endswith(".parquet") else "regular", "shouldIgnore": False}


def _info(name: str, repo: Repo, commit: str) -> dict[str, object]:
    return {
        "id": name,
        "sha": commit,
        "private": repo.private,
        "siblings": [{"rfilename": path} for path in repo.files],
        "cardData": _card(repo.files.get("README.md", b"").decode()),
    }


def _card(readme: str) -> object:
    head = readme.split("---\n")
    return yaml.safe_load(head[1]) if len(head) > 2 else None


def _tree(repo: Repo) -> list[dict[str, object]]:
    return [
        {"type": "file", "path": path, "size": len(data), "oid": sha1(data).hexdigest()}
        for path, data in repo.files.items()
    ]
