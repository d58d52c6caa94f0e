"""Rows that are read while they are learned: shuffled in blocks, over and over, and resumed where they were.

Every order is a function of (seed, pass over the data, block), so that a run that goes on sees what it would have seen.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, IterableDataset

from zoo.data_sections import PartSection
from zoo.duplicates import Parts, digests
from zoo.errors import RunError, UserError
from zoo.labels import LabelKind
from zoo.reading import UNREADABLE, folder_of, named, read, unreadable
from zoo.roles import by_role

BUFFER_SIZE = 1000
STREAM = "train (streamed)"
MARKS = 10_000  # of the newest blocks, which is more than a loader reads ahead

Samples = list[dict[str, Any]]
Place = dict[str, Any]  # where a block begins: pass, shard, rows before it in the pass, block, the reader's own state


@dataclass(frozen=True)
class Source:
    """One source of a stream. held_out: digests of the rows that another split has; begin: how many of them train
    begins with."""

    section: PartSection
    rows: IterableDataset
    folder: Path
    held_out: frozenset[bytes]
    begin: int


@dataclass(frozen=True)
class Unread:
    """The train split of a stream, by source. kind, labels: of the column that is learned."""

    sources: Sequence[Source]
    roles: Sequence[str]
    kind: LabelKind | None
    labels: list[str]
    buffer_size: int
    limit: int | None

    @property
    def words(self) -> str:
        shards = sum(source.rows.num_shards for source in self.sources)
        return f"a stream of {shards:,} shards, in blocks of {self.buffer_size:,} rows"

    @property
    def weights(self) -> list[float]:
        total = sum(source.section.weight for source in self.sources)
        return [source.section.weight / total for source in self.sources]

    def read(self, source: Source, block: Samples, first: int) -> Dataset:
        """Rows as `load_splits` has them, without those that are held out."""
        features = source.rows.features
        rows = Dataset.from_list(block, features=features)
        rows = by_role(rows, "train", source.section, self.roles, source.folder, first)
        if source.held_out:
            rows = rows.select([n for n, one in enumerate(digests(rows)) if one not in source.held_out])
        # a split of another name: what a whole train must have, such as two labels, a block need not
        return rows if self.kind is None or not len(rows) else self.kind.numbered(rows, STREAM, self.labels)

    def first(self, rows: int) -> Dataset:
        """So many rows, of each source by its weight, in its own order; fewer where there are no more."""
        found: list[Dataset] = []
        for source, weight in zip(self.sources, self.weights, strict=True):
            wanted, read, kept = max(1, round(rows * weight)), iter(source.rows), 0
            begin = 0
            while kept < wanted and (block := list(islice(read, self.buffer_size))):
                part = self.read(source, block, begin)
                found.append(part.select(range(min(len(part), wanted - kept))))
                kept, begin = kept + len(found[-1]), begin + len(block)
        return datasets.concatenate_datasets([part for part in found if len(part)] or found[:1])


def open_source(section: PartSection, roles: Sequence[str], wanted: Mapping[str, int]) -> tuple[Source, Parts]:
    """A source whose train is unread, and so many rows of its other splits as are wanted, in memory.

    They are of the split of that name, or if there is none the first of train, which leaves them out wherever they
    stand. Raises UserError for what cannot be read.
    """
    raw, folder, found, begin = read(section, streaming=True), folder_of(section), Parts(), 0
    ours = named(section, raw)
    if "train" not in ours:
        raise UserError(f"data {section.path}: no train split; it has {', '.join(raw)}; name one under data.splits")
    try:
        opened = {name: _with_columns(raw[ours[name]]) for name in ("train", *wanted) if name in ours}
        train = opened["train"]
        for name, count_ in wanted.items():
            rows = list(opened[name].take(count_) if name in opened else train.skip(begin).take(count_))
            begin += 0 if name in opened else count_
            features = opened.get(name, train).features
            found[name] = by_role(Dataset.from_list(rows, features=features), name, section, roles, folder)
            if not len(found[name]):
                raise UserError(f"data {section.path}: no row of {name} has a value for each of {', '.join(roles)}")
            print(f"{name}: {len(rows):,} rows of the beginning of {ours.get(name, ours['train'])}")
    except UNREADABLE as error:
        raise unreadable(section, error) from error
    held_out = frozenset(one for rows in found.values() for one in digests(rows))
    return Source(section, train, folder, held_out, begin), found


def _with_columns(rows: IterableDataset) -> IterableDataset:
    """With known columns, and images that are not decoded yet."""
    rows = rows if rows.features is not None else rows._resolve_features()
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def label_names(kind: LabelKind, source: Source) -> list[str]:
    """Of a stream, which is not read for them. Raises UserError where its columns do not say them."""
    if kind.declared is not None:
        return kind.declared
    column = next((theirs for role, theirs in source.section.columns.items() if role == kind.role), kind.role)
    feature = (source.rows.features or {}).get(column)
    inside = getattr(feature, "feature", feature)
    if not isinstance(inside, datasets.ClassLabel):
        raise UserError(
            f"data.streaming: column {column!r} is {feature or 'not there'}: a stream is not read for its labels; "
            "declare them as a ClassLabel, or set streaming: false"
        )
    return list(inside.names)


class Stream(torch.utils.data.IterableDataset):
    """Samples without end, as a batch takes them.

    encode: rows -> columns of samples, `row` among them, and `piece` where a row becomes several. With `draws` samples
    carry `draw`: (seed, pass, source, row, piece), and with `others` as `other` a sample of another row of their block.
    Whoever saves asks `place` for where a number of samples ended; `go_on` begins there.
    """

    def __init__(
        self, unread: Unread, encode: Callable[[Dataset], Mapping[str, list]], seed: int, draws: bool, others: bool
    ):
        self.unread, self.encode, self.seed, self.draws, self.others = unread, encode, seed, draws, others
        begin: Place = {"pass": 0, "shard": 0, "rows": 0, "block": 0, "state": None}
        self.start: dict[str, Any] = {"sample": 0, "sources": [[begin, 0] for _ in unread.sources]}
        self.skip = 0
        self.marks: deque[dict[str, Any]] = deque(maxlen=MARKS)

    def place(self, samples: int) -> dict[str, Any]:
        """Where the stream is after so many samples, for `go_on`; JSON can hold it."""
        mark = next(mark for mark in reversed(self.marks) if mark["sample"] <= samples)
        return {"mark": mark, "samples": samples}

    def go_on(self, place: dict[str, Any]) -> None:
        self.start = place["mark"]
        self.skip = place["samples"] - self.start["sample"]
        self.marks.clear()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        reader = ThreadPoolExecutor(1, "zoo-stream")  # the next block is read while this one is learned
        try:
            open_blocks = [
                _Block(self._ahead(reader, self._blocks(number, place)), used)
                for number, (place, used) in enumerate(self.start["sources"])
            ]
            self._mark(self.start["sample"], open_blocks)
            for number in count(self.start["sample"]):
                block = open_blocks[self._chosen(number)]
                if block.used >= len(block.samples):
                    block.next()
                    self._mark(number, open_blocks)
                sample = block.samples[block.used]
                block.used += 1
                if number >= self.start["sample"] + self.skip:
                    yield sample
        finally:
            reader.shutdown(wait=False, cancel_futures=True)

    def _mark(self, number: int, blocks: Sequence["_Block"]) -> None:
        self.marks.append({"sample": number, "sources": [[block.place, block.used] for block in blocks]})

    def _chosen(self, number: int) -> int:
        weights = self.unread.weights
        return int(np.random.default_rng([self.seed, 3, number]).choice(len(weights), p=weights)) if weights[1:] else 0

    def _ahead(self, reader: ThreadPoolExecutor, blocks: Iterator[tuple[Place, Samples]]):
        coming = reader.submit(next, blocks)
        while True:
            block = coming.result()
            coming = reader.submit(next, blocks)
            yield block

    def _blocks(self, number: int, place: Place) -> Iterator[tuple[Place, Samples]]:
        """(where it begins, its samples) of each block of a source, shard by shard, from `place` on."""
        source, place = self.unread.sources[number], dict(place)
        where, limit = f"data {source.section.path}", self.unread.limit
        limit = None if limit is None else limit + source.begin
        shards = source.rows.num_shards
        while True:
            whole, made = place["rows"] == 0, 0
            order = np.random.default_rng([self.seed, 4, place["pass"], number]).permutation(shards)
            # the same rows in each pass
            order = order if limit is None else np.arange(shards)
            while place["shard"] < shards and (limit is None or place["rows"] < limit):
                shard = source.rows.shard(shards, int(order[place["shard"]]))
                if place["state"] is not None:
                    shard.load_state_dict(place["state"])
                rows = iter(shard)
                while True:
                    room = self.unread.buffer_size if limit is None else limit - place["rows"]
                    try:
                        block = list(islice(rows, min(self.unread.buffer_size, room)))
                    except UNREADABLE as error:
                        raise RunError(
                            f"{where}: the stream failed after {place['rows']:,} rows of pass {place['pass'] + 1}: "
                            f"{_words(error)}; --resume goes on from the last checkpoint"
                        ) from error
                    if not block:
                        break
                    samples = self._samples(number, source, block, place)
                    made += len(samples)
                    yield dict(place), samples
                    place |= {"rows": place["rows"] + len(block), "block": place["block"] + 1}
                    place["state"] = shard.state_dict()
                place |= {"shard": place["shard"] + 1, "state": None}
            if whole and not made:
                raise UserError(f"{where}: none of the {place['rows']:,} rows of train makes a sample")
            print(f"{where}: {place['rows']:,} rows are read; it begins again (pass {place['pass'] + 2})")
            place |= {"pass": place["pass"] + 1, "shard": 0, "rows": 0}

    def _samples(self, number: int, source: Source, block: Samples, place: Place) -> Samples:
        rows = self.unread.read(source, block, place["rows"])
        columns = self.encode(rows) if len(rows) else {"row": []}
        order = np.random.default_rng([self.seed, 5, place["pass"], number, place["block"]])
        samples = [{name: values[n] for name, values in columns.items()} for n in range(len(columns["row"]))]
        for sample in samples if self.draws else ():
            piece = [sample["piece"]] if "piece" in sample else []
            sample["draw"] = [self.seed, place["pass"], number, sample["row"], *piece]
        if self.others:
            if len(set(columns["row"])) < 2:
                return []  # a text alone has no other
            samples = [sample | {"other": _other(samples, sample)} for sample in samples]
        return [samples[n] for n in order.permutation(len(samples))]


def _other(samples: Samples, sample: dict[str, Any]) -> dict[str, Any]:
    rng = np.random.default_rng([*sample["draw"], 2])  # other numbers than those of the sample
    while True:
        other = samples[int(rng.integers(len(samples)))]
        if other["row"] != sample["row"]:
            return other


class _Block:
    """The block of a source that is being used up, and those that follow it."""

    def __init__(self, blocks: Iterator[tuple[Place, Samples]], used: int):
        self.blocks, self.used = blocks, used
        self.place, self.samples = next(blocks)

    def next(self) -> None:
        self.samples = []
        while not self.samples:
            self.place, self.samples = next(self.blocks)
        self.used = 0


def _words(error: BaseException) -> str:
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
