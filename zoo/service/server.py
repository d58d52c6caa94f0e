"""`zoo serve`: the hub of a directory, on this machine unless told otherwise."""

import ipaddress
import os
import secrets
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import uvicorn

from zoo.errors import UserError
from zoo.service.app import make_app
from zoo.service.storage import Refused, Storage, checked_name

TOKEN_VARIABLE = "ZOO_HUB_TOKEN"
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")


def run(
    directory: Path,
    host: str = "127.0.0.1",
    port: int = 8080,
    owner: str = "zoo",
    listening: Callable[[str], None] | None = None,
) -> None:
    """Serves until it is stopped. To write with: the token in $ZOO_HUB_TOKEN, or a new one, shown on the terminal."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    shown = not token
    token = token or secrets.token_urlsafe(32)
    if not shown and len(token) < 16:
        raise UserError(f"{TOKEN_VARIABLE}: shorter than 16 characters; give a longer one, or none")
    try:
        checked_name(owner)
        storage = Storage(directory)
    except Refused as error:
        raise UserError(f"serve: {error}") from error
    except OSError as error:
        raise UserError(f"{directory}: cannot be written: {error.strerror}") from error
    local = _is_local(host)
    app = make_app(storage, token, owner, LOCAL_NAMES if local else ["*"])
    listener = _listen(host, port)
    shown_host = "127.0.0.1" if host == "localhost" else f"[{host}]" if ":" in host else host
    address = f"http://{shown_host}:{listener.getsockname()[1]}"
    lines = [f"serving {directory} at {address}; stop it with Ctrl-C"]
    lines.append(f"    export HF_ENDPOINT={address} HF_HUB_DISABLE_XET=1")
    lines.append(f"    export HF_TOKEN={token if shown else f'${TOKEN_VARIABLE}'}")
    if not local:
        lines.append("whoever reaches this address reads what is not private, and sees tokens pass: put TLS before it")
    print("\n".join(lines), file=sys.stderr, flush=True)
    if listening is not None:
        listening(address)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False))
    server.run(sockets=[listener])


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        # from now on, so that whoever reads the address may ask at once
        listener.listen()
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{host}:{port}: cannot be listened at: {why}; choose another --port") from error
    return listener
