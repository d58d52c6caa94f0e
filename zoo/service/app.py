"""The model part of the hub's protocol over `Storage`, as the stock huggingface_hub client speaks it.

Reading is free but for private repositories; everything else wants the token. Uploads go to addresses that are signed
for one file and one hour, because the client sends no token with them.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from huggingface_hub import ModelCard
from starlette.middleware.trustedhost import TrustedHostMiddleware
from yaml import YAMLError

from zoo.service.messages import (
    decoded,
    described,
    entries,
    error_answer,
    field,
    lines_of,
    listed,
    no_room,
    no_text,
    parsed,
    read_body,
    read_json,
    refusal,
    revision_and_path,
)
from zoo.service.storage import MAIN, Refused, Repository, Storage

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
        app.add_exception_handler(Refused, refusal)
        app.add_exception_handler(OSError, no_room)
        app.add_exception_handler(UnicodeError, no_text)
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
        self._may_write(request)
        content = (await read_json(request)).get("content", "")
        try:
            ModelCard(str(content), ignore_metadata_errors=False)
        except (ValueError, TypeError, YAMLError, RecursionError) as error:
            return {"errors": [{"message": str(error)[:500]}], "warnings": []}
        return {"errors": [], "warnings": []}

    async def create(self, request: Request) -> Response:
        self._may_write(request)
        wanted = await read_json(request)
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
        namespace, name = self._named(await read_json(request))
        self.storage.get("models", namespace, name).delete()
        return {}

    def _named(self, wanted: dict[str, Any]) -> tuple[str, str]:
        if wanted.get("type", "model") not in ("model", None):
            raise Refused(400, f"this server has models only, no {wanted['type']}")
        namespace, _, name = field(wanted, "name", str).rpartition("/")
        if wanted.get("organization") is not None:
            namespace = field(wanted, "organization", str)
        return namespace or self.owner, name

    def models(self, request: Request, search: str = "", author: str = "") -> list[dict[str, Any]]:
        known = self._has_token(request)
        return [
            described(repository, repository.resolve(MAIN))
            for repository in self.storage.list("models")
            if (known or not repository.settings["private"])
            and search.lower() in repository.id.lower()
            and (not author or repository.id.startswith(f"{author}/"))
        ]

    async def settings(self, request: Request, namespace: str, name: str) -> dict[str, Any]:
        repository, wanted = self._writable(request, namespace, name), await read_json(request)
        unknown = sorted(wanted.keys() - {"private", "visibility"})
        if unknown or not wanted:
            raise Refused(400, f"this server sets private and visibility only, not {', '.join(unknown) or 'nothing'}")
        if "visibility" in wanted and wanted["visibility"] not in ("private", "public"):
            raise Refused(400, "visibility is private or public")
        private = bool(wanted["private"]) if "private" in wanted else wanted["visibility"] == "private"
        repository.change(private=private)
        return {"private": private}

    # Uploads

    async def preupload(self, request: Request, namespace: str, name: str, revision: str) -> dict[str, Any]:
        repository, wanted = self._writable(request, namespace, name), await read_json(request)
        there = repository.resolve(revision).files
        modes = []
        for file in listed(wanted, "files"):
            path, sample = field(file, "path", str), decoded(field(file, "sample", str))
            large = (
                field(file, "size", int) >= LARGE_FROM_BYTES or path.lower().endswith(LARGE_ENDINGS) or b"\0" in sample
            )
            entry = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            # the client leaves out what has not changed
            modes.append(entry | ({"oid": there[path].etag} if path in there else {}))
        return {"files": modes}

    async def batch(self, request: Request, namespace: str, name: str) -> dict[str, Any]:
        self._writable(request, namespace, name)
        wanted, base = await read_json(request), str(request.base_url).rstrip("/")
        objects = []
        for entry in listed(wanted, "objects"):
            digest, size = field(entry, "oid", str), field(entry, "size", int)
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
        expected = self._signature(digest, size, until)
        if not hmac.compare_digest(signature.encode(), expected.encode()) or time.time() > until:
            raise Refused(403, "this address was not given by the server, or is too old; ask again")
        received, hashed = 0, hashlib.sha256()
        with self.storage.receiving() as file:
            async for chunk in request.stream():
                received += len(chunk)
                if received > size:
                    raise Refused(422, f"more than the {size} bytes that were announced")
                hashed.update(chunk)
                file.write(chunk)
            file.flush()
            self.storage.keep(Path(file.name), hashed.hexdigest(), digest, size)
        return {}

    async def verify(self, request: Request) -> dict[str, Any]:
        self._may_write(request)
        wanted = await read_json(request)
        stored = self.storage.blob(field(wanted, "oid", str))
        if not stored.exists() or stored.stat().st_size != field(wanted, "size", int):
            raise Refused(422, "its content has not arrived")
        return {}

    async def commit(
        self, request: Request, namespace: str, name: str, revision: str, create_pr: bool = False
    ) -> dict[str, Any]:
        repository = self._writable(request, namespace, name)
        if create_pr:
            raise Refused(400, "this server has no pull requests; commit to a branch")
        header: dict[str, Any] = {}
        operations = []
        async for line in lines_of(request):
            entry = parsed(line)
            key, value = field(entry, "key", str), field(entry, "value", dict)
            if key == "header":
                header = value
                continue
            operation: dict[str, Any] = {"path": field(value, "path", str)}
            if key == "file":
                operation["content"] = decoded(field(value, "content", str))
            elif key == "lfsFile":
                operation |= {"oid": field(value, "oid", str), "size": field(value, "size", int)}
            operations.append((key, operation))
        if header.get("parentCommit") is not None:
            field(header, "parentCommit", str)
        made = repository.commit(
            revision, str(header.get("summary", "")), str(header.get("description", "")), self.owner,
            header.get("parentCommit"), operations,
        )  # fmt: skip
        address = f"{str(request.base_url).rstrip('/')}/{repository.id}"
        return {"success": True, "commitOid": made.id, "commitUrl": f"{address}/commit/{made.id}", "hookOutput": ""}

    # Reading

    def info(self, request: Request, namespace: str, name: str, revision: str = MAIN, blobs: bool = False) -> dict:
        repository = self._readable(request, namespace, name)
        return described(repository, repository.resolve(revision), blobs)

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
        revision, folder = revision_and_path(request, "tree")
        commit = repository.resolve(revision)
        below = f"{folder}/" if folder else ""
        files = {path: file for path, file in commit.files.items() if path.startswith(below)}
        if folder and not files:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return entries(files, below, recursive)

    async def paths_info(self, request: Request, namespace: str, name: str, revision: str) -> list[dict]:
        repository = self._readable(request, namespace, name)
        files = repository.resolve(revision).files
        body = await read_body(request)
        if request.headers.get("content-type", "").startswith("application/json"):
            paths = [path for path in listed(parsed(body), "paths") if isinstance(path, str)]
        else:
            paths = parse_qs(body.decode(errors="replace")).get("paths", [])
        known = {entry["path"]: entry for entry in entries(files, "", recursive=True)}
        return [known[path] for path in paths if path in known]

    def file(self, request: Request, namespace: str, name: str, rest: str) -> Response:
        repository = self._readable(request, namespace, name)
        revision, path = revision_and_path(request, "resolve")
        commit = repository.resolve(revision)
        headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes", "X-Content-Type-Options": "nosniff"}
        stored = commit.files.get(path)
        if stored is None:
            return error_answer(404, f"{path} does not exist on {revision}", "EntryNotFound", headers)
        headers |= {"ETag": f'"{stored.etag}"'}
        if stored.lfs:
            headers |= {"X-Linked-ETag": f'"{stored.etag}"', "X-Linked-Size": str(stored.size)}
        # what others have uploaded is never shown by a browser as a page of this server
        return FileResponse(self.storage.blob(stored.sha256), headers=headers, media_type="application/octet-stream")

    # Branches and tags

    async def make_branch(self, request: Request, namespace: str, name: str, branch: str) -> dict[str, Any]:
        repository, wanted = self._writable(request, namespace, name), await read_json(request)
        repository.point("heads", branch, str(wanted.get("startingPoint") or MAIN))
        return {}

    def delete_branch(self, request: Request, namespace: str, name: str, branch: str) -> dict[str, Any]:
        self._writable(request, namespace, name).unpoint("heads", branch)
        return {}

    async def make_tag(self, request: Request, namespace: str, name: str, revision: str) -> dict[str, Any]:
        repository, wanted = self._writable(request, namespace, name), await read_json(request)
        repository.point("tags", field(wanted, "tag", str), revision)
        return {}

    def delete_tag(self, request: Request, namespace: str, name: str, tag: str) -> dict[str, Any]:
        self._writable(request, namespace, name).unpoint("tags", tag)
        return {}
