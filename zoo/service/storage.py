"""Repositories in a directory: files by their hash, commits and references as small JSON files.

    blobs/<first two>/<sha256>            a file's content, once for all repositories
    repos/<kind>/<namespace>/<name>/      repo.json, commits/<id>.json, heads/<branch>, tags/<tag>

Everything is written under another name and renamed, and a reference last: what was killed in between is not seen.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote

from filelock import FileLock, Timeout

from zoo.files import write_json, write_text

MAIN = "main"
# what the protocol calls a kind of repository -> its folder, here and in addresses
KINDS = {"model": "models", "dataset": "datasets"}
_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Refused(Exception):
    """A request that cannot be answered: `status` and, as the client knows them, an error code."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class StoredFile:
    """`oid` is git's hash of what git would hold: the content, or for a large file the pointer to it."""

    sha256: str
    size: int
    lfs: bool
    oid: str

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, StoredFile]


def checked_name(name: str) -> str:
    if not _NAME.fullmatch(name) or name.endswith((".", "-", ".git", ".lock")):
        raise Refused(400, f"{name!r} cannot name a repository, a namespace, a branch or a tag")
    return name


def checked_reference(name: str) -> str:
    # a file's name, in which a slash takes three letters, has room for 255
    if len(quote(name, safe="")) > 200:
        raise Refused(400, f"{name[:80]!r}... is too long for a branch or a tag")
    for part in name.split("/"):
        checked_name(part)
    return name


