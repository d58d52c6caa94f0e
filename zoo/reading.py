"""Data sets as their sources have them: hub, directory, files, package index, by the datasets library's readers."""

import errno
import inspect
import tarfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import httpx2
from datasets import Dataset, IterableDataset

from zoo.data_sections import SourceSection
from zoo.errors import RunError, UserError
from zoo.hub_errors import dataset_failure
from zoo.sources import Source, resolve

# file ending -> the datasets library's name for its reader; recipes may name any other reader
_BUILDERS = {".csv": "csv", ".tsv": "csv", ".tab": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_BUILDERS |= {".txt": "text", ".conll": "conll"}
# what readers raise for files that are not what they should be: damaged archives and empty files too
UNREADABLE = (
    *(OSError, ValueError, TypeError, RuntimeError, datasets.exceptions.DatasetsError, httpx2.HTTPError),
    *(EOFError, StopIteration, IndexError, AttributeError, KeyError, tarfile.TarError, zlib.error),
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TAB_SEPARATED = {".tsv", ".tab"}


@contextmanager
def room_in_cache(folder: Path | None = None) -> Iterator[None]:
    """Words for a cache that is full: that of the datasets library, or another folder."""
    try:
        yield
    except (OSError, datasets.exceptions.DatasetsError) as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
                where = folder or datasets.config.HF_DATASETS_CACHE
                raise RunError(f"{where}: cannot be written: {cause.strerror}; make room, or set HF_HOME") from error
            cause = cause.__cause__
        raise


def read(section: SourceSection, streaming: bool = False) -> dict[str, Any]:
    """The source's own splits, as the datasets library reads them, or will read them bit by bit."""
    source = resolve(section.place, kind="dataset", revision=section.revision, files=list(section.files.values()))
    for key in section.options:
        if key in inspect.signature(datasets.load_dataset).parameters:
            raise UserError(f"data.options.{key}: not an option of a format; say it with the other keys of data")
    arguments = _loading_arguments(section, source)
    _check_json(arguments)
    try:
        with room_in_cache():
            loaded = datasets.load_dataset(**arguments, streaming=streaming)
    except UNREADABLE as error:
        raise unreadable(section, error) from error
    return {"train": loaded} if isinstance(loaded, Dataset | IterableDataset) else loaded


def unreadable(section: SourceSection, error: BaseException) -> Exception:
    """What a reader has raised, in words."""
    reading, source = f"data {section.path}", resolve(section.place, kind="dataset", revision=section.revision)
    if source.kind == "hub":
        of_the_hub = dataset_failure(reading, str(source.location), source.revision, "try again")
        if of_the_hub is not None:
            return of_the_hub
    cause = str(error.__cause__ or error).strip().splitlines()
    why = cause[0] if cause else type(error).__name__
    return UserError(f"{reading}: cannot be read: {why}; check data.format, data.options and the file itself")


def _check_json(arguments: dict[str, Any]) -> None:
    """Refuses JSON that holds no rows: the reader beneath ends the whole process over some of it."""
    for file in dict(arguments.get("data_files") or {}).values() if arguments["path"] == "json" else ():
        try:
            with Path(file).open("rb") as stream:
                start = stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        except OSError as error:
            raise UserError(f"data {Path(file).name}: cannot be read: {error.strerror}") from error
        # compressed files are told by their names, and read as ever
        if start not in (b"{", b"[") and not Path(file).name.endswith((".gz", ".zst", ".xz", ".bz2", ".zip")):
            what = "is empty" if not start else f"begins with {start!r}"
            raise UserError(f"data {Path(file).name}: {what}; JSON lines hold an object each, {{...}}, and JSON a list")


def read_rows(file: Path) -> Dataset:
    """The rows of one file, of any kind that a recipe's data may have."""
    section = SourceSection.model_validate({"path": str(file)})
    if not file.is_file():
        # a hub id must not be looked up in place of a file that is missing
        raise UserError(f"{file}: no such file")
    return read(section)["train"]


def _loading_arguments(section: SourceSection, source: Source) -> dict[str, Any]:
    files: Any
    if source.kind == "hub" and section.format is not None:
        raise UserError("data.format: a data set of a hub says itself what it is; remove the key")
    if source.kind == "hub":
        files = {"data_files": dict(section.files)} if section.files else {}
        hub = {"path": str(source.location), "name": section.name, "revision": source.revision}
        return {**hub, **files, **section.options}
    location = Path(source.location)
    if section.files:
        files = {split: str(location / file) for split, file in section.files.items()}
        suffixes = {Path(file).suffix.lower() for file in section.files.values()}
    elif location.is_file():
        files, suffixes = {"train": str(location)}, {location.suffix.lower()}
    elif section.format is None:
        # a directory laid out as the datasets library expects it
        return {"path": str(location), "name": section.name, **section.options}
    else:
        files, suffixes = None, set()
    builders = {_BUILDERS.get(suffix) for suffix in suffixes}
    builder = section.format or (builders.pop() if len(builders) == 1 else None)
    if builder is None:
        raise UserError(
            f"data {section.path}: its format is not known from the file names; give data.format (csv, json, ...)"
        )
    where: dict[str, Any] = {"data_dir": str(location)} if files is None else {"data_files": files}
    tabs = {"sep": "\t"} if builder == "csv" and suffixes and suffixes <= _TAB_SEPARATED else {}
    named = {"column_names": ["tokens", "tags"]} if builder == "conll" else {}
    return {"path": builder, **where, **tabs, **named, **section.options}


def named(section: SourceSection, raw: Collection[str]) -> dict[str, str]:
    """Our split -> the source's."""
    for ours, theirs in section.splits.items():
        if theirs not in raw:
            raise UserError(f"data.splits.{ours}: {section.path} has no split {theirs!r}, only {', '.join(raw)}")
    # a split that the recipe gives another use has no second one: test rows would choose the checkpoint
    free = [name for name in raw if name not in section.splits.values()]
    found: dict[str, str] = {name: name for name in ("train", "validation", "test") if name in free}
    # the hub's other usual name for it
    if "dev" in free:
        found.setdefault("validation", "dev")
    return found | {str(ours): theirs for ours, theirs in section.splits.items()}


def folder_of(section: SourceSection) -> Path:
    """Where the names of files that stand in the data begin: beside the data itself."""
    source = resolve(section.place, kind="dataset", revision=section.revision)
    location = Path(source.location)
    return location.parent if source.kind == "file" or location.is_file() else location
