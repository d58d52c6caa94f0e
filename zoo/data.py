"""A recipe's rows: loaded, checked, split, mixed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, DatasetDict, LargeList, List

from zoo.data_sections import DataSection, PartSection
from zoo.duplicates import Parts, deduplicated, overlaps
from zoo.errors import UserError
from zoo.labels import LabelKind
from zoo.reading import folder_of, named, read, room_in_cache
from zoo.roles import by_role, derived
from zoo.streaming import BUFFER_SIZE, Unread, label_names, open_source

TEST_SEED = 0


@dataclass(frozen=True)
class Splits:
    """Rows by split, with columns named by role and `row`, each row's number in its source, or mixture, from 0.

    `labels` are those of train, in order; `label` columns are their numbers. `notes`: what the user should know.
    """

    train: Dataset | Unread | None
    validation: Dataset | None
    test: Dataset | None
    labels: list[str]
    notes: list[str]

    @property
    def rows(self) -> Dataset:
        """Train, in memory. Raises UserError for a stream."""
        if not isinstance(self.train, Dataset):
            raise UserError(
                "data.streaming: this wants all rows of train at once; add data.streaming=false data.limit=..."
            )
        return self.train


@room_in_cache()
def load_splits(
    section: DataSection,
    roles: Sequence[str],
    seed: int,
    labels: list[str] | None = None,
    kind: LabelKind | None = None,
) -> Splits:
    """Loads, checks and splits the data. Raises UserError naming the split, row and column that are wrong.

    roles: columns the task reads; of these `kind` is the one it learns. seed: decides the rows held out for validation
    and the order of a mixture. labels: a trained model's, when its data is read again; without them train's are taken.
    """
    if section.streaming:
        return _streamed(section, roles, seed, labels, kind)
    notes: list[str] = []
    parts = [_part(part, roles, labels is None or bool(section.mixture)) for part in section.parts]
    parts = _alike(parts)
    names = labels or []
    if kind is not None:
        train = [splits["train"] for splits in parts if "train" in splits]
        names = labels if labels is not None else kind.names(datasets.concatenate_datasets(train))
        parts = [{name: kind.numbered(rows, name, names) for name, rows in splits.items()} for splits in parts]
    if section.limit is not None:
        parts = [{name: _limited(rows, section.limit) for name, rows in splits.items()} for splits in parts]
        notes.append(f"data.limit: {section.limit} rows of each split")
    if section.deduplicate is not None:
        parts, note = deduplicated(parts, section.deduplicate, section.similarity)
        notes.append(note)
    by_label = kind is not None and kind.in_proportion
    for splits in parts:
        notes += _held_out(splits, section, seed, by_label)
    if kind is not None and not kind.learned:
        parts = [{name: _without(rows, kind.role) for name, rows in splits.items()} for splits in parts]
    together, mixed = _together(parts, section, seed)
    notes += [*mixed, *overlaps(together)]
    return Splits(together.get("train"), together.get("validation"), together.get("test"), names, notes)


def _part(section: PartSection, roles: Sequence[str], trained_on: bool) -> Parts:
    raw, folder, found = read(section), folder_of(section), Parts()
    ours = named(section, raw)
    if trained_on and "train" not in ours:
        raise UserError(f"data {section.path}: no train split; it has {', '.join(raw)}; name one under data.splits")
    for name, theirs in ours.items():
        source = derived(raw[theirs], name, section)
        found[name] = rows = by_role(source, name, section, roles, folder)
        where, dropped = f"data {section.path}: {name}", len(source) - len(rows)
        given = [role for role in roles if role in rows.column_names]
        if not len(rows):
            raise UserError(f"{where}: no row has a value for each of {', '.join(given)}")
        if dropped:
            print(f"{where}: {dropped:,} rows left out that lack {' or '.join(given)} (data.drop_empty)")
    return found


def _without(rows: Dataset, column: str) -> Dataset:
    return rows.remove_columns(column) if column in rows.column_names else rows


def _limited(rows: Dataset, limit: int) -> Dataset:
    # for each seed the same, so that runs can be compared
    return rows.shuffle(seed=TEST_SEED).select(range(min(limit, len(rows))))


def _held_out(splits: Parts, section: DataSection, seed: int, by_label: bool) -> list[str]:
    """Takes validation and test out of a source's train, where it has none of its own; returns what was done."""
    notes = []
    # test rows are the same for each seed, so that runs can be compared
    shares = (("test", section.test, TEST_SEED), ("validation", section.validation, seed))
    for name, share, drawn_by in shares if "train" in splits else ():
        if name in splits and name == "test" and share is not None:
            raise UserError(f"data.test: {section.path} has a test split; remove the key, or give it another use")
        if name not in splits and share is not None:
            held_out, note = _hold_out(splits["train"], name, share, drawn_by, by_label)
            splits |= {"train": held_out["train"], name: held_out["test"]}
            notes.append(note)
    return notes