def checked_path(path: str) -> str:
    """A path inside a repository: relative, and going nowhere else."""
    parts = path.split("/")
    wrong = any(part in ("", ".", "..", ".git") for part in parts) or re.search(r"[\x00-\x1f\x7f\\:]", path)
    if wrong or len(path) > 1000:
        raise Refused(400, f"{path[:200]!r} is not a path within a repository")
    return path


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def pointer(digest: str, size: int) -> bytes:
    """What git holds in the place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n".encode()


class Storage:
    """Of one server at a time. Raises Refused where another has the directory."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(root / ".lock")
        try:
            # one that was just killed may not be gone yet
            self._lock.acquire(timeout=3)
        except Timeout:
            raise Refused(409, f"{root} is served by another process") from None
        self.blobs, self.repos, self.incoming = root / "blobs", root / "repos", root / "incoming"
        for folder in (self.blobs, self.repos, self.incoming):
            folder.mkdir(parents=True, exist_ok=True)
        # half-received files of a server that was stopped
        for leftover in self.incoming.iterdir():
            leftover.unlink()

    def close(self) -> None:
        """Leaves the directory to another; the end of the process does the same."""
        self._lock.release()

    # Files by hash

    def blob(self, digest: str) -> Path:
        if not _SHA256.fullmatch(digest):
            raise Refused(400, f"{digest[:80]!r} is not a sha256")
        return self.blobs / digest[:2] / digest

    @contextmanager
    def receiving(self) -> Iterator[Any]:
        """A new file under a name of its own, gone again at the end unless `keep` has taken it."""
        with tempfile.NamedTemporaryFile(dir=self.incoming, delete=False) as file:
            path = Path(file.name)
            try:
                yield file
            finally:
                path.unlink(missing_ok=True)

    def keep(self, received: Path, found: str, digest: str, size: int) -> None:
        """Takes a received file, whose sha256 was found while it came, into the store if it is what it should be."""
        if received.stat().st_size != size or found != digest:
            raise Refused(422, f"what was received is not the {size} bytes of sha256 {digest}")
        target = self.blob(digest)
        target.parent.mkdir(exist_ok=True)
        os.replace(received, target)

    def _keep_bytes(self, content: bytes) -> StoredFile:
        digest = hashlib.sha256(content).hexdigest()
        if not self.blob(digest).exists():
            with self.receiving() as file:
                file.write(content)
                file.flush()
                self.keep(Path(file.name), digest, digest, len(content))
        return StoredFile(digest, len(content), lfs=False, oid=_git_oid(content))

    # Repositories

    def _folder(self, kind: str, namespace: str, name: str) -> Path:
        return self.repos / kind / checked_name(namespace) / checked_name(name)

    def list(self, kind: str) -> list["Repository"]:
        found = sorted((self.repos / kind).glob("*/*/repo.json"))
        return [Repository(self, path.parent, kind) for path in found]

    def get(self, kind: str, namespace: str, name: str) -> "Repository":
        folder = self._folder(kind, namespace, name)
        if not (folder / "repo.json").exists():
            raise Refused(404, f"no repository {namespace}/{name}", "RepoNotFound")
        return Repository(self, folder, kind)

    def create(self, kind: str, namespace: str, name: str, private: bool, author: str) -> "Repository":
        folder = self._folder(kind, namespace, name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{name}.lock"):
            if (folder / "repo.json").exists():
                raise Refused(409, f"{namespace}/{name} exists")
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            repository = Repository(self, folder, kind)
            repository.commit(MAIN, "initial commit", "", author, None, (), first=True)
            write_json(folder / "repo.json", {"private": private, "created": _now()})
        return repository


class Repository:
    def __init__(self, storage: Storage, folder: Path, kind: str):
        self.storage, self.folder, self.kind = storage, folder, kind

    @property
    def id(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def settings(self) -> dict[str, Any]:
        return json.loads((self.folder / "repo.json").read_text(encoding="utf-8"))

    def change(self, **settings: Any) -> None:
        with self._alone():
            write_json(self.folder / "repo.json", self.settings | settings)

    def delete(self) -> None:
        with self._alone():
            # repo.json first: without it there is no repository
            (self.folder / "repo.json").unlink()
            shutil.rmtree(self.folder)

    def _alone(self) -> FileLock:
        return FileLock(self.folder.parent / f".{self.folder.name}.lock")

    # References

    def references(self, kind: str) -> dict[str, str]:
        files = sorted((self.folder / kind).glob("*"))
        return {unquote(file.name): file.read_text(encoding="utf-8") for file in files if file.name[0] != "."}

    def _reference(self, kind: str, name: str) -> Path:
        (self.folder / kind).mkdir(exist_ok=True)
        return self.folder / kind / quote(checked_reference(name), safe="")

    def point(self, kind: str, name: str, revision: str) -> None:
        """Creates a branch (heads) or a tag (tags) at a revision."""
        with self._alone():
            if self._reference(kind, name).exists():
                raise Refused(409, f"{name} exists")
            write_text(self._reference(kind, name), self.resolve(revision).id)

    def unpoint(self, kind: str, name: str) -> None:
        if kind == "heads" and name == MAIN:
            raise Refused(403, f"{MAIN} cannot be deleted")
        with self._alone():
            if not self._reference(kind, name).exists():
                raise Refused(404, f"no {name}", "RevisionNotFound")
            self._reference(kind, name).unlink()

    # Commits

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag or an id."""
        names = {**self.references("tags"), **self.references("heads")}
        identity = names.get(revision.removeprefix("refs/heads/").removeprefix("refs/tags/"), revision)
        file = self.folder / "commits" / f"{identity}.json"
        if not re.fullmatch(r"[0-9a-f]{40}", identity) or not file.exists():
            raise Refused(404, f"{self.id} has no revision {revision}", "RevisionNotFound")
        fields = json.loads(file.read_text(encoding="utf-8"))
        files = {path: StoredFile(**stored) for path, stored in fields.pop("files").items()}
        return Commit(id=identity, files=files, **fields)

    def history(self, revision: str) -> Iterator[Commit]:
        commit = self.resolve(revision)
        while True:
            yield commit
            if commit.parent is None:
                return
            commit = self.resolve(commit.parent)

    def last_changes(self, commit: Commit) -> dict[str, Commit]:
        """The commit that each file and folder of a commit has its content from."""
        found: dict[str, Commit] = {}
        for newer in self.history(commit.id):
            before = {} if newer.parent is None else self.resolve(newer.parent).files
            for path in commit.files:
                if path in newer.files and newer.files[path] != before.get(path):
                    for changed in (path, *map(str, PurePosixPath(path).parents)):
                        found.setdefault(changed, newer)
        return found

    def commit(
        self,
        branch: str,
        title: str,
        message: str,
        author: str,
        parent: str | None,
        operations: Iterable[tuple[str, dict[str, Any]]],
        first: bool = False,
    ) -> Commit:
        """All operations or none, on the branch's present head. parent: the head that the client has seen.

        operations: ("file", {path, content}), ("lfsFile", {path, oid, size}), and ("deletedFile" or "deletedFolder",
        {path}).
        """
        (self.folder / "commits").mkdir(exist_ok=True)
        changes = [(kind, {**value, "path": checked_path(value["path"].rstrip("/"))}) for kind, value in operations]
        with self._alone() if not first else nullcontext():
            head = None if first else self._head(branch)
            if parent is not None and (head is None or not head.id.startswith(parent)):
                raise Refused(412, f"{branch} has moved since {parent}; fetch it and commit again")
            files = {} if head is None else dict(head.files)
            for kind, value in changes:
                self._apply(kind, value, files)
            _check_tree(files)
            return self._write(branch, head, title, message, author, files)

    def _head(self, branch: str) -> Commit:
        heads = self.references("heads")
        if branch not in heads:
            raise Refused(404, f"{self.id} has no branch {branch}", "RevisionNotFound")
        return self.resolve(heads[branch])

    def _apply(self, kind: str, value: dict[str, Any], files: dict[str, StoredFile]) -> None:
        path = value["path"]
        if kind == "file":
            files[path] = self.storage._keep_bytes(value["content"])
        elif kind == "lfsFile":
            stored = self.storage.blob(value["oid"])
            if not stored.exists() or stored.stat().st_size != value["size"]:
                raise Refused(422, f"{path}: its content {value['oid']} was not uploaded")
            oid = _git_oid(pointer(value["oid"], value["size"]))
            files[path] = StoredFile(value["oid"], value["size"], lfs=True, oid=oid)
        elif kind == "deletedFile":
            if files.pop(path, None) is None:
                raise Refused(404, f"{path} is not there to be deleted", "EntryNotFound")
        elif kind == "deletedFolder":
            below = [name for name in files if name.startswith(f"{path}/")]
            if not below:
                raise Refused(404, f"{path}/ is not there to be deleted", "EntryNotFound")
            for name in below:
                del files[name]
        else:
            raise Refused(400, f"{kind!r} is not an operation of a commit")

    def _write(self, branch: str, head: Commit | None, title: str, message: str, author: str, files) -> Commit:
        fields = {
            "parent": None if head is None else head.id, "title": title, "message": message, "author": author,
            "date": _now(), "files": {path: asdict(file) for path, file in sorted(files.items())},
        }  # fmt: skip
        content = json.dumps(fields, sort_keys=True) + uuid.uuid4().hex
        identity = hashlib.sha1(content.encode(), usedforsecurity=False).hexdigest()
        write_json(self.folder / "commits" / f"{identity}.json", fields)
        write_text(self._reference("heads", branch), identity)
        return Commit(id=identity, **(fields | {"files": files}))


def _check_tree(files: dict[str, StoredFile]) -> None:
    """A name is a file or a folder, never both."""
    for path in files:
        parents = path.split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            if "/".join(parents[:depth]) in files:
                raise Refused(409, f"{'/'.join(parents[:depth])} is a file, so there is no {path}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
