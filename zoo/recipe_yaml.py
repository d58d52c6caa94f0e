"""A recipe's YAML as plain values, each with the place it was written at. YAML 1.2; nothing is executed."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from zoo.errors import Keys, Place, Problems, UserError, shown

MAX_BYTES = 256 * 1024
MAX_VALUES = 20_000  # aliases can make a short file expand without end

BASE, RECIPE, COMMAND_LINE = range(3)  # who wins: the later


@dataclass
class Written:
    """Values as written, and the place of each."""

    values: dict[Any, Any]
    places: dict[Keys, Place]

    def place(self, keys: Keys) -> Place:
        """The place of the value, or of the nearest mapping around it."""
        return next(self.places[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in self.places)

    def merge(self, new: "Written") -> None:
        """Lay `new` over this: mappings merge; anything else, an empty mapping too, replaces."""
        self._merge(self.values, new.values, new.places, ())

    def _merge(self, values: dict[Any, Any], over: dict[Any, Any], places: dict[Keys, Place], keys: Keys) -> None:
        for key, value in over.items():
            here = (*keys, key)
            if value and isinstance(value, dict) and isinstance(values.get(key), dict):
                self._merge(values[key], value, places, here)
            else:
                values[key] = value
                kept = {k: p for k, p in self.places.items() if k[: len(here)] != here}
                self.places = kept | {k: p for k, p in places.items() if k[: len(here)] == here}


# YAML to values


class _Reader:
    """Turns YAML nodes into plain values. No tag is ever executed."""

    def __init__(self, place: Callable[[int], Place], problems: Problems) -> None:
        self.place = place  # of a line, counted from 1
        self.problems = problems
        self.places: dict[Keys, Place] = {}
        self.count = 0
        self.open: list[Node] = []  # the nodes around the current one: an alias to one of them has no end

    def compose(self, text: str) -> Node | None:
        if re.search(r"^%YAML\s+(?!1\.2\s)", text, re.MULTILINE):
            raise UserError(f"{self.place(1).label}: recipes are YAML 1.2; remove the %YAML line")
        try:
            node: Node | None = YAML(typ="safe", pure=True).compose(text)
            return node
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line, what = (mark.line + 1 if mark else 1), str(error.problem or error.context)
        except ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            what = f"the character #x{error.character:04x} is not text"
        except (YAMLError, ValueError) as error:
            line, what = 1, str(error).splitlines()[0]
        except RecursionError:
            line, what = 1, "nested too deep"
        raise UserError(f"{self.place(line).label}: not YAML: {what}; {_yaml_remedy(what)}")

    def value(self, node: Node, keys: Keys) -> Any:
        self.count += 1
        line = node.start_mark.line + 1
        if self.count > MAX_VALUES:
            raise UserError(f"{self.place(line).label}: more than {MAX_VALUES} values; aliases (*) repeat too much")
        if node in self.open:
            raise UserError(f"{self.place(line).label}: an alias (*) refers to a value that contains it; write it out")
        if _kind(node) not in _READ_TAGS:
            tag = str(node.tag).replace(_TAG_PREFIX, "!!")
            self.problems.add(self.place(line), keys, f"the tag {tag} is not read (nothing is executed); remove it")
            return None
        if isinstance(node, ScalarNode):
            return self._scalar(node, keys)
        self.open.append(node)
        value = self._sequence(node, keys) if isinstance(node, SequenceNode) else self._mapping(node, keys)
        self.open.pop()
        return value

    def _scalar(self, node: ScalarNode, keys: Keys) -> Any:
        kind, text = _kind(node), str(node.value)
        try:
            if kind == "int":
                sign, digits = (text[0], text[1:]) if text[0] in "+-" else ("", text)
                return int(sign + digits, 0 if digits[1:2] in ("x", "o", "b") else 10)
            if kind == "float":
                return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
        except (ValueError, IndexError):
            self.problems.add(self.place(node.start_mark.line + 1), keys, f"{text!r} is not written as a number")
            return None
        if kind == "bool":
            return text.lower() == "true"
        return None if kind == "null" else text

    def _sequence(self, node: SequenceNode, keys: Keys) -> list[Any]:
        values = []
        for index, item in enumerate(node.value):
            self.places[(*keys, index)] = self.place(item.start_mark.line + 1)
            values.append(self.value(item, (*keys, index)))
        return values

    def _mapping(self, node: Node, keys: Keys) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        lines: dict[Any, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self.value(key_node, keys) if isinstance(key_node, ScalarNode) else None
            here = (*keys, key)
            if _kind(key_node) == "merge":
                self.problems.add(self.place(line), (*keys, "<<"), "not in YAML 1.2; repeat the keys, or use extends:")
            elif key is None:
                self.problems.add(self.place(line), keys, "a key is a plain word; quote it, or write it out")
            elif key in lines:
                text = f"written twice, in line {lines[key]} and in line {line}; keep one"
                self.problems.add(self.place(line), here, text)
            else:
                lines[key] = line
                self.places[here] = self.place(line)
                values[key] = self.value(value_node, here)
        return values


_TAG_PREFIX = "tag:yaml.org,2002:"
_READ_TAGS = {"map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge"}  # a date stays text

_YAML_REMEDIES = {
    r"'\t'": "indent with spaces, not tabs",
    "undefined alias": "define it with & before it is used, or quote the *",
    "mapping values": "quote a value that contains ': ', or check the indentation",
    "another document": "a recipe is one document; remove the '---' line",
    "is not text": "save the file as plain UTF-8 text",
    "nested too deep": "write it flat",
}


def _kind(node: Node) -> str:
    return str(node.tag).removeprefix(_TAG_PREFIX)


def _yaml_remedy(what: str) -> str:
    known = (remedy for part, remedy in _YAML_REMEDIES.items() if part in what)
    return next(known, "check quotes, brackets and indentation there")


def read_file(path: Path, rank: int, problems: Problems) -> Written:
    label = display(path)
    reader = _Reader(lambda line: Place(rank, line, f"{label}:{line}"), problems)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{label}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{label}: {len(data)} bytes, a recipe has at most {MAX_BYTES}; is it data, under data.path?")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{label}:{line}: not UTF-8 text; save the file as UTF-8") from None
    node = reader.compose(text)
    if node is None:
        raise UserError(f"{label}:1: the recipe is empty; it needs name:, model:, task: and data:")
    values = reader.value(node, ())
    if values is None:
        problems.raise_any()  # a tag on the whole document
    if not isinstance(values, dict):
        line = node.start_mark.line + 1
        raise UserError(f"{label}:{line}: a recipe is a mapping of sections (name:, model:, ...), not {shown(values)}")
    return Written(values, {(): reader.place(1)} | reader.places)


def read_override(text: str, number: int, problems: Problems) -> Written:
    """`section.key=value`, the value in YAML, as a recipe with that one key."""
    dotted, equals, value = text.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"command line: {text}: an override is written section.key=value")
    if keys == ["extends"]:
        raise UserError(f"command line: {text}: extends belongs in the recipe's file")
    place = Place(COMMAND_LINE, number, f"command line: {text}", key=".".join(keys))
    reader = _Reader(lambda _: place, problems)
    node = reader.compose(value)
    values: Any = None if node is None else reader.value(node, tuple(keys))
    for n in range(len(keys), 0, -1):
        reader.places[tuple(keys[:n])] = place
        values = {keys[n - 1]: values}
    return Written(values, reader.places)


def display(path: Path) -> str:
    """The path as a message names it: relative where it lies below the current directory."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
