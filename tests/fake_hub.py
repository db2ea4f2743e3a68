"""A small Hugging Face hub on loopback: huggingface_hub 2.4.0 and datasets 5.2.0 talk to it as to the real one.

    with FakeHub({"org/model": folder}, datasets={"org/data": other}) as hub:
        subprocess.run([...], env=hub.environment(cache_dir))   # a process of its own
        hub.attach(monkeypatch, cache_dir)                      # or this one
        ...
        assert ("GET", "/api/models/org/model?blobs=True") in hub.requests

It knows revisions, large files (a redirect to another host, as to the real one's storage), range requests, gated and
private repos, tree listings, and uploads (LFS; not Xet, which `environment` turns off).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
import yaml

LARGE_FILE = re.compile(r".*\.(safetensors|bin|model|h5|gguf|msgpack|onnx|parquet|pt|pth)")
HUB_VARIABLES = re.compile(r"HF_.*|HUGGING.*|TRANSFORMERS_OFFLINE|DISABLE_TELEMETRY|.*_proxy", re.IGNORECASE)
REPO = r"(?P<repo>[^/]+(?:/[^/]+)??)"  # "gpt2" or "org/model"; as short as the rest of the pattern allows
KIND = r"(?P<kind>models|datasets)"
NO_AGENTS = b'{"standardEnvVars": [], "harnesses": {}}'


@dataclass(frozen=True)
class Blob:
    """One file at one commit."""

    data: bytes
    large: bool

    @property
    def oid(self) -> str:
        """Its git id."""
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def sha256(self) -> str:
        """Its id in large-file storage."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        """What the hub sends as ETag."""
        return self.sha256 if self.large else self.oid


@dataclass
class Repo:
    """Commits, and what branches and tags point to."""

    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, Blob], branch: str) -> str:
        """Add a commit with these files; its id depends on nothing else."""
        text = "\n".join(f"{name} {blob.oid}" for name, blob in sorted(files.items()))
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, a tag, a commit or the first digits of one."""
        if revision in self.branches:
            return self.branches[revision]
        return next((commit for commit in self.commits if len(revision) >= 5 and commit.startswith(revision)), None)


