"""Files that are whole or not there, and their hashes."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file under a temporary name, renamed when it is whole: a reader never sees half of it.

    A link leads to its file. A device or a pipe is written to, not replaced.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8") as stream:
            yield stream
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            yield stream
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as stream:
        stream.write(text)


def finite(value: Any, instead: Callable[[float], Any] = lambda number: None) -> Any:
    """The value with something else, at any depth, for the numbers that JSON has no word for: inf and nan."""
    if isinstance(value, dict):
        return {key: finite(below, instead) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [finite(below, instead) for below in value]
    return instead(value) if isinstance(value, float) and not math.isfinite(value) else value


def json_line(value: Any) -> str:
    """JSON that every reader takes, in ASCII: a number that is not finite is null."""
    return json.dumps(finite(value), allow_nan=False)


def as_json(value: Any) -> str:
    """The same in a file, for people too."""
    return json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    write_text(path, as_json(value))