# Streams


def _streamed(
    section: DataSection, roles: Sequence[str], seed: int, labels: list[str] | None, kind: LabelKind | None
) -> Splits:
    """Train unread; of the other splits so many rows in memory as the section says, which train leaves out."""
    wanted = {"test": section.test, "validation": section.validation}
    counts = {name: min(int(rows), section.limit or int(rows)) for name, rows in wanted.items() if rows is not None}
    opened = [open_source(part, roles, counts) for part in section.parts]
    names = labels or []
    if kind is not None:
        names = labels if labels is not None else label_names(kind, opened[0][0])
        opened = [
            (one, {name: kind.numbered(rows, name, names) for name, rows in found.items()}) for one, found in opened
        ]
    parts = [splits for _, splits in opened]
    parts = _alike(parts)
    together = {name: _numbered_anew(datasets.concatenate_datasets([one[name] for one in parts])) for name in counts}
    train = Unread(
        [source for source, _ in opened], roles, kind, names, section.buffer_size or BUFFER_SIZE, section.limit
    )
    return Splits(train, together["validation"], together.get("test"), names, [f"train: {train.words}"])


# Mixtures


def _alike(parts: Sequence[Parts]) -> list[Parts]:
    """With columns of the same kinds; a reader's strings are large or not. Raises UserError where sources differ."""
    if len(parts) == 1:
        return list(parts)
    wanted = next(iter(parts[0].values())).features
    found = []
    for number, splits in enumerate(parts):
        found.append(dict(splits))
        for name, rows in splits.items():
            for column in sorted({*rows.column_names, *wanted}):
                there, first = rows.features.get(column), wanted.get(column)
                if _kind(there) != _kind(first):
                    raise UserError(
                        f"data.mixture.{number}: its {name} has {column} as {there or 'no column'}, where the first "
                        f"source has {first or 'none'}; the sources of a mixture have the same columns of the same "
                        "kind (columns, options)"
                    )
                if there != first:
                    found[number][name] = found[number][name].cast_column(column, first)
    return found


def _kind(feature: Any) -> str:
    if isinstance(feature, dict):
        return repr(sorted((name, _kind(inside)) for name, inside in feature.items()))
    if isinstance(feature, List | LargeList):
        return f"list of {_kind(feature.feature)}"
    return repr(feature).replace("large_", "")


def _together(parts: Sequence[Parts], section: DataSection, seed: int) -> tuple[Parts, list[str]]:
    """The splits of all sources: train in the order of a draw by their weights, the others one after the other."""
    if len(parts) == 1:
        return dict(parts[0]), []
    found: Parts = {}
    for name in ("validation", "test"):
        some = [splits[name] for splits in parts if name in splits]
        if some:
            found[name] = _numbered_anew(datasets.concatenate_datasets(some))
    train = [splits["train"].add_column("part", [n] * len(splits["train"])) for n, splits in enumerate(parts)]
    total = sum(part.weight for part in section.parts)
    weights, ends = [part.weight / total for part in section.parts], section.stopping_strategy or "all_exhausted"
    mixed = datasets.interleave_datasets(train, weights, seed, stopping_strategy=ends)
    drawn = np.bincount(mixed["part"], minlength=len(parts))
    notes = [
        f"mixture: {drawn[n]:,} rows ({drawn[n] / len(mixed):.1%}) of the {len(rows):,} of {section.parts[n].path}"
        for n, rows in enumerate(train)
    ]
    # a row that comes twice is another row, with other draws
    return found | {"train": _numbered_anew(mixed.remove_columns("part"))}, notes


def _numbered_anew(rows: Dataset) -> Dataset:
    return rows.remove_columns("row").add_column("row", list(range(len(rows))))


def _hold_out(train: Dataset, split: str, share: float, seed: int, by_label: bool) -> tuple[DatasetDict, str]:
    """Splits train for another use, each label in proportion where the counts allow it."""
    size = share if isinstance(share, int) else max(1, round(share * len(train)))
    if size >= len(train):
        raise UserError(f"data: train has {len(train)} rows, too few to hold {size} out for {split}")
    note = f"{split}: {size} rows held out of train"
    if by_label and "label" in train.column_names:
        try:
            return train.train_test_split(
                size, seed=seed, stratify_by_column="label"
            ), f"{note}, in proportion by label"
        except ValueError:
            # a class of one row, or more classes than held-out rows
            note += "; too few rows of some label to hold out in proportion"
    return train.train_test_split(size, seed=seed), note
