"""The model part of the hub's protocol over `Storage`, as the stock huggingface_hub client speaks it.

Reading is free but for private repositories; everything else wants the token. Uploads go to addresses that are signed
for one file and one hour, because the client sends no token with them.
"""

import base64
import binascii
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from huggingface_hub import ModelCard
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from zoo.service.storage import MAIN, Commit, Refused, Repository, Storage, StoredFile, pointer

LARGE_FROM_BYTES = 2**20  # as a large file, apart from the commit
LARGE_ENDINGS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".onnx",
    ".tflite",
    ".parquet",
    ".arrow",
    ".gguf",
    ".npz",
    ".zip",
)
MAX_LINE_BYTES = 16 * 2**20  # of a commit's body
MAX_BODY_BYTES = 128 * 2**20
SIGNED_FOR_SECONDS = 3600


def make_app(storage: Storage, token: str, owner: str, allowed_hosts: Iterable[str]) -> FastAPI:
    """The application. owner: the namespace of names without one. allowed_hosts: what requests may call it."""
    app = FastAPI(title="zoo hub", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts))
    _Routes(app, storage, token, owner)
    return app


class _Routes:
    def __init__(self, app: FastAPI, storage: Storage, token: str, owner: str):
        self.storage, self.token, self.owner = storage, token, owner
        self.key = secrets.token_bytes(32)
        app.add_exception_handler(Refused, _refusal)
        app.add_exception_handler(OSError, _no_room)
        model = "/api/models/{namespace}/{name}"
        routes: list[tuple[str, str, Callable]] = [
            ("GET", "/api/whoami-v2", self.whoami),
            ("POST", "/api/validate-yaml", self.validate_yaml),
            ("POST", "/api/repos/create", self.create),
            ("DELETE", "/api/repos/delete", self.delete),
            ("GET", "/api/models", self.models),
            ("PUT", f"{model}/settings", self.settings),
            ("POST", f"{model}/preupload/{{revision:path}}", self.preupload),
            ("POST", "/{namespace}/{name}.git/info/lfs/objects/batch", self.batch),
            ("PUT", "/upload/{digest}", self.upload),
            ("POST", "/verify", self.verify),
            ("POST", f"{model}/commit/{{revision:path}}", self.commit),
            ("GET", f"{model}/refs", self.refs),
            ("GET", f"{model}/commits/{{revision:path}}", self.commits),
            ("GET", f"{model}/tree/{{rest:path}}", self.tree),
            ("POST", f"{model}/paths-info/{{revision:path}}", self.paths_info),
            ("POST", f"{model}/branch/{{branch:path}}", self.make_branch),
            ("DELETE", f"{model}/branch/{{branch:path}}", self.delete_branch),
            ("POST", f"{model}/tag/{{revision:path}}", self.make_tag),
            ("DELETE", f"{model}/tag/{{tag:path}}", self.delete_tag),
            ("GET", f"{model}/revision/{{revision:path}}", self.info),
            ("GET", model, self.info),
            ("GET", "/{namespace}/{name}/resolve/{rest:path}", self.file),
            ("HEAD", "/{namespace}/{name}/resolve/{rest:path}", self.file),
        ]
        for method, path, endpoint in routes:
            app.add_api_route(path, endpoint, methods=[method], response_model=None)

    # Who asks

    def _has_token(self, request: Request) -> bool:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if not given:
            return False
        if kind.lower() != "bearer" or not hmac.compare_digest(given.encode(), self.token.encode()):
            raise Refused(401, "Invalid credentials in Authorization header")
        return True

    def _may_write(self, request: Request) -> None:
        if not self._has_token(request):
            raise Refused(401, "this wants the server's token: set HF_TOKEN")

    def _readable(self, request: Request, namespace: str, name: str) -> Repository:
        # whether a private repository exists is nobody's business either
        known = self._has_token(request)
        repository = self.storage.get("models", namespace, name)
        if repository.settings["private"] and not known:
            raise Refused(404, f"no repository {namespace}/{name}", "RepoNotFound")
        return repository

    def _writable(self, request: Request, namespace: str, name: str) -> Repository:
        self._may_write(request)
        return self.storage.get("models", namespace, name)

    # The account, and repositories

    def whoami(self, request: Request) -> dict[str, Any]:
        self._may_write(request)
        access = {"displayName": "zoo", "role": "write"}
        return {
            "type": "user", "id": self.owner, "name": self.owner, "fullname": self.owner, "orgs": [],
            "auth": {"type": "access_token", "accessToken": access},
        }  # fmt: skip

    async def validate_yaml(self, request: Request) -> dict[str, Any]:
        content = (await _json(request)).get("content", "")
        try:
            ModelCard(str(content), ignore_metadata_errors=False)
        except (ValueError, TypeError) as error:
            return {"errors": [{"message": str(error)[:500]}], "warnings": []}
        return {"errors": [], "warnings": []}

    async def create(self, request: Request) -> Response:
        self._may_write(request)
        wanted = await _json(request)
        namespace, name = self._named(wanted)
        address = f"{str(request.base_url).rstrip('/')}/{namespace}/{name}"
        try:
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            repository = self.storage.create("models", namespace, name, private, self.owner)
        except Refused as error:
            if error.status != 409:
                raise
            return JSONResponse({"error": str(error), "url": address}, status_code=409)
        return JSONResponse({"url": address, "name": repository.id, "id": repository.id})

    async def delete(self, request: Request) -> dict[str, Any]:
        self._may_write(request)
        namespace, name = self._named(await _json(request))
        self.storage.get("models", namespace, name).delete()
        return {}

    def _named(self, wanted: dict[str, Any]) -> tuple[str, str]:
        if wanted.get("type", "model") not in ("model", None):
            raise Refused(400, f"this server has models only, no {wanted['type']}")
        namespace, _, name = str(wanted.get("name", "")).rpartition("/")
        return wanted.get("organization") or namespace or self.owner, name

    def models(self, request: Request, search: str = "", author: str = "") -> list[dict[str, Any]]:
        known = self._has_token(request)
        return [
            _described(repository, repository.resolve(MAIN))
            for repository in self.storage.list("models")
            if (known or not repository.settings["private"])
            and search.lower() in repository.id.lower()
            and (not author or repository.id.startswith(f"{author}/"))
        ]

    async def settings(self, request: Request, namespace: str, name: str) -> dict[str, Any]:
        repository, wanted = self._writable(request, namespace, name), await _json(request)
        private = wanted.get("private", wanted.get("visibility", "public") == "private")
        repository.change(private=bool(private))
        return {"private": bool(private)}

    # Uploads

    async def preupload(self, request: Request, namespace: str, name: str, revision: str) -> dict[str, Any]:
        repository, wanted = self._writable(request, namespace, name), await _json(request)
        there = repository.resolve(revision).files
        modes = []
        for file in _listed(wanted, "files"):
            path, sample = _field(file, "path", str), _decoded(_field(file, "sample", str))
            large = (
                _field(file, "size", int) >= LARGE_FROM_BYTES or path.lower().endswith(LARGE_ENDINGS) or b"\0" in sample
            )
            entry = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            # the client leaves out what has not changed
            modes.append(entry | ({"oid": there[path].etag} if path in there else {}))
        return {"files": modes}

    async def batch(self, request: Request, namespace: str, name: str) -> dict[str, Any]:
        self._writable(request, namespace, name)
        wanted, base = await _json(request), str(request.base_url).rstrip("/")
        objects = []
        for entry in _listed(wanted, "objects"):
            digest, size = _field(entry, "oid", str), _field(entry, "size", int)
            answer: dict[str, Any] = {"oid": digest, "size": size}
            if not self.storage.blob(digest).exists():
                upload = {"href": f"{base}/upload/{digest}?{self._signed(digest, size)}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{base}/verify"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def _signed(self, digest: str, size: int) -> str:
        until = int(time.time()) + SIGNED_FOR_SECONDS
        return f"size={size}&until={until}&signature={self._signature(digest, size, until)}"

    def _signature(self, digest: str, size: int, until: int) -> str:
        return hmac.new(self.key, f"{digest}:{size}:{until}".encode(), hashlib.sha256).hexdigest()

    async def upload(self, request: Request, digest: str, size: int, until: int, signature: str) -> dict[str, Any]:
        if not hmac.compare_digest(signature, self._signature(digest, size, until)) or time.time() > until:
            raise Refused(403, "this address was not given by the server, or is too old; ask again")
        received = 0
        with self.storage.receiving() as file:
            async for chunk in request.stream():
                received += len(chunk)
                if received > size:
                    raise Refused(422, f"more than the {size} bytes that were announced")
                file.write(chunk)
            file.flush()
            self.storage.keep(Path(file.name), digest, size)
        return {}

    async def verify(self, request: Request) -> dict[str, Any]:
        self._may_write(request)
        wanted = await _json(request)
        stored = self.storage.blob(_field(wanted, "oid", str))
        if not stored.exists() or stored.stat().st_size != _field(wanted, "size", int):
            raise Refused(422, "its content has not arrived")
        return {}

    async def commit(self, request: Request, namespace: str, name: str, revision: str) -> dict[str, Any]:
        repository = self._writable(request, namespace, name)
        header: dict[str, Any] = {}
        operations = []
        async for line in _lines(request):
            entry = _parsed(line)
            key, value = _field(entry, "key", str), _field(entry, "value", dict)
            if key == "header":
                header = value
                continue
            operation: dict[str, Any] = {"path": _field(value, "path", str)}
            if key == "file":
                operation["content"] = _decoded(_field(value, "content", str))
            elif key == "lfsFile":
                operation |= {"oid": _field(value, "oid", str), "size": _field(value, "size", int)}
            operations.append((key, operation))
        made = repository.commit(
            revision, str(header.get("summary", "")), str(header.get("description", "")), self.owner,
            header.get("parentCommit"), operations,
        )  # fmt: skip
        address = f"{str(request.base_url).rstrip('/')}/{repository.id}"
        return {"success": True, "commitOid": made.id, "commitUrl": f"{address}/commit/{made.id}", "hookOutput": ""}

    # Reading

    def info(self, request: Request, namespace: str, name: str, revision: str = MAIN, blobs: bool = False) -> dict:
        repository = self._readable(request, namespace, name)
        return _described(repository, repository.resolve(revision), blobs)

    def refs(self, request: Request, namespace: str, name: str) -> dict[str, Any]:
        repository = self._readable(request, namespace, name)
        kinds = {
            kind: [
                {"name": ref, "ref": f"refs/{kind}/{ref}", "targetCommit": commit}
                for ref, commit in repository.references(kind).items()
            ]
            for kind in ("heads", "tags")
        }
        return {"branches": kinds["heads"], "tags": kinds["tags"], "converts": [], "pullRequests": []}

    def commits(self, request: Request, namespace: str, name: str, revision: str) -> list[dict[str, Any]]:
        repository = self._readable(request, namespace, name)
        return [
            {
                "id": commit.id, "title": commit.title, "message": commit.message, "date": commit.date,
                "authors": [{"user": commit.author}],
            }
            for commit in repository.history(revision)
        ]  # fmt: skip

    def tree(self, request: Request, namespace: str, name: str, rest: str, recursive: bool = False) -> list[dict]:
        repository = self._readable(request, namespace, name)
        revision, folder = _revision_and_path(request, "tree")
        commit = repository.resolve(revision)
        below = f"{folder}/" if folder else ""
        files = {path: file for path, file in commit.files.items() if path.startswith(below)}
        if folder and not files:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return _entries(files, below, recursive)

    async def paths_info(self, request: Request, namespace: str, name: str, revision: str) -> list[dict]:
        repository = self._readable(request, namespace, name)
        files = repository.resolve(revision).files
        body = await _body(request)
        if request.headers.get("content-type", "").startswith("application/json"):
            paths = _parsed(body).get("paths", [])
        else:
            paths = parse_qs(body.decode()).get("paths", [])
        entries = {entry["path"]: entry for entry in _entries(files, "", recursive=True)}
        return [entries[path] for path in paths if path in entries]

    def file(self, request: Request, namespace: str, name: str, rest: str) -> Response:
        repository = self._readable(request, namespace, name)
        revision, path = _revision_and_path(request, "resolve")
        commit = repository.resolve(revision)
        headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes", "X-Content-Type-Options": "nosniff"}
        stored = commit.files.get(path)
        if stored is None:
            return _error(404, f"{path} does not exist on {revision}", "EntryNotFound", headers)
        headers |= {"ETag": f'"{stored.etag}"'}
        if stored.lfs:
            headers |= {"X-Linked-ETag": f'"{stored.etag}"', "X-Linked-Size": str(stored.size)}
        # what others have uploaded is never shown by a browser as a page of this server
        return FileResponse(self.storage.blob(stored.sha256), headers=headers, media_type="application/octet-stream")

    # Branches and tags

    async def make_branch(self, request: Request, namespace: str, name: str, branch: str) -> dict[str, Any]:
        repository, wanted = self._writable(request, namespace, name), await _json(request)
        repository.point("heads", branch, str(wanted.get("startingPoint") or MAIN))
        return {}

    def delete_branch(self, request: Request, namespace: str, name: str, branch: str) -> dict[str, Any]:
        self._writable(request, namespace, name).unpoint("heads", branch)
        return {}

    async def make_tag(self, request: Request, namespace: str, name: str, revision: str) -> dict[str, Any]:
        repository, wanted = self._writable(request, namespace, name), await _json(request)
        repository.point("tags", str(wanted.get("tag", "")), revision)
        return {}

    def delete_tag(self, request: Request, namespace: str, name: str, tag: str) -> dict[str, Any]:
        self._writable(request, namespace, name).unpoint("tags", tag)
        return {}


# Answers


def _described(repository: Repository, commit: Commit, blobs: bool = False) -> dict[str, Any]:
    settings = repository.settings
    siblings = [
        {"rfilename": path} | ({"size": file.size, "blobId": file.oid} | _lfs(file) if blobs else {})
        for path, file in commit.files.items()
    ]
    return {
        "_id": repository.id, "id": repository.id, "modelId": repository.id, "author": repository.id.split("/")[0],
        "sha": commit.id, "private": settings["private"], "gated": False, "disabled": False, "tags": [], "downloads": 0,
        "likes": 0, "createdAt": settings["created"], "lastModified": commit.date, "siblings": siblings,
    }  # fmt: skip


def _lfs(file: StoredFile) -> dict[str, Any]:
    size = len(pointer(file.sha256, file.size))
    return (
        {"lfs": {"oid": file.sha256, "sha256": file.sha256, "size": file.size, "pointerSize": size}} if file.lfs else {}
    )


def _entries(files: dict[str, StoredFile], below: str, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders under a prefix, as the client's RepoFile and RepoFolder."""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in files.items():
        parts = path.removeprefix(below).split("/")
        for depth in range(1, len(parts)):
            folder = below + "/".join(parts[:depth])
            if recursive or depth == 1:
                oid = hashlib.sha1(folder.encode(), usedforsecurity=False).hexdigest()
                entries.setdefault(folder, {"type": "directory", "oid": oid, "size": 0, "path": folder})
        if recursive or len(parts) == 1:
            entries[path] = {"type": "file", "oid": file.oid, "size": file.size, "path": path, **_lfs(file)}
    return list(entries.values())


def _error(status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> Response:
    said = {"X-Error-Message": quote(message, safe=" ,.:;'/()-_=")}
    return JSONResponse(
        {"error": message},
        status_code=status,
        headers=said | ({"X-Error-Code": code} if code else {}) | (headers or {}),
    )


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _error(error.status, str(error), error.code)


async def _no_room(request: Request, error: Exception) -> Response:
    assert isinstance(error, OSError)
    return _error(507, f"the server cannot write: {error.strerror}")


# Requests


def _revision_and_path(request: Request, word: str) -> tuple[str, str]:
    """What follows `/resolve/` or `/tree/`: a quoted revision is one segment, whatever slashes it has inside."""
    raw = request.scope["raw_path"].decode("ascii").partition("?")[0]
    revision, _, path = raw.partition(f"/{word}/")[2].partition("/")
    return unquote(revision), unquote(path)


async def _body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_LINE_BYTES:
            raise Refused(413, f"the request is longer than {MAX_LINE_BYTES} bytes")
    return body


async def _json(request: Request) -> dict[str, Any]:
    return _parsed(await _body(request) or b"{}")


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Refused(400, f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refused(400, "not a JSON object")
    return value


def _field(entry: Any, name: str, kind: type) -> Any:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind):
        raise Refused(400, f"{name}: expected {kind.__name__}, got {value!r:.80}")
    return value


def _listed(entry: dict[str, Any], name: str) -> list:
    return _field(entry, name, list)


def _decoded(content: str) -> bytes:
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise Refused(400, f"not base64: {error}") from error


async def _lines(request: Request) -> AsyncIterator[bytes]:
    """Non-empty lines of a body, as they come in."""
    rest, total = b"", 0
    try:
        async for chunk in request.stream():
            total += len(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line.strip():
                    yield line
            if len(rest) > MAX_LINE_BYTES or total > MAX_BODY_BYTES:
                raise Refused(413, "a commit's small files are too many; large ones go apart from it")
    except ClientDisconnect as error:
        raise Refused(400, "the client has gone") from error
    if rest.strip():
        yield rest