class FakeHub:
    """See the module.

    Args:
        models, datasets: repo -> folder to serve, read once.
        gated, private: names of repos of either kind that ask for `token`.

    Attributes:
        requests: (method, path with query) of every request so far, in order of arrival.
        bytes_sent: bytes of all bodies so far.
        status: set it to 503, say, and the hub answers nothing else.
        ignore_ranges: set it, and the hub sends whole files to those who ask for a part.
        role: of the token: write, read, or fineGrained with the permissions `scopes`.
        uploads_fail: set it, and the hub takes no more files.
        page: set it, and this is the answer to everything, as of a login page in between.
    """

    def __init__(
        self,
        models: Mapping[str, Path] | None = None,
        *,
        datasets: Mapping[str, Path] | None = None,
        gated: Iterable[str] = (),
        private: Iterable[str] = (),
    ) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.gated, self.private = set(gated), set(private)
        self.token = "hf_fake"
        self.requests: list[tuple[str, str]] = []
        self.bytes_sent = 0
        self.status: int | None = None
        self.ignore_ranges = False
        self.role, self.scopes = "write", ["repo.content.read"]
        self.uploads_fail = False
        self.page = b""
        for kind, repos in (("models", models), ("datasets", datasets)):
            for repo, folder in (repos or {}).items():
                self.publish(repo, folder, kind=kind)
        self._server = _Server(("127.0.0.1", 0), type("BoundHandler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.storage = f"http://localhost:{self._server.server_port}"  # another host, as far as clients can tell

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop answering: connections are refused from here on. A second call does nothing."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def publish(self, repo: str, folder: Path, *, branch: str = "main", kind: str = "models") -> str:
        """Add a commit with a folder's files to a branch, and return the commit's id."""
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        blobs = {name: Blob(path.read_bytes(), bool(LARGE_FILE.fullmatch(name))) for name, path in files.items()}
        self.large_files |= {blob.sha256: blob.data for blob in blobs.values() if blob.large}
        return self.repos.setdefault((kind, repo), Repo()).commit(blobs, branch)

    def files(self, repo: str, *, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """What a repo holds, for instance after an upload."""
        found = self.repos[kind, repo]
        return {name: blob.data for name, blob in found.commits[found.branches[revision]].items()}

    def environment(self, cache_dir: Path, *, token: str | None = None) -> dict[str, str]:
        """The variables of a process that shall know only this hub, with its cache in `cache_dir` and no proxy.

        They must be set before huggingface_hub is imported, hence before the process starts.
        """
        kept = {key: value for key, value in os.environ.items() if not HUB_VARIABLES.fullmatch(key)}
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache_dir),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets would ask s3.amazonaws.com
            "NO_PROXY": "127.0.0.1,localhost",
            **({"HF_TOKEN": token} if token else {}),
        }

    def attach(self, monkeypatch: pytest.MonkeyPatch, cache_dir: Path, *, token: str | None = None) -> None:
        """The same for this process, where huggingface_hub has read its environment already.

        Good for calls through `HfApi()`, `snapshot_download` and `hf_hub_download`. Not for the functions that
        huggingface_hub makes of one HfApi as it is imported (`huggingface_hub.model_info`, ...), nor for datasets.
        """
        from huggingface_hub import close_session, constants

        agents = cache_dir.with_name(f"{cache_dir.name}_agents.json")  # which it would fetch
        agents.write_bytes(NO_AGENTS)
        for name, value in {
            "ENDPOINT": self.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache_dir / "hub"),
            "HF_TOKEN_PATH": str(cache_dir / "token"),
            "AGENT_HARNESSES_PATH": str(agents),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_PROGRESS_BARS": None,
        }.items():
            monkeypatch.setattr(constants, name, value)
        for name in [name for name in os.environ if HUB_VARIABLES.fullmatch(name)]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        close_session()  # the next request makes a client that knows of no proxy


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # with the default of 5, clients that download in parallel wait a second now and then


class _Refusal(Exception):
    """An answer other than success: status, the hub's error code, message."""


