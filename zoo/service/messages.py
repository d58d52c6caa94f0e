"""What the hub's protocol says in requests and answers, checked on the way in."""

import base64
import binascii
import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote, unquote

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from zoo.service.storage import Commit, Refused, Repository, StoredFile, pointer

MAX_LINE_BYTES = 16 * 2**20  # of a commit's body
MAX_BODY_BYTES = 128 * 2**20


# Answers


def prefix(kind: str) -> str:
    """What addresses begin with, those of the API apart."""
    return "" if kind == "models" else f"/{kind}"


def page(request: Request, kind: str, identity: str) -> str:
    return f"{str(request.base_url).rstrip('/')}{prefix(kind)}/{identity}"


def described(repository: Repository, commit: Commit, blobs: bool = False) -> dict[str, Any]:
    settings = repository.settings
    siblings = [
        {"rfilename": path} | ({"size": file.size, "blobId": file.oid} | lfs_fields(file) if blobs else {})
        for path, file in commit.files.items()
    ]
    return {
        "_id": repository.id, "id": repository.id, "author": repository.id.split("/")[0],
        "sha": commit.id, "private": settings["private"], "gated": False, "disabled": False, "tags": [], "downloads": 0,
        "likes": 0, "createdAt": settings["created"], "lastModified": commit.date, "siblings": siblings,
    } | ({"modelId": repository.id} if repository.kind == "models" else {})  # fmt: skip


def lfs_fields(file: StoredFile) -> dict[str, Any]:
    size = len(pointer(file.sha256, file.size))
    return (
        {"lfs": {"oid": file.sha256, "sha256": file.sha256, "size": file.size, "pointerSize": size}} if file.lfs else {}
    )


def entries(files: dict[str, StoredFile], below: str, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders under a prefix, as the client's RepoFile and RepoFolder."""
    found: dict[str, dict[str, Any]] = {}
    for path, file in files.items():
        parts = path.removeprefix(below).split("/")
        for depth in range(1, len(parts)):
            folder = below + "/".join(parts[:depth])
            if recursive or depth == 1:
                oid = hashlib.sha1(folder.encode(), usedforsecurity=False).hexdigest()
                found.setdefault(folder, {"type": "directory", "oid": oid, "size": 0, "path": folder})
        if recursive or len(parts) == 1:
            found[path] = {"type": "file", "oid": file.oid, "size": file.size, "path": path, **lfs_fields(file)}
    return list(found.values())


def error_answer(status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> Response:
    said = {"X-Error-Message": quote(message, safe=" ,.:;'/()-_=")}
    return JSONResponse(
        {"error": message},
        status_code=status,
        headers=said | ({"X-Error-Code": code} if code else {}) | (headers or {}),
    )


async def refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error_answer(error.status, str(error), error.code)


async def no_room(request: Request, error: Exception) -> Response:
    assert isinstance(error, OSError)
    if isinstance(error, FileNotFoundError):
        return error_answer(404, "it was deleted meanwhile", "RepoNotFound")
    return error_answer(507, f"the server cannot read or write: {error.strerror}")


async def no_text(request: Request, error: Exception) -> Response:
    # half a surrogate pair, or bytes that are not UTF-8: nothing that can be a name or a text
    return error_answer(400, f"the request holds text that is not UTF-8: {type(error).__name__}")


# Requests


def revision_and_path(request: Request, word: str) -> tuple[str, str]:
    """What follows `/resolve/` or `/tree/`: a quoted revision is one segment, whatever slashes it has inside."""
    raw = request.scope["raw_path"].decode("ascii").partition("?")[0]
    owner = "/".join(request.path_params[part] for part in ("namespace", "name"))
    revision, _, path = raw.partition(f"/{owner}/{word}/")[2].partition("/")
    return unquote(revision), unquote(path)


async def read_body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_LINE_BYTES:
            raise Refused(413, f"the request is longer than {MAX_LINE_BYTES} bytes")
    return body


async def read_json(request: Request) -> dict[str, Any]:
    return parsed(await read_body(request) or b"{}")


def parsed(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refused(400, "not a JSON object")
    return value


def field(entry: Any, name: str, kind: type) -> Any:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind):
        raise Refused(400, f"{name}: expected {kind.__name__}, got {value!r:.80}")
    return value


def listed(entry: dict[str, Any], name: str) -> list:
    return field(entry, name, list)


def decoded(content: str) -> bytes:
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(400, f"not base64: {error}") from error


async def lines_of(request: Request) -> AsyncIterator[bytes]:
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
