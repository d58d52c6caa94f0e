"""How a command ends badly, and how the problems of a text a person wrote are gathered, placed and worded."""

import difflib
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Keys = tuple[Any, ...]  # the path of a value: ("train", "learning_rate")


class UserError(Exception):
    """The user's words are wrong: the message says what, where (file, line, key) and what to do. Exit status 2."""


class RunError(Exception):
    """A run failed for a reason that the message states. Exit status 1."""


class Interrupted(BaseException):
    """A signal has ended the run; exit status 128 and its number. No library's `except Exception` may swallow it."""

    def __init__(self, number: int, saved: str = ""):
        super().__init__(f"interrupted{saved}")
        self.status = 128 + number


def unexpected(error: BaseException) -> str:
    """What nobody has foreseen, in a line: its kind, its words, and where it was raised."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).split())[:500]
    return f"unexpected {type(error).__name__}: {said} ({Path(where.filename).name}:{where.lineno})"


def in_a_line(error: BaseException) -> str:
    """An error of the libraries in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:400] if lines else type(error).__name__


def did_you_mean(word: object, candidates: Iterable[str]) -> str:
    """The end of a message about an unknown `word`: "; did you mean X?", or nothing where no candidate is near."""
    known = {candidate.lower(): candidate for candidate in candidates}
    near = difflib.get_close_matches(str(word).lower(), known, n=1)
    return f"; did you mean {known[near[0]]}?" if near else ""


def shown(value: object) -> str:
    """A value read from YAML, as a message quotes it: its kind where that is the point, at most 60 characters."""
    if value is None:
        return "null (nothing)"
    if isinstance(value, bool):
        return "true" if value else "false"
    kinds = {"str": "the string ", "list": "the list ", "dict": "the mapping "}
    text = repr(value)
    return kinds.get(type(value).__name__, "") + (text if len(text) <= 60 else f"{text[:57]}...")


@dataclass(frozen=True, order=True)
class Place:
    """Where a value was written. Sorts as base, recipe, command line, and by line."""

    rank: int
    line: int
    label: str  # "recipes/x.yaml:14" or "command line: train.seed=1"
    key: str = field(default="", compare=False)  # the key that the label already names


class Problems:
    """What is wrong with a recipe: gathered, then raised all at once."""

    def __init__(self) -> None:
        self._found: dict[tuple[Place, Keys], str] = {}

    def add(self, place: Place, keys: Keys, text: str) -> None:
        """Note a problem; of several with one value the first counts."""
        self._found.setdefault((place, keys), text)

    def raise_any(self) -> None:
        """UserError with a line for each problem, if there are any."""
        lines = []
        for (place, keys), text in sorted(self._found.items(), key=lambda item: item[0][0]):
            # a line break in a key would break the line
            dotted = ".".join(str(key) if str(key).isprintable() else repr(key) for key in keys)
            lines.append(f"{place.label}: {text}" if dotted in ("", place.key) else f"{place.label}: {dotted}: {text}")
        if lines:
            raise UserError("\n".join(lines))
