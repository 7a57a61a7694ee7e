"""A fake of the Hub on this machine, which keeps repositories in memory, and plugin files to share."""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants

import petiole as pt
from fitting import make_model

ANNA = "hf_anna"
NAME = "plugin.safetensors"
PUBLIC = "/api/models/anna/pets"


class Answer(NamedTuple):
    """Status, headers and body of an answer."""

    status: int
    body: Any = b""
    headers: dict[str, str] = {}  # noqa: RUF012


def refusal(status: int, code: str = "", message: str = "no") -> Answer:
    return Answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})


@dataclass
class Repo:
    """A repository: its files after each commit, oldest first."""

    is_private: bool = False
    commits: list[tuple[str, dict[str, bytes], str]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{id(self)} {len(self.commits)}".encode()).hexdigest()
        self.commits.append((sha, {**(self.files if self.commits else {}), **files}, message))
        return sha

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    @property
    def card(self) -> str:
        return self.files["README.md"].decode()

    @property
    def fields(self) -> dict[str, Any]:
        """The card's metadata."""
        return yaml.safe_load(self.card.split("---\n")[1])


class Hub:
    """The parts of the Hub's HTTP API that sharing one file needs; `anna` is the only user."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.bodies: dict[str, Any] = {}
        self.stored: dict[str, bytes] = {}
        self.upload_mode = "regular"
        self.canned: dict[str, Answer] = {}
        self.url = ""

    def add(self, name: str = "anna/pets", is_private: bool = False, **files: bytes) -> Repo:
        self.repos[name] = Repo(is_private)
        self.repos[name].commit({key.replace("__", "."): data for key, data in files.items()}, "initial commit")
        return self.repos[name]

    def answer(self, method: str, path: str, token: str, body: bytes) -> Answer:
        self.requests.append(f"{method} {path}")
        for pattern, answer in self.canned.items():
            if re.fullmatch(pattern, f"{method} {path}"):
                return answer
        if path == "/api/repos/create":
            return self.create(json.loads(body), token)
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(body))
        if found := re.fullmatch(r"/store/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == found[1]
            self.stored[found[1]] = body
            return Answer(200)
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|preupload|commit)/(.+))?", path)
        kind, name = (found[2] or "revision", found[1]) if found else ("", "")
        if not found:
            found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            kind, name = "resolve", found[1]
        repo = self.repos.get(name)
        if repo is None or (repo.is_private and token != ANNA):
            return refusal(404 if token == ANNA else 401, "RepoNotFound", "Repository not found")
        if kind in ("preupload", "commit") and token != ANNA:
            return refusal(403 if token else 401)
        if kind == "preupload":
            return self.preupload(repo, json.loads(body))
        if kind == "commit":
            return self.commit(name, repo, [json.loads(line) for line in body.splitlines()])
        if kind == "revision":
            files = [{"rfilename": file} for file in repo.files]
            return Answer(200, {"id": name, "sha": repo.head, "private": repo.is_private, "siblings": files})
        return self.resolve(repo, found[2], found[3])

    def create(self, asked: dict[str, Any], token: str) -> Answer:
        self.bodies["create"] = asked
        name = f"{asked['organization']}/{asked['name']}"
        if token != ANNA:
            return refusal(401, message="Invalid username or password.")
        if asked["organization"] != "anna":
            return refusal(403, message="You don't have the rights")
        if name in self.repos:
            return refusal(409, message="You already created this model repo")
        is_private = asked.get("private") or asked.get("visibility") == "private"
        self.add(name, bool(is_private), __gitattributes=b"*.safetensors filter=lfs")
        return Answer(200, {"url": f"{self.url}/{name}"})

    def validate(self, content: str) -> Answer:
        fields = yaml.safe_load(content.split("---\n")[1])
        if fields.get("license", "mit") not in ("mit", "apache-2.0"):
            return Answer(400, {"errors": [{"message": '"license" must be one of [mit, apache-2.0]'}], "warnings": []})
        return Answer(200, {"errors": [], "warnings": []})

    def preupload(self, repo: Repo, asked: dict[str, Any]) -> Answer:
        rows = []
        for file in asked["files"]:
            is_large = file["path"].endswith(".safetensors") and self.upload_mode == "lfs"
            row = {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            if data := repo.files.get(file["path"]):
                git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                row["oid"] = hashlib.sha256(data).hexdigest() if is_large else git
            rows.append(row)
        return Answer(200, {"files": rows})

    def batch(self, asked: dict[str, Any]) -> Answer:
        found = [
            {**entry, "actions": {"upload": {"href": f"{self.url}/store/{entry['oid']}"}}} for entry in asked["objects"]
        ]
        return Answer(200, {"transfer": "basic", "objects": found})

    def commit(self, name: str, repo: Repo, lines: list[dict[str, Any]]) -> Answer:
        header, *entries = lines
        assert header["key"] == "header"
        if header["value"].get("parentCommit", repo.head) != repo.head:
            return refusal(412, message="A commit has happened since")
        files = {}
        for entry in entries:
            value = entry["value"]
            if entry["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert entry["key"] == "lfsFile"
                files[value["path"]] = self.stored[value["oid"]]
        sha = repo.commit(files, header["value"]["summary"])
        return Answer(200, {"success": True, "commitUrl": f"{self.url}/{name}/commit/{sha}", "commitOid": sha})

    def resolve(self, repo: Repo, revision: str, file: str) -> Answer:
        known = {"main": repo.commits[-1], **{commit[0]: commit for commit in repo.commits}}
        if revision not in known:
            return refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        sha, files, _ = known[revision]
        if file not in files:
            return refusal(404, "EntryNotFound", "Entry not found")
        return Answer(200, files[file], {"ETag": f'"{hashlib.sha256(files[file]).hexdigest()}"', "X-Repo-Commit": sha})


class Server(ThreadingHTTPServer):
    """Says nothing of a client that leaves in the middle, which would stand in what a command said."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def handle_request(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            answer = hub.answer(self.command, unquote(urlsplit(self.path).path), token, body)
            data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self.send_response(answer.status)
            for key, value in {"Content-Length": str(len(data)), **answer.headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The fake, as the Hub of this process; anna is logged in, the cache is empty."""
    fake = Hub()
    server = Server(("127.0.0.1", 0), handler(fake))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, fake.url)
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", ANNA)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    yield fake
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plugin file for a backbone that timm calls tiny.v0."""
    path = tmp_path_factory.mktemp("plugins") / "pets.safetensors"
    metrics = {"test_accuracy": 0.75, "val_accuracy": 0.5, "trained_parameters": 1234567.0}
    pt.save(make_model(pt.LoRA(rank=2, bits=4)), path, metrics=metrics, notes="on the *first* try")
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another plugin file."""
    path = tmp_path_factory.mktemp("plugins") / "other.safetensors"
    pt.save(make_model(pt.FacT(rank=2)), path)
    return path


@pytest.fixture(scope="module")
def damaged(plugin: Path) -> Path:
    """A plugin file of which one bit is flipped."""
    data = bytearray(plugin.read_bytes())
    data[-3] ^= 1
    path = plugin.with_name("damaged.safetensors")
    path.write_bytes(data)
    return path
