"""Texts and images that come twice: left out of train, and found where train and another split share them."""

import json
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasketch import MinHash, MinHashLSH
from tqdm import tqdm

from zoo.errors import UserError

# of a row these are what is learned; the other columns are what is read
LEARNED = ("label", "tags", "summary", "translation", "completion", "answers")
SHOW_BAR_AFTER_SECONDS = 2
# as Lee et al. 2022 (arXiv 2107.06499, section 4.2) have them
SIMILARITY, WORDS_OF_SHINGLE = 0.8, 5
PERMUTATIONS = 128

Parts = dict[str, Dataset]


def digests(rows: Dataset) -> Iterator[bytes]:
    """16 bytes for what each row reads; texts that differ in case and space only have the same."""
    columns = [name for name in rows.column_names if name not in (*LEARNED, "row")]
    for row in rows.select_columns(columns):
        yield blake2b(
            json.dumps([_plain(row[name]) for name in columns], default=str).encode(), digest_size=16
        ).digest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        content = value["bytes"] if value["bytes"] is not None else _content(str(value["path"]))
        return blake2b(content, digest_size=16).hexdigest()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return " ".join(value.casefold().split()) if isinstance(value, str) else value


def _content(path: str) -> bytes:
    """Of an image's file; of one that is not here, or cannot be read, which is said where it is opened, its name."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return path.encode()


def overlaps(splits: Parts) -> list[str]:
    """What train shares with the other splits, in words; nothing where there is nothing."""
    others = {name: rows for name, rows in splits.items() if name != "train"}
    if "train" not in splits or not others:
        return []
    train = splits["train"]
    known = set(_bar(digests(train), len(train), "Comparing splits"))
    shared = {name: sum(one in known for one in digests(rows)) for name, rows in others.items()}
    return [
        f"overlap: {count:,} of {len(splits[name]):,} {name} rows are in train too (data.deduplicate takes them out)"
        for name, count in shared.items()
        if count
    ]


def deduplicated(parts: Sequence[Parts], kind: str, similarity: float | None) -> tuple[list[Parts], str]:
    """The splits of several sources without the rows of train that stand in another split, or earlier in train.

    kind: "exact", or "near": those too whose shingles of 5 words have a Jaccard similarity of at least `similarity`,
    as MinHash finds it (Broder 1997; Lee et al. 2022, arXiv 2107.06499, section 4.2). Returns what was done as well.
    """
    seen = _Near(SIMILARITY if similarity is None else similarity) if kind == "near" else _Exact()
    for rows in (rows for splits in parts for name, rows in splits.items() if name != "train"):
        for one in _bar(seen.keys(rows), len(rows), "Reading splits"):
            seen.add(one)
    found, before = [], sum(len(splits["train"]) for splits in parts if "train" in splits)
    for splits in parts:
        if "train" in splits:
            rows = splits["train"]
            keys = _bar(seen.keys(rows), len(rows), "Finding duplicates")
            splits = splits | {"train": rows.select([n for n, one in enumerate(keys) if seen.is_new(one)])}
        found.append(splits)
    if any("train" in splits and not len(splits["train"]) for splits in found):
        raise UserError("data.deduplicate: all rows of train stand in another split too; nothing is left to train on")
    left = sum(len(splits["train"]) for splits in found if "train" in splits)
    return found, f"data.deduplicate: {before - left:,} of {before:,} train rows left out ({kind} duplicates)"


class _Exact:
    def __init__(self) -> None:
        self.known: set[bytes] = set()

    def keys(self, rows: Dataset) -> Iterator[bytes]:
        return digests(rows)

    def add(self, key: bytes) -> None:
        self.known.add(key)

    def is_new(self, key: bytes) -> bool:
        new = key not in self.known
        self.known.add(key)
        return new


class _Near:
    def __init__(self, similarity: float) -> None:
        self.similarity = similarity
        self.index = MinHashLSH(threshold=similarity, num_perm=PERMUTATIONS)
        self.known: list[MinHash] = []

    def keys(self, rows: Dataset) -> Iterator[MinHash]:
        columns = [name for name in rows.column_names if name not in (*LEARNED, "row")]
        for row in rows.select_columns(columns):
            words = list(chain.from_iterable(_words(row[name]) for name in columns))
            last = max(len(words) - WORDS_OF_SHINGLE, 0)
            shingles = {" ".join(words[start : start + WORDS_OF_SHINGLE]).encode() for start in range(last + 1)}
            key = MinHash(num_perm=PERMUTATIONS, seed=1)
            key.update_batch(list(shingles))
            yield key

    def add(self, key: MinHash) -> None:
        self.index.insert(len(self.known), key)
        self.known.append(key)

    def is_new(self, key: MinHash) -> bool:
        if any(key.jaccard(self.known[one]) >= self.similarity for one in self.index.query(key)):
            return False
        self.add(key)
        return True


def _words(value: Any) -> Iterator[str]:
    """Of a text, or of a list of them; of anything else what stands for it."""
    if isinstance(value, list):
        yield from chain.from_iterable(map(_words, value))
    else:
        yield from str(_plain(value)).split()


def _bar(keys: Iterator[Any], total: int, what: str) -> Iterable[Any]:
    return tqdm(keys, total=total, desc=what, unit="row", delay=SHOW_BAR_AFTER_SECONDS)
