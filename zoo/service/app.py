"""The hub's protocol, as the stock huggingface_hub client speaks it: the account, and repositories of both kinds."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from huggingface_hub import DatasetCard, ModelCard
from starlette.middleware.trustedhost import TrustedHostMiddleware
from yaml import YAMLError

from zoo.service.access import Access
from zoo.service.messages import field, no_room, no_text, page, read_json, refusal
from zoo.service.repositories import Repositories
from zoo.service.storage import KINDS, Refused, Storage


def make_app(storage: Storage, token: str, owner: str, allowed_hosts: Iterable[str]) -> FastAPI:
    """The application. owner: the namespace of names without one. allowed_hosts: what requests may call it."""
    app = FastAPI(title="zoo hub", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts))
    app.add_exception_handler(Refused, refusal)
    app.add_exception_handler(OSError, no_room)
    app.add_exception_handler(UnicodeError, no_text)
    access = Access(storage, token)
    _Account(app, access, owner)
    # data sets first: what is asked of one may read as a file of a model in the namespace "datasets"
    for kind in reversed(KINDS.values()):
        Repositories(app, access, kind, owner)
    return app


class _Account:
    """What is said of no one repository, or before there is one."""

    def __init__(self, app: FastAPI, access: Access, owner: str):
        self.access, self.storage, self.owner = access, access.storage, owner
        routes: list[tuple[str, str, Callable]] = [
            ("GET", "/api/whoami-v2", self.whoami),
            ("POST", "/api/validate-yaml", self.validate_yaml),
            ("POST", "/api/repos/create", self.create),
            ("DELETE", "/api/repos/delete", self.delete),
            ("PUT", "/upload/{digest}", self.upload),
            ("POST", "/verify", self.verify),
        ]
        for method, path, endpoint in routes:
            app.add_api_route(path, endpoint, methods=[method], response_model=None)

    # The account, and repositories

    def whoami(self, request: Request) -> dict[str, Any]:
        self.access.check_token(request)
        access = {"displayName": "zoo", "role": "write"}
        return {
            "type": "user", "id": self.owner, "name": self.owner, "fullname": self.owner, "orgs": [],
            "auth": {"type": "access_token", "accessToken": access},
        }  # fmt: skip

    async def validate_yaml(self, request: Request) -> dict[str, Any]:
        self.access.check_token(request)
        wanted = await read_json(request)
        card = DatasetCard if wanted.get("repoType") == "dataset" else ModelCard
        try:
            card(str(wanted.get("content", "")), ignore_metadata_errors=False)
        except (ValueError, TypeError, YAMLError, RecursionError) as error:
            return {"errors": [{"message": str(error)[:500]}], "warnings": []}
        return {"errors": [], "warnings": []}

    async def create(self, request: Request) -> Response:
        self.access.check_token(request)
        wanted = await read_json(request)
        kind, namespace, name = self._named(wanted)
        address = page(request, kind, f"{namespace}/{name}")
        try:
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            repository = self.storage.create(kind, namespace, name, private, self.owner)
        except Refused as error:
            if error.status != 409:
                raise
            return JSONResponse({"error": str(error), "url": address}, status_code=409)
        return JSONResponse({"url": address, "name": repository.id, "id": repository.id})

    async def delete(self, request: Request) -> dict[str, Any]:
        self.access.check_token(request)
        kind, namespace, name = self._named(await read_json(request))
        self.storage.get(kind, namespace, name).delete()
        return {}

    def _named(self, wanted: dict[str, Any]) -> tuple[str, str, str]:
        """(kind, namespace, name) of a repository to be made or deleted."""
        kind = KINDS.get(wanted.get("type") or "model")
        if kind is None:
            raise Refused(400, f"this server has models and datasets only, no {wanted['type']}")
        namespace, _, name = field(wanted, "name", str).rpartition("/")
        if wanted.get("organization") is not None:
            namespace = field(wanted, "organization", str)
        return kind, namespace or self.owner, name

    # Uploads

    async def upload(self, request: Request, digest: str, size: int, until: int, signature: str) -> dict[str, Any]:
        self.access.check_signature(digest, size, until, signature)
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
        self.access.check_token(request)
        wanted = await read_json(request)
        stored = self.storage.blob(field(wanted, "oid", str))
        if not stored.exists() or stored.stat().st_size != field(wanted, "size", int):
            raise Refused(422, "its content has not arrived")
        return {}
