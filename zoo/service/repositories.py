"""What the hub's protocol says of the repositories of one kind, models or data sets, over `Storage`."""

from collections.abc import Callable
from typing import Annotated, Any
from urllib.parse import parse_qs, quote

from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from zoo.service.access import Access
from zoo.service.messages import (
    decoded,
    described,
    entries,
    error_answer,
    field,
    lines_of,
    listed,
    page,
    parsed,
    prefix,
    read_body,
    read_json,
    revision_and_path,
)
from zoo.service.storage import MAIN, Commit, Refused, Repository

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
PAGE_ENTRIES = 1000  # of a tree, in one answer


class Repositories:
    """The routes of one kind. `owner`: who makes commits."""

    def __init__(self, app: FastAPI, access: Access, kind: str, owner: str):
        self.access, self.kind, self.owner = access, kind, owner
        one, files = f"/api/{kind}/{{namespace}}/{{name}}", f"{prefix(kind)}/{{namespace}}/{{name}}"
        routes: list[tuple[str, str, Callable]] = [
            ("GET", f"/api/{kind}", self.listing),
            ("PUT", f"{one}/settings", self.settings),
            ("POST", f"{one}/preupload/{{revision:path}}", self.preupload),
            ("POST", f"{files}.git/info/lfs/objects/batch", self.batch),
            ("POST", f"{one}/commit/{{revision:path}}", self.commit),
            ("GET", f"{one}/refs", self.refs),
            ("GET", f"{one}/commits/{{revision:path}}", self.commits),
            ("GET", f"{one}/tree/{{rest:path}}", self.tree),
            ("POST", f"{one}/paths-info/{{revision:path}}", self.paths_info),
            ("POST", f"{one}/branch/{{branch:path}}", self.make_branch),
            ("DELETE", f"{one}/branch/{{branch:path}}", self.delete_branch),
            ("POST", f"{one}/tag/{{revision:path}}", self.make_tag),
            ("DELETE", f"{one}/tag/{{tag:path}}", self.delete_tag),
            ("GET", f"{one}/revision/{{revision:path}}", self.info),
            ("GET", one, self.info),
            ("GET", f"{files}/resolve/{{rest:path}}", self.file),
            ("HEAD", f"{files}/resolve/{{rest:path}}", self.file),
        ]
        for method, path, endpoint in routes:
            app.add_api_route(path, endpoint, methods=[method], response_model=None)

    def _readable(self, request: Request, namespace: str, name: str) -> Repository:
        return self.access.readable(request, self.kind, namespace, name)

    def _writable(self, request: Request, namespace: str, name: str) -> Repository:
        return self.access.writable(request, self.kind, namespace, name)

    # All of them, and their settings

    def listing(self, request: Request, search: str = "", author: str = "") -> list[dict[str, Any]]:
        known = self.access.has_token(request)
        return [
            described(repository, repository.resolve(MAIN))
            for repository in self.access.storage.list(self.kind)
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
            if not self.access.storage.blob(digest).exists():
                upload = {"href": f"{base}/upload/{digest}?{self.access.signed(digest, size)}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{base}/verify"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

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
        address = f"{page(request, self.kind, repository.id)}/commit/{made.id}"
        return {"success": True, "commitOid": made.id, "commitUrl": address, "hookOutput": ""}

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

    def tree(
        self,
        request: Request,
        namespace: str,
        name: str,
        rest: str,
        recursive: bool = False,
        expand: bool = False,
        limit: Annotated[int, Query(ge=1)] = PAGE_ENTRIES,
        cursor: Annotated[int, Query(ge=0)] = 0,
    ) -> Response:
        repository = self._readable(request, namespace, name)
        revision, folder = revision_and_path(request, "tree")
        commit = repository.resolve(revision)
        below = f"{folder}/" if folder else ""
        files = {path: file for path, file in commit.files.items() if path.startswith(below)}
        if folder and not files:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        found = entries(files, below, recursive)
        end, headers = cursor + min(limit, PAGE_ENTRIES), {}
        if end < len(found):
            # the next page is of the same commit, though the branch may move
            path = f"/api/{self.kind}/{repository.id}/tree/{commit.id}/{quote(folder, safe='')}".rstrip("/")
            following = request.url.replace(path=path).include_query_params(cursor=end)
            headers["Link"] = f'<{following}>; rel="next"'
        return JSONResponse(self._expanded(repository, commit, found[cursor:end], expand), headers=headers)

    async def paths_info(self, request: Request, namespace: str, name: str, revision: str) -> list[dict]:
        repository = self._readable(request, namespace, name)
        commit = repository.resolve(revision)
        body = await read_body(request)
        if request.headers.get("content-type", "").startswith("application/json"):
            wanted = parsed(body)
            paths = [path for path in listed(wanted, "paths") if isinstance(path, str)]
        else:
            wanted = parse_qs(body.decode(errors="replace"))
            paths = wanted.get("paths", [])
        expand = wanted.get("expand") in (True, ["true"], ["True"])
        known = {entry["path"]: entry for entry in entries(commit.files, "", recursive=True)}
        return self._expanded(repository, commit, [known[path] for path in paths if path in known], expand)

    def _expanded(self, repository: Repository, commit: Commit, found: list[dict], expand: bool) -> list[dict]:
        changes = repository.last_changes(commit) if expand else {}
        return [
            entry | ({"lastCommit": {"id": last.id, "title": last.title, "date": last.date}} if last else {})
            for entry in found
            for last in [changes.get(entry["path"])]
        ]

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
        return FileResponse(
            self.access.storage.blob(stored.sha256), headers=headers, media_type="application/octet-stream"
        )

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
