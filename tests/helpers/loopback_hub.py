"""A Hub on this machine, in the memory of one process, for the requests of huggingface_hub when it pushes and loads.

Run the client in its own process with `hub.environment(home)`, because it reads its settings on import.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_NobodyMayEverReadThisToken0000"
USER = "me"


@dataclass
class Repository:
    """The files of a repository and its commit messages."""

    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()


class LoopbackHub:
    """
    A server on a free port that runs until the end of the `with` block.

    `repositories` holds what was pushed, by full name, or as `name@branch` for another branch than `main`. `requests`
    holds the method and path of each request. `failures` maps the name of a repository and the end of a route
    (`create`, `preupload`, `branch`, `commit`) to the status to answer with.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.failures: dict[tuple[str, str], int] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home, token=TOKEN) -> dict[str, str]:
        """Environment variables for a client that knows only this Hub."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        settings = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            # Xet is a protocol of its own; without it weights go the way of git LFS.
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        return inherited | settings | ({"HF_TOKEN": token} if token else {})


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.route()

    do_HEAD = do_POST = do_PUT = do_GET

    def route(self):
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append((self.command, path))
        for methods, pattern, answer in ROUTES:
            if self.command in methods.split() and (match := re.fullmatch(pattern, path)):
                return answer(self, *match.groups())
        self.send(404, {"error": f"no route for {self.command} {path}"})

    def send(self, status, content=b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def may_write(self, name, step) -> bool:
        """Whether the request is allowed. Otherwise, answer it with an error."""
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.send(401, {"error": "Invalid username or password."})
        elif status := self.hub.failures.get((name, step)):
            self.send(status, {"error": "Not today."}, X_Error_Message="Not today.")
        else:
            return True
        return False

    # Pushing

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if self.may_write(name, "create"):
            is_new = name not in self.hub.repositories
            self.hub.repositories.setdefault(name, Repository())
            self.send(200 if is_new else 409, {"url": f"{self.hub.url}/{name}"})

    def create_branch(self, name, branch):
        if self.may_write(name, "branch"):
            self.hub.repositories[f"{name}@{branch}"] = Repository()
            self.send(200)

    def has_branch(self, name, branch) -> bool:
        """Whether the branch exists. Otherwise, answer the request with an error."""
        if branch == "main" or f"{name}@{branch}" in self.hub.repositories:
            return True
        self.send(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        return False

    def preupload(self, name, branch):
        if self.may_write(name, "preupload") and self.has_branch(name, branch):
            files = [
                {"path": each["path"], "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular"}
                for each in json.loads(self.body)["files"]
            ]
            self.send(200, {"files": [each | {"shouldIgnore": False} for each in files]})

    def validate_yaml(self):
        """Check a model card. The Hub rejects a card whose base model is a folder."""
        header = yaml.safe_load(json.loads(self.body)["content"].split("---")[1])
        bases = header.get("base_model") or []
        wrong = [
            base
            for base in ([bases] if isinstance(bases, str) else bases)
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)
        ]
        errors = [{"message": f'"base_model" with value "{base}" is not valid.'} for base in wrong]
        self.send(400 if errors else 200, {"errors": errors, "warnings": []})

    def lfs_batch(self, name):
        if self.may_write(name, "lfs"):
            objects = [
                {
                    "oid": each["oid"],
                    "size": each["size"],
                    "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}},
                }
                for each in json.loads(self.body)["objects"]
            ]
            self.send(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.objects[oid] = self.body
        self.send(200)

    def commit(self, name, branch):
        if not self.may_write(name, "commit") or not self.has_branch(name, branch):
            return
        repository = self.hub.repositories[name if branch == "main" else f"{name}@{branch}"]
        for line in self.body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                repository.commits.append(value["summary"])
            elif operation["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del repository.files[value["path"]]
        url = f"{self.hub.url}/{name}/commit/{repository.sha}"
        self.send(200, {"success": True, "commitOid": repository.sha, "commitUrl": url})

    # Loading

    def model_info(self, name):
        if name not in self.hub.repositories:
            return self.send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        repository = self.hub.repositories[name]
        siblings = [{"rfilename": path} for path in repository.files]
        self.send(200, {"id": name, "sha": repository.sha, "siblings": siblings, "tags": [], "private": False})

    def tree(self, name):
        files = self.hub.repositories[name].files.items()
        entries = [{"type": "file", "path": path, "size": len(data), "oid": _etag(data)} for path, data in files]
        self.send(200, entries)

    def resolve(self, name, path):
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self.send(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if path not in repository.files:
            return self.send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=repository.sha)
        data = repository.files[path]
        self.send(200, data, ETag=f'"{_etag(data)}"', X_Repo_Commit=repository.sha, Accept_Ranges="bytes")

    def log_message(self, *args):
        pass


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"/api/models/{NAME}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(\w+)", _Handler.lfs_upload),
    ("POST", rf"/api/models/{NAME}/commit/([^/]+)", _Handler.commit),
    ("POST", rf"/api/models/{NAME}/branch/(.+)", _Handler.create_branch),
    ("GET", rf"/api/models/{NAME}(?:/revision/[^/]+)?", _Handler.model_info),
    ("GET", rf"/api/models/{NAME}/tree/[^/]+", _Handler.tree),
    ("GET HEAD", rf"/{NAME}/resolve/[^/]+/(.+)", _Handler.resolve),
]
