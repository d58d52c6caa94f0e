"""How a hub fails, in words. The token is in none of them."""

from collections.abc import Iterator

import httpx2
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from zoo.errors import RunError, UserError


def hub_failure(what: str, error: BaseException, remedy: str) -> UserError | RunError | None:
    """What a library's error says of the hub, or None where its cause is another, such as a file that is not there.

    what: begins the message. remedy: ends it where the hub, and not the user's words, is to blame.
    """
    for cause in _causes(error):
        if isinstance(cause, UnicodeEncodeError) and cause.encoding == "ascii":
            # what a header cannot hold
            return UserError(f"{what}: the token for the hub is not of ASCII letters; look at HF_TOKEN")
        missing = isinstance(cause, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE
        if missing or isinstance(cause, OfflineModeIsEnabled):
            return UserError(f"{what}: not in the cache, and HF_HUB_OFFLINE is set; fetch it once without")
        if isinstance(cause, RemoteEntryNotFoundError):
            return None
        if isinstance(cause, RevisionNotFoundError):
            return UserError(f"{what}: {constants.ENDPOINT} does not have this revision of it")
        if isinstance(cause, RepositoryNotFoundError) or _status(cause) == 404:
            return UserError(f"{what}: {constants.ENDPOINT} does not know it, or the token may not see it")
        if isinstance(cause, HfHubHTTPError):
            said = cause.response.headers.get("X-Error-Message") or f"status {_status(cause)}"
            if _status(cause) in (401, 403):
                return UserError(f"{what}: {constants.ENDPOINT} does not accept the token: {said}; set HF_TOKEN")
            return RunError(f"{what}: {constants.ENDPOINT} failed: {said}; {remedy}")
        if isinstance(cause, httpx2.HTTPError):
            return RunError(f"{what}: cannot reach {constants.ENDPOINT}: {type(cause).__name__}: {cause}; {remedy}")
    return None


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def dataset_failure(what: str, repo: str, revision: str | None, remedy: str) -> UserError | RunError | None:
    """The same of a dataset, by asking the hub once more: the datasets library keeps no cause."""
    try:
        HfApi().dataset_info(repo, revision=revision, timeout=10)
    except (httpx2.HTTPError, OSError, UnicodeEncodeError) as error:
        return hub_failure(what, error, remedy)
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from: the libraries wrap a hub's answer in several of their own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
