"""`zoo push`: a finished model to a hub, checked before anything is sent and committed in one piece."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from zoo.adapter_types import CONFIG, WEIGHTS
from zoo.errors import RunError, UserError
from zoo.hub_errors import hub_failure
from zoo.model_directory import check_finished

# of a pickle nobody knows what it does when it is opened
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_AGAIN = "nothing is committed, push again"


def check(repo: str) -> str:
    """The full name of a repository that this token may write to. Raises UserError, RunError where the hub is away."""
    _check_name(repo)
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{repo}: HF_HUB_OFFLINE is set, and a push needs the hub; unset it")
    token = get_token()
    if token is None:
        raise UserError("no token for the hub: set HF_TOKEN, or log in with: hf auth login")
    if not re.fullmatch(r"[!-~]+", token):
        # the client would quote it, where it does not fit into a header
        raise UserError("the token for the hub is none: a token is of ASCII letters without spaces; look at HF_TOKEN")
    api = _api()
    with _words(api, repo):
        me = api.whoami()
    names = [me["name"], *(organisation["name"] for organisation in me.get("orgs", []))]
    namespace = repo.split("/")[0] if "/" in repo else me["name"]
    access = me.get("auth", {}).get("accessToken", {})
    if access.get("role") == "read":
        raise UserError(f"{repo}: the token {access.get('displayName', '')!r} may read only; use one that may write")
    full = f"{namespace}/{repo.split('/')[-1]}"
    # a hub of one's own lets its token write anywhere
    if namespace not in names and api.endpoint == "https://huggingface.co":
        raise UserError(f"{repo}: {me['name']} may write to {', '.join(names)} only")
    return full


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo}: cannot name a repository: {error}") from error


def push(
    directory: Path, repo: str, private: bool = False, branch: str | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Uploads what zoo train has left, without checkpoints, in one commit; returns `repo`, `url`, `commit`, `files`.

    dry_run: nothing is sent, and no hub is asked. Raises UserError, or RunError where the hub fails.
    """
    _check_name(repo)
    files = contents(directory)
    answer: dict[str, Any] = {
        "repo": repo,
        "files": {file.relative_to(directory).as_posix(): file.stat().st_size for file in files},
    }
    if dry_run:
        return answer | {"url": None, "commit": None}
    full = check(repo)
    api = _api()
    with _words(api, full):
        url = api.create_repo(full, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(full, branch=branch, exist_ok=True)
        made = api.upload_folder(
            repo_id=full,
            folder_path=directory,
            allow_patterns=list(answer["files"]),
            revision=branch,
            commit_message=f"Upload {_name(directory)}",
        )
    return answer | {"repo": full, "url": str(url), "commit": made.oid}


def _api() -> HfApi:
    api = HfApi()
    # where large files go by a protocol that only huggingface.co has, unless the client is told that there is another
    if not (urlsplit(api.endpoint).hostname or "").endswith("huggingface.co"):
        constants.HF_HUB_DISABLE_XET = True
    return api


def contents(directory: Path) -> list[Path]:
    """What is pushed of a finished run, or of a directory with an adapter. Raises UserError."""
    adapter = all((directory / name).is_file() for name in (CONFIG, WEIGHTS))
    if not adapter:
        check_finished(directory)
    # and what sentence-transformers knows of its modules, in folders with a number
    found = sorted([*directory.glob("*"), *directory.glob("[0-9]_*/config.json")])
    files = [file for file in found if file.is_file() and not file.name.startswith(".")]
    pickles = [file.name for file in files if file.suffix in _PICKLES]
    if pickles:
        raise UserError(f"{directory}: {', '.join(pickles)} may run code when it is opened; push safetensors only")
    if not (directory / "README.md").exists():
        raise UserError(f"{directory}: no README.md; a model without a card helps nobody")
    return files


def _name(directory: Path) -> str:
    try:
        return json.loads((directory / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    except (OSError, ValueError, KeyError, IndexError):
        return directory.name


@contextmanager
def _words(api: HfApi, repo: str) -> Iterator[None]:
    try:
        yield
    except (httpx2.HTTPError, OSError, RuntimeError) as error:
        # the client wraps what happens to a large file in a RuntimeError
        reason = f"{type(error).__name__}: {error}"
        unknown = RunError(f"{repo}: cannot reach {api.endpoint}: {reason}; {_AGAIN}")
        raise hub_failure(repo, error, _AGAIN) or unknown from error
