"""A Hub in memory behind real HTTP on loopback: the endpoints that huggingface_hub calls, and faults on request.

What they are called with was recorded from huggingface_hub 0.36 and 2.4, without Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "a" * 34
LARGE = (".safetensors", ".gguf", ".onnx", ".bin")
"""Suffixes of what goes to the file store."""

Files = dict[str, bytes]


@dataclass
class Fault:
    """What happens to the next requests of a kind, in the place of an answer."""

    method: str
    path: re.Pattern[str]
    times: int
    act: Callable[[Handler], None]


@dataclass
class Repo:
    """A repository: commits are whole trees."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Files, branch: str | None, message: str = "") -> str:
        text = repr((len(self.commits), sorted((name, blob_id(content)) for name, content in files.items())))
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = files
        self.messages.append(message)
        if branch is not None:
            self.branches[branch] = sha
        return sha

    def at(self, revision: str) -> str | None:
        found = self.branches.get(revision) or self.tags.get(revision)
        return found or (revision if revision in self.commits else None)

    @property
    def files(self) -> Files:
        return self.commits[self.branches["main"]]


class HubDouble:
    """The server and what it holds."""

    def __init__(self) -> None:
        self.users: dict[str, dict[str, Any]] = {TOKEN: user("me", role="write")}
        self.repos: dict[str, Repo] = {}
        self.stored: Files = {}
        self.requests: list[tuple[str, str]] = []
        self.bodies = b""
        self.faults: list[Fault] = []
        self.moments: dict[int, Callable[[Handler], None]] = {}
        """Number of a request → what happens in the place of an answer."""
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def add(self, name: str, files: Files, *, private: bool = False) -> Repo:
        """A repository with one commit."""
        self.repos[name] = Repo(private)
        self.repos[name].commit(files, "main")
        return self.repos[name]

    def fail(self, method: str, path: str, status: int, *, times: int = 1, message: str = "no", **headers: str) -> None:
        """Answer with an error."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(
            Fault(method, re.compile(path), times, lambda handler: handler.refuse(status, message, named))
        )

    def drop(self, method: str, path: str, *, times: int = 1) -> None:
        """Close the connection in the middle of the request."""
        self.faults.append(Fault(method, re.compile(path), times, Handler.hang_up))

    def act(self, method: str, path: str, act: Callable[[Handler], None]) -> None:
        """Do anything once."""
        self.faults.append(Fault(method, re.compile(path), 1, act))

    def called(self, method: str, path: str) -> int:
        """How often."""
        return sum(1 for each, where in self.requests if each == method and re.search(path, where))

    @contextmanager
    def running(self) -> Iterator[HubDouble]:
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield self
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: HubDouble
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.handle_one("GET")

    def do_HEAD(self) -> None:
        self.handle_one("HEAD")

    def do_POST(self) -> None:
        self.handle_one("POST")

    def do_PUT(self) -> None:
        self.handle_one("PUT")

    def handle_one(self, method: str) -> None:
        hub, where = self.hub, urlsplit(self.path)
        self.method, self.route, self.query = method, unquote(where.path), parse_qs(where.query)
        with hub.lock:
            hub.requests.append((method, self.route))
            fault = next((each for each in hub.faults if self.meets(each)), None)
            if fault is not None:
                fault.times -= 1
            moment = hub.moments.pop(len(hub.requests) - 1, None)
        if moment is not None:
            self.body = None
            moment(self)
            return
        self.body: bytes | None = None
        if fault is not None:
            fault.act(self)
            return
        self.read_body()
        if not self.route.startswith("/lfs/"):
            hub.bodies += self.read_body()
        with hub.lock:
            for pattern, answer in ROUTES:
                found = re.fullmatch(pattern, f"{method} {self.route}")
                if found:
                    answer(self, **found.groupdict())
                    return
        self.refuse(404, f"no such endpoint: {method} {self.route}", {})

    def read_body(self) -> bytes:
        if self.body is None:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return self.body

    def meets(self, fault: Fault) -> bool:
        return fault.times > 0 and fault.method == self.method and bool(fault.path.search(self.route))

    # answers

    def give(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, message: str, headers: dict[str, str]) -> None:
        self.read_body()  # or the next request on this connection begins in the middle of it
        self.send(status, json.dumps({"error": message}).encode(), {"X-Error-Message": message, **headers})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.method != "HEAD":
            self.wfile.write(content)

    def hang_up(self) -> None:
        self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 0)))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        pass

    # who asks, and for what

    def user(self) -> dict[str, Any] | None:
        return self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def repo(self, name: str, *, write: bool = False) -> Repo | None:
        """The repository, if it is there for this user; otherwise the answer is given."""
        found, user = self.hub.repos.get(name), self.user()
        if found is None or (found.private and user is None):
            self.refuse(404 if user else 401, "Repository not found", {"X-Error-Code": "RepoNotFound"})
            return None
        if write and not may_write(user, name):
            self.refuse(403, "You don't have the rights to write to this repository", {})
            return None
        return found

    def whoami(self) -> None:
        user = self.user()
        self.give(user) if user else self.refuse(401, "Invalid username or password.", {})

    def create(self) -> None:
        asked = json.loads(self.read_body())
        user = self.user() or {"name": "?"}
        name = f"{asked.get('organization') or user['name']}/{asked['name']}"
        if not may_write(self.user(), name):
            return self.refuse(403, "You don't have the rights to create a model under this namespace", {})
        if name in self.hub.repos:
            return self.send(
                409,
                json.dumps({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}).encode(),
                {},
            )
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos[name] = Repo(private)
        self.hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "main", "initial commit")
        self.give({"url": f"{self.hub.url}/{name}"})

    def info(self, name: str, revision: str | None = None) -> None:
        repo = self.repo(name)
        if repo is None:
            return
        sha = repo.at(revision or "main")
        if sha is None:
            return self.refuse(404, "Invalid rev id", {"X-Error-Code": "RevisionNotFound"})
        files = repo.commits[sha]
        card = files.get("README.md", b"").decode()
        data = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else None
        siblings = [{"rfilename": each} for each in sorted(files)]
        self.give({"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": [],
                   **({"cardData": data} if data else {})})  # fmt: skip

    def may(self, name: str, write: str | None) -> None:
        if self.repo(name, write=bool(write)) is not None:
            self.give({})

    def tree(self, name: str, revision: str) -> None:
        repo = self.repo(name)
        if repo is not None:
            self.give([entry(path, content) for path, content in sorted(repo.commits[repo.at(revision) or ""].items())])

    def refs(self, name: str) -> None:
        repo = self.repo(name)
        if repo is not None:
            rows = {"branches": ("heads", repo.branches), "tags": ("tags", repo.tags)}
            self.give({"converts": [], **{
                kind: [{"name": each, "ref": f"refs/{word}/{each}", "targetCommit": sha} for each, sha in found.items()]
                for kind, (word, found) in rows.items()
            }})  # fmt: skip

    def branch(self, name: str, branch: str) -> None:
        repo = self.repo(name, write=True)
        if repo is None:
            return
        if branch in repo.branches:
            return self.refuse(409, "Reference already exists", {})
        repo.branches[branch] = repo.branches["main"]
        self.give({})

    def tag(self, name: str, revision: str) -> None:
        repo, tag = self.repo(name, write=True), json.loads(self.read_body())["tag"]
        if repo is None:
            return
        if tag in repo.tags:
            return self.refuse(409, "Tag reference exists already", {})
        repo.tags[tag] = str(repo.at(revision))
        self.give({})

    def validate(self) -> None:
        text = json.loads(self.read_body())["content"]
        try:
            yaml.safe_load(text.split("---")[1] if text.startswith("---") else "{}")
        except yaml.YAMLError as problem:
            return self.give({"errors": [{"message": str(problem)}], "warnings": []}, 400)
        self.give({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        repo = self.repo(name, write="create_pr" not in self.query)
        if repo is None:
            return
        there = repo.commits[repo.at(revision) or ""]
        self.give({"files": [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": identity(each["path"], there[each["path"]]) if each["path"] in there else None,
            }
            for each in json.loads(self.read_body())["files"]
        ]})  # fmt: skip

    def batch(self, name: str) -> None:
        if self.repo(name) is None:
            return
        objects = []
        for each in json.loads(self.read_body())["objects"]:
            place = f"{self.hub.url}/lfs/{each['oid']}"
            actions = {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}
            objects.append({**each, **({} if each["oid"] in self.hub.stored else {"actions": actions})})
        self.give({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        if hashlib.sha256(self.read_body()).hexdigest() != oid:
            return self.send(400, b"<Error><Code>BadDigest</Code><Message>digest mismatch</Message></Error>", {})
        self.hub.stored[oid] = self.read_body()
        self.send(200, b"", {})

    def check(self, oid: str) -> None:
        self.give({}) if oid in self.hub.stored else self.refuse(404, "not stored", {})

    def commit(self, name: str, revision: str) -> None:
        create_pr = "create_pr" in self.query
        repo = self.repo(name, write=not create_pr)
        if repo is None:
            return
        lines = [json.loads(line) for line in self.read_body().splitlines()]
        header = next(each["value"] for each in lines if each["key"] == "header")
        head = str(repo.at(revision))
        if header.get("parentCommit") not in (None, head) and not create_pr:
            return self.refuse(412, "A commit has happened since. Please refresh and try again.", {})
        files = dict(repo.commits[head])
        for each in lines:
            value = each["value"]
            if each["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif each["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif each["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files, None if create_pr else revision, header["summary"])
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True}
        if create_pr:
            repo.pull_requests.append(sha)
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{len(repo.pull_requests)}"
        self.give(answer)

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.repo(name)
        if repo is None:
            return
        sha = repo.at(revision)
        if sha is None:
            return self.refuse(404, "Invalid rev id", {"X-Error-Code": "RevisionNotFound"})
        content = repo.commits[sha].get(path)
        if content is None:
            return self.refuse(404, "Entry not found", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        self.send(200, content, {"ETag": f'"{identity(path, content)}"', "X-Repo-Commit": sha})


_ID = r"(?P<name>[\w.-]+/[\w.-]+)"
_DATASET = r"(?P<name>datasets/[\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"GET /api/models/{_ID}", Handler.info),
    (rf"GET /api/models/{_ID}/revision/(?P<revision>.+)", Handler.info),
    (rf"GET /api/models/{_ID}/auth-check(?P<write>/write)?", Handler.may),
    (rf"GET /api/models/{_ID}/tree/(?P<revision>[^/]+)", Handler.tree),
    (rf"GET /api/models/{_ID}/refs", Handler.refs),
    (rf"POST /api/models/{_ID}/branch/(?P<branch>.+)", Handler.branch),
    (rf"POST /api/models/{_ID}/tag/(?P<revision>.+)", Handler.tag),
    (rf"POST /api/models/{_ID}/preupload/(?P<revision>.+)", Handler.preupload),
    (rf"POST /api/models/{_ID}/commit/(?P<revision>.+)", Handler.commit),
    (rf"POST /{_ID}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(?P<oid>\w+)", Handler.put),
    (r"POST /lfs/(?P<oid>\w+)/verify", Handler.check),
    (rf"(?:GET|HEAD) /{_DATASET}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    (rf"(?:GET|HEAD) /{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]


def user(name: str, *, role: str, orgs: dict[str, str] | None = None, **token: Any) -> dict[str, Any]:
    """As whoami tells of one."""
    return {
        "type": "user",
        "name": name,
        "orgs": [{"name": each, "roleInOrg": how} for each, how in (orgs or {}).items()],
        "auth": {"accessToken": {"displayName": "t", "role": role, **token}},
    }


def may_write(user: dict[str, Any] | None, name: str) -> bool:
    """Whether a user may write to a repository."""
    if user is None or user["auth"]["accessToken"]["role"] == "read":
        return False
    orgs = {each["name"]: each["roleInOrg"] for each in user["orgs"]}
    owner = name.partition("/")[0]
    return owner == user["name"] or orgs.get(owner, "read") != "read"


def blob_id(content: bytes) -> str:
    """As git computes it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def identity(path: str, content: bytes) -> str:
    """Of a large file its sha256, of another what git calls it."""
    return hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else blob_id(content)


def entry(path: str, content: bytes) -> dict[str, Any]:
    """A file of a tree."""
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
    if path.endswith(LARGE):
        found["lfs"] = {"oid": identity(path, content), "size": len(content), "pointerSize": 130}
    return found