class _Handler(BaseHTTPRequestHandler):
    """One request. HTTP/1.0, so every connection ends with its answer and a closed hub is closed at once."""

    hub: FakeHub
    routes: tuple[tuple[str, str, str], ...] = (
        ("GET", r"/api/agent-harnesses", "agents"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("GET", rf"/api/{KIND}/{REPO}(?:/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", rf"/api/{KIND}/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("POST", rf"/api/{KIND}/{REPO}/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("GET", rf"/(?:(?P<kind>datasets)/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET", r"/large/(?P<sha256>[0-9a-f]{64})", "get_large"),
        ("PUT", r"/large/(?P<sha256>[0-9a-f]{64})", "put_large"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", rf"/api/{KIND}/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"/(?:(?P<kind>datasets)/)?{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", rf"/api/{KIND}/{REPO}/commit/(?P<revision>[^/]+)", "commit"),
    )

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def answer(self) -> None:
        """Find the route, send what it returns: JSON, or bytes with headers."""
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = b"".join(self._read_body())
        if url.path != "/api/agent-harnesses":  # asked once per process, if ever
            self.hub.requests.append((self.command, self.path))
        try:
            if self.hub.status:
                raise _Refusal(self.hub.status, "", "the hub is told to fail")
            if self.hub.page:
                self._send(self.hub.page)
                return
            method = "GET" if self.command == "HEAD" else self.command
            for allowed, pattern, name in self.routes:
                if method == allowed and (match := re.fullmatch(pattern, url.path)):
                    parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    self._send(getattr(self, f"on_{name}")(**parts))
                    return
            raise _Refusal(404, "", f"the fake hub knows no {self.path}")
        except _Refusal as refusal:
            status, code, message = refusal.args
            self._send(
                json.dumps({"error": message}).encode(), status, {"X-Error-Code": code, "X-Error-Message": message}
            )

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def _read_body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            yield self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        if isinstance(content, tuple):
            content, status, headers = content
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.hub.bytes_sent += len(body)
            self.wfile.write(body)

    def _find(self, kind: str, repo: str, *, content: bool = False) -> Repo:
        """The repo, if it exists and the caller may see it (its `content`)."""
        allowed = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if (kind, repo) not in self.hub.repos or (repo in self.hub.private and not allowed):
            raise _Refusal(404 if allowed else 401, "RepoNotFound", "Repository not found")
        if content and repo in self.hub.gated and not allowed:
            raise _Refusal(401, "GatedRepo", f"Access to {repo} is restricted. You must be authenticated.")
        return self.hub.repos[kind, repo]

    def _files(self, kind: str, repo: str, revision: str, *, content: bool = False) -> tuple[str, dict[str, Blob]]:
        found = self._find(kind, repo, content=content)
        commit = found.resolve(revision)
        if commit is None:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, found.commits[commit]

    def _ranged(self, data: bytes, headers: Mapping[str, str]) -> tuple[bytes, int, Mapping[str, str]]:
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked or self.hub.ignore_ranges:
            return data, 200, headers
        first, last = asked[1], asked[2]
        start = int(first) if first else max(0, len(data) - int(last))
        stop = min(len(data), int(last) + 1) if first and last else len(data)
        if start >= len(data):
            return b"", 416, {"Content-Range": f"bytes */{len(data)}"}
        return data[start:stop], 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}

    # Each answers one route.

    def on_agents(self) -> bytes:
        return NO_AGENTS

    def on_whoami(self) -> dict[str, Any]:
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            raise _Refusal(401, "", "Invalid username or password.")
        token: dict[str, Any] = {"role": self.hub.role}
        if self.hub.role == "fineGrained":
            scope = {"entity": {"type": "user", "name": "tester"}, "permissions": self.hub.scopes}
            token["fineGrained"] = {"global": [], "scoped": [scope]}
        orgs = [{"type": "org", "name": "org"}]
        return {"type": "user", "name": "tester", "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}

    def on_info(self, kind: str, repo: str, revision: str = "main") -> dict[str, Any]:
        commit, files = self._files(kind, repo, revision)
        siblings: list[dict[str, Any]] = [{"rfilename": name} for name in files]
        if "blobs" in self.query:
            for sibling, blob in zip(siblings, files.values(), strict=True):
                sibling |= {"size": len(blob.data), "blobId": blob.oid}
                if blob.large:
                    sibling["lfs"] = {"size": len(blob.data), "sha256": blob.sha256, "pointerSize": 130}
        gated = "manual" if repo in self.hub.gated else False
        return {"id": repo, "sha": commit, "private": repo in self.hub.private, "gated": gated, "siblings": siblings}

    @staticmethod
    def _entry(path: str, blob: Blob) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid}
        return entry | ({"lfs": {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 130}} if blob.large else {})

    def _entries(self, files: Mapping[str, Blob]) -> Iterator[dict[str, Any]]:
        folders = {str(parent) for name in files for parent in Path(name).parents} - {"."}
        yield from ({"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders))
        yield from (self._entry(path, blob) for path, blob in files.items())

    def on_tree(self, kind: str, repo: str, revision: str, path: str = "") -> list[dict[str, Any]]:
        _, files = self._files(kind, repo, revision)
        prefix = f"{path}/" if path else ""
        found = [entry for entry in self._entries(files) if entry["path"].startswith(prefix)]
        if path and not found:
            raise _Refusal(404, "EntryNotFound", f"{path} does not exist on {revision}")
        recursive = self.query.get("recursive", [""])[0].lower() == "true"
        return [entry for entry in found if recursive or "/" not in entry["path"][len(prefix) :]]

    def on_paths_info(self, kind: str, repo: str, revision: str) -> list[dict[str, Any]]:
        wanted = parse_qs(self.body.decode())["paths"]
        return [entry for entry in self._entries(self._files(kind, repo, revision)[1]) if entry["path"] in wanted]

    def on_resolve(self, repo: str, revision: str, path: str, kind: str = "models") -> Any:
        commit, files = self._files(kind, repo, revision, content=True)
        if path not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit}
            return b"Entry not found", 404, headers
        blob = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if not blob.large:
            return self._ranged(blob.data, headers)
        linked = {"X-Linked-Size": str(len(blob.data)), "X-Linked-Etag": f'"{blob.sha256}"'}
        return b"", 302, {**headers, **linked, "Location": f"{self.hub.storage}/large/{blob.sha256}"}

    def on_get_large(self, sha256: str) -> Any:
        if "Authorization" in self.headers:
            raise _Refusal(400, "", "storage must not see the hub's token")
        return self._ranged(self.hub.large_files[sha256], {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})

    # Uploads, in the order in which a client asks.

    def on_create(self) -> Any:
        asked = json.loads(self.body)
        repo = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
        kind = f"{asked.get('type') or 'model'}s"
        self.on_whoami()
        answer = {"url": f"{self.hub.endpoint}/{'datasets/' if kind == 'datasets' else ''}{quote(repo)}"}
        if (kind, repo) in self.hub.repos:
            return {"error": "You already created this model repo", **answer}, 409, {}
        self.hub.repos[kind, repo] = Repo()
        self.hub.repos[kind, repo].commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "main")
        if asked.get("visibility") == "private":
            self.hub.private.add(repo)
        return answer

    def on_validate_yaml(self) -> Any:
        card = re.match(r"---\n(.*?)---\n", json.loads(self.body)["content"], re.DOTALL)
        front = yaml.safe_load(card[1]) if card else {}
        wrong = [
            name for name in front.get("base_model", ()) if not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", name)
        ]
        errors = [{"message": f'"base_model" with value "{name}" is not valid.'} for name in wrong]
        return {"errors": errors, "warnings": []}, 400 if errors else 200, {}

    def on_preupload(self, kind: str, repo: str, revision: str) -> dict[str, Any]:
        self.on_whoami()
        if self.hub.uploads_fail:
            raise _Refusal(403, "", "Private repository storage limit reached.")
        _, there = self._files(kind, repo, revision)
        files = [
            {
                "path": asked["path"],
                "uploadMode": "lfs" if LARGE_FILE.fullmatch(asked["path"]) else "regular",
                "shouldIgnore": False,
                **({"oid": there[asked["path"]].etag} if asked["path"] in there else {}),
            }
            for asked in json.loads(self.body)["files"]
        ]
        return {"files": files}

    def on_lfs_batch(self, repo: str, kind: str = "models") -> dict[str, Any]:
        self._find(kind, repo)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.large_files:
                item["actions"] = {"upload": {"href": f"{self.hub.storage}/large/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def on_put_large(self, sha256: str) -> dict[str, str]:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise _Refusal(400, "", "the content is not what its sha256 says")
        self.hub.large_files[sha256] = self.body
        return {}

    def on_commit(self, kind: str, repo: str, revision: str) -> dict[str, str]:
        _, there = self._files(kind, repo, revision)
        files = dict(there)
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile":
                files[value["path"]] = Blob(self.hub.large_files[value["oid"]], True)
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            elif item["key"] == "deletedFolder":
                files = {name: blob for name, blob in files.items() if not name.startswith(value["path"])}
        commit = self.hub.repos[kind, repo].commit(files, revision)
        return {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{commit}", "commitOid": commit}
