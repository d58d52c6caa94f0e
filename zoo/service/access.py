"""Who may do what: reading is free but for private repositories; everything else wants the token.

Uploads go to addresses that are signed for one file and one hour, because the client sends no token with them.
"""

import hashlib
import hmac
import secrets
import time

from fastapi import Request

from zoo.service.storage import Refused, Repository, Storage

SIGNED_FOR_SECONDS = 3600


class Access:
    def __init__(self, storage: Storage, token: str):
        self.storage, self.token = storage, token
        self.key = secrets.token_bytes(32)

    def has_token(self, request: Request) -> bool:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if not given:
            return False
        if kind.lower() != "bearer" or not hmac.compare_digest(given.encode(), self.token.encode()):
            raise Refused(401, "Invalid credentials in Authorization header")
        return True

    def check_token(self, request: Request) -> None:
        if not self.has_token(request):
            raise Refused(401, "this wants the server's token: set HF_TOKEN")

    def readable(self, request: Request, kind: str, namespace: str, name: str) -> Repository:
        # whether a private repository exists is nobody's business either
        known = self.has_token(request)
        repository = self.storage.get(kind, namespace, name)
        if repository.settings["private"] and not known:
            raise Refused(404, f"no repository {namespace}/{name}", "RepoNotFound")
        return repository

    def writable(self, request: Request, kind: str, namespace: str, name: str) -> Repository:
        self.check_token(request)
        return self.storage.get(kind, namespace, name)

    def signed(self, digest: str, size: int) -> str:
        """The query of an address to which a file of this hash and size may go."""
        until = int(time.time()) + SIGNED_FOR_SECONDS
        return f"size={size}&until={until}&signature={self._signature(digest, size, until)}"

    def check_signature(self, digest: str, size: int, until: int, signature: str) -> None:
        expected = self._signature(digest, size, until)
        if not hmac.compare_digest(signature.encode(), expected.encode()) or time.time() > until:
            raise Refused(403, "this address was not given by the server, or is too old; ask again")

    def _signature(self, digest: str, size: int, until: int) -> str:
        return hmac.new(self.key, f"{digest}:{size}:{until}".encode(), hashlib.sha256).hexdigest()
