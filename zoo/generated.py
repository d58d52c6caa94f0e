"""Data that are made, not found: `generated://name?key=value&...`, written once into the cache.

Nothing here imports torch or transformers. To add a kind: a function that yields rows, each of them once, and its line
in GENERATORS.
"""

import hashlib
import inspect
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from zoo.errors import UserError, did_you_mean

SCHEME = "generated://"
# in this order: fewer rows of train leave the others as they are
SPLITS = {"test": 2_000, "validation": 2_000, "train": 96_000}
# of the rows that are made; another one makes others
VERSION = 1

OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(median(values)),
    "[SM": lambda values: sum(values) % 10,
}
VALUE_SHARE = 0.75
# draws that bring no new expression, after which there are taken to be no more
MOST_IN_VAIN = 1_000_000


class _TooLong(Exception):
    pass


def listops(
    seed: int = 0, max_depth: int = 10, max_arguments: int = 10, min_length: int = 500, max_length: int = 2000
) -> Iterator[dict[str, Any]]:
    """Nested operations on digits, and what comes out: ListOps (Nangia and Bowman 2018, arXiv 1804.06028).

    As in Long Range Arena (arXiv 2011.04006, section 2.2.1), whose settings are the defaults: an argument is a digit in
    three of four cases, or at max_depth, else an operator on 2 to max_arguments; more than min_length tokens and fewer
    than max_length. A token is a digit, an operator with its bracket, or a closing bracket.
    """
    drawn, seen = random.Random(seed), set()
    in_vain = 0
    while in_vain < MOST_IN_VAIN:
        in_vain += 1
        tokens: list[str] = []
        try:
            value = _expression(drawn, tokens, 1, max_depth, max_arguments, max_length)
        except _TooLong:
            continue
        text = " ".join(tokens)
        if min_length < len(tokens) < max_length and text not in seen:
            seen.add(text)
            in_vain = 0
            yield {"text": text, "label": str(value)}


def _expression(drawn: random.Random, tokens: list[str], depth: int, max_depth: int, arguments: int, room: int) -> int:
    """Appends an expression; returns its value."""
    if len(tokens) >= room:
        raise _TooLong
    if depth >= max_depth or drawn.random() < VALUE_SHARE:
        value = drawn.randrange(10)
        tokens.append(str(value))
        return value
    operator = drawn.choice(list(OPERATORS))
    tokens.append(operator)
    count = drawn.randint(2, arguments)
    values = [_expression(drawn, tokens, depth + 1, max_depth, arguments, room) for _ in range(count)]
    tokens.append("]")
    return OPERATORS[operator](values)


GENERATORS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {"listops": listops}


def directory(path: str, cache: Path) -> Path:
    """A directory below `cache` with a file of JSON lines for each split, made if it is not there. Raises UserError."""
    name, asked = _parsed(path)
    settings = {**_defaults(GENERATORS[name]), **SPLITS, **asked}
    known = hashlib.sha256(json.dumps([VERSION, name, sorted(settings.items())]).encode()).hexdigest()[:16]
    made = cache / f"{name}-{known}"
    if made.is_dir():
        return made
    from tqdm.auto import tqdm

    cache.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
    try:
        rows = GENERATORS[name](**{key: value for key, value in settings.items() if key not in SPLITS})
        count = sum(settings[split] for split in SPLITS)
        with tqdm(total=count, desc=f"Making {name}", unit="row", delay=2) as bar:
            for split in SPLITS:
                found = 0
                with (new / f"{split}.jsonl").open("w", encoding="utf-8") as stream:
                    for row in islice(rows, settings[split]):
                        stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                        bar.update()
                        found += 1
                if found < settings[split]:
                    raise UserError(
                        f"{path}: only {found:,} different rows were found for {split}, not {settings[split]:,}; ask "
                        "for fewer, or allow longer and deeper ones"
                    )
        new.rename(made)
    except OSError:
        # another process has made the same in the meantime
        if not made.is_dir():
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return made


def smaller(path: str, rows: int) -> str:
    """The same with no more than so many rows of each split."""
    name, asked = _parsed(path)
    asked |= {split: min(asked.get(split, count), rows) for split, count in SPLITS.items()}
    return f"{SCHEME}{name}?" + "&".join(f"{key}={value}" for key, value in asked.items())


def _parsed(path: str) -> tuple[str, dict[str, int]]:
    parts = urlsplit(path)
    if parts.netloc not in GENERATORS or parts.path:
        near = did_you_mean(parts.netloc, GENERATORS) or f"; there are {', '.join(GENERATORS)}"
        raise UserError(f"{path}: nothing of that name is generated{near}")
    known = {**_defaults(GENERATORS[parts.netloc]), **SPLITS}
    asked: dict[str, int] = {}
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        if key not in known:
            raise UserError(
                f"{path}: unknown key {key}{did_you_mean(key, known) or f'; it takes {chr(44).join(known)}'}"
            )
        if not value.isascii() or not value.isdigit() or (key in SPLITS and int(value) == 0):
            raise UserError(f"{path}: {key}={value}: give a whole number{' of at least 1' if key in SPLITS else ''}")
        asked[key] = int(value)
    settings = {**known, **asked}
    shortest, longest = settings.get("min_length", 0), settings.get("max_length", 2**31)
    if shortest + 2 > longest:
        raise UserError(f"{path}: no length is more than min_length, {shortest}, and less than max_length, {longest}")
    if settings.get("max_arguments", 2) < 2:
        raise UserError(f"{path}: max_arguments={settings['max_arguments']}: an operator has at least 2")
    return parts.netloc, asked


def _defaults(generator: Callable) -> dict[str, int]:
    return {name: parameter.default for name, parameter in inspect.signature(generator).parameters.items()}
