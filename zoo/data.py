"""Rows of a recipe's data, split, checked and named by role: text, text_pair, label, tokens, tags, image."""

import errno
import inspect
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import httpx2
import numpy as np
import torch
from datasets import Dataset, DatasetDict, LargeList, List

from zoo.errors import RunError, UserError, did_you_mean
from zoo.hub_errors import dataset_failure
from zoo.images import from_pixels, image_column
from zoo.labels import NOTHING, LabelKind
from zoo.sections import DataSection
from zoo.sources import Source, resolve

# file ending -> the datasets library's name for its reader; recipes may name any other reader
_BUILDERS = {".csv": "csv", ".tsv": "csv", ".tab": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_BUILDERS |= {".txt": "text", ".conll": "conll"}
# what readers raise for files that are not what they should be: damaged archives and empty files too
_UNREADABLE = (
    *(OSError, ValueError, TypeError, RuntimeError, datasets.exceptions.DatasetsError, httpx2.HTTPError),
    *(EOFError, StopIteration, IndexError, AttributeError, KeyError, tarfile.TarError, zlib.error),
)
TEST_SEED = 0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TAB_SEPARATED = {".tsv", ".tab"}


@dataclass(frozen=True)
class Splits:
    """Rows by split, with columns named by role and `row`, each row's number in its source, from 0.

    `labels` are those of train, in order; `label` columns are their numbers. `notes`: what the user should know.
    """

    train: Dataset | None
    validation: Dataset | None
    test: Dataset | None
    labels: list[str]
    notes: list[str]


@contextmanager
def room_in_cache() -> Iterator[None]:
    """Words for a cache of the datasets library that is full."""
    try:
        yield
    except (OSError, datasets.exceptions.DatasetsError) as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
                where = datasets.config.HF_DATASETS_CACHE
                raise RunError(f"{where}: cannot be written: {cause.strerror}; make room, or set HF_HOME") from error
            cause = cause.__cause__
        raise


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
    and those kept by `limit`. labels: a trained model's, when its data is read again; without them train's are taken.
    """
    raw = _read(section)
    folder = _folder(section)
    splits = {name: _roles(raw[source], name, section, roles, folder) for name, source in _named(section, raw).items()}
    if "train" not in splits and labels is None:
        raise UserError(f"data {section.path}: no train split; it has {', '.join(raw)}; name one under data.splits")
    notes: list[str] = []
    names = labels or []
    if kind is not None:
        names = labels if labels is not None else kind.names(splits["train"])
        splits = {name: kind.numbered(rows, name, names) for name, rows in splits.items()}
    if section.limit is not None:
        splits = {
            name: rows.shuffle(seed=seed).select(range(min(section.limit, len(rows)))) for name, rows in splits.items()
        }
        notes.append(f"data.limit: {section.limit} rows of each split")
    # test rows are the same for each seed, so that runs can be compared
    shares = (("test", section.test, TEST_SEED), ("validation", section.validation, seed))
    by_label = kind is not None and kind.in_proportion
    for name, share, drawn_by in shares if "train" in splits else ():
        if name in splits and name == "test" and share is not None:
            raise UserError(f"data.test: {section.path} has a test split; remove the key, or give it another use")
        if name not in splits and share is not None:
            held_out, note = _hold_out(splits["train"], name, share, drawn_by, by_label)
            splits |= {"train": held_out["train"], name: held_out["test"]}
            notes.append(note)
    return Splits(splits.get("train"), splits.get("validation"), splits.get("test"), names, notes)


def _read(section: DataSection) -> DatasetDict:
    """The source's own splits, as the datasets library reads them."""
    source = resolve(section.path, kind="dataset", revision=section.revision, files=list(section.files.values()))
    reading = f"data {section.path}"
    for key in section.options:
        if key in inspect.signature(datasets.load_dataset).parameters:
            raise UserError(f"data.options.{key}: not an option of a format; say it with the other keys of data")
    arguments = _loading_arguments(section, source)
    _check_json(arguments)
    try:
        with room_in_cache():
            loaded = datasets.load_dataset(**arguments)
    except _UNREADABLE as error:
        cause = str(error.__cause__ or error).strip().splitlines()
        of_the_hub = None
        if source.kind == "hub":
            of_the_hub = dataset_failure(reading, str(source.location), source.revision, "try again")
        why = cause[0] if cause else type(error).__name__
        words = f"{reading}: cannot be read: {why}; check data.format, data.options and the file itself"
        raise of_the_hub or UserError(words) from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)


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
    section = DataSection.model_validate({"path": str(file)})
    if not file.is_file():
        # a hub id must not be looked up in place of a file that is missing
        raise UserError(f"{file}: no such file")
    return _read(section)["train"]


def _loading_arguments(section: DataSection, source: Source) -> dict[str, Any]:
    if source.kind == "hub":
        return {"path": str(source.location), "name": section.name, "revision": source.revision, **section.options}
    location = Path(source.location)
    if section.files:
        files: Any = {split: str(location / file) for split, file in section.files.items()}
        suffixes = {Path(file).suffix.lower() for file in section.files.values()}
    elif location.is_file():
        files, suffixes = {"train": str(location)}, {location.suffix.lower()}
    elif section.format is None:
        # a directory laid out as the datasets library expects it
        return {"path": str(location), **section.options}
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


def _named(section: DataSection, raw: DatasetDict) -> dict[str, str]:
    """Our split -> the source's."""
    for ours, theirs in section.splits.items():
        if theirs not in raw:
            raise UserError(f"data.splits.{ours}: {section.path} has no split {theirs!r}, only {', '.join(raw)}")
    # a split that the recipe gives another use has no second one: test rows would choose the checkpoint
    free = [name for name in raw if name not in section.splits.values()]
    named = {name: name for name in ("train", "validation", "test") if name in free}
    # the hub's other usual name for it
    if "dev" in free:
        named.setdefault("validation", "dev")
    return named | dict(section.splits)


def _folder(section: DataSection) -> Path:
    """Where the names of files that stand in the data begin: beside the data itself."""
    source = resolve(section.path, kind="dataset", revision=section.revision)
    location = Path(source.location)
    return location.parent if source.kind == "file" or location.is_file() else location


def _roles(rows: Dataset, split: str, section: DataSection, roles: Sequence[str], folder: Path) -> Dataset:
    """Only the columns the task reads, under the names of their roles, and each row's number."""
    given: Mapping[Any, str] = section.columns
    columns = {role: given.get(role, role) for role in roles}
    where = f"data {section.path}: {split}"
    if section.pixels is not None:
        others = [columns[role] for role in roles if role != "image" and columns[role] in rows.column_names]
        columns["image"] = "image"
        rows = from_pixels(rows, section.pixels, others, where)
    wanted = [role for role in roles if role != "text_pair" or role in given or role in rows.column_names]
    for role in wanted:
        if columns[role] not in rows.column_names:
            near = did_you_mean(columns[role], rows.column_names)
            raise UserError(
                f"data.columns.{role}: the {split} split of {section.path} has no column {columns[role]!r}; it has "
                f"{', '.join(rows.column_names)}{near}"
            )
    if len(rows) == 0:
        raise UserError(f"data {section.path}: the {split} split is empty")
    rows = rows.select_columns([columns[role] for role in wanted])
    rows = rows.rename_columns({columns[role]: role for role in wanted if columns[role] != role})
    rows = rows.add_column("row", list(range(len(rows))))
    if section.drop_empty:
        rows = _filled(rows, wanted, f"data {section.path}: {split}")
    for role in (role for role in wanted if role in _TEXTS):
        _TEXTS[role](rows, role, columns[role], split, section.path)
    if "image" in wanted:
        rows = image_column(rows, "image", folder, where)
    return rows


def _filled(rows: Dataset, roles: Sequence[str], where: str) -> Dataset:
    """Only the rows that have a value in each column."""
    kept = list(range(len(rows)))
    for role in roles:
        values = rows[role]
        empty = {n for n, value in enumerate(values) if value is None or (isinstance(value, str) and not value.strip())}
        kept = [n for n in kept if n not in empty]
    if not kept:
        raise UserError(f"{where}: no row has a value for each of {', '.join(roles)}")
    if len(kept) < len(rows):
        print(f"{where}: {len(rows) - len(kept):,} rows left out that lack {' or '.join(roles)} (data.drop_empty)")
    return rows.select(kept)


def _check_texts(rows: Dataset, role: str, column: str, split: str, path: str) -> None:
    for row, text in zip(rows["row"], rows[role], strict=True):
        if text is None:
            raise UserError(f"data {path}: {split} row {row}: column {column!r} holds nothing{NOTHING}")
        if not isinstance(text, str):
            raise UserError(f"data {path}: {split} row {row}: column {column!r} holds {text!r}, not a text")
        if not text.strip():
            raise UserError(f"data {path}: {split} row {row}: the text in column {column!r} is empty; remove the row")


def _check_tokens(rows: Dataset, role: str, column: str, split: str, path: str) -> None:
    feature = rows.features[role]
    words = isinstance(feature, List | LargeList) and getattr(feature.feature, "dtype", "") in (
        "string",
        "large_string",
    )
    if not words:
        raise UserError(f"data {path}: {split}: column {column!r} is {feature}, not a list of words")
    for row, tokens in zip(rows["row"], rows[role], strict=True):
        if not tokens or any(token is None or not token.strip() for token in tokens):
            raise UserError(
                f"data {path}: {split} row {row}: column {column!r} has no tokens, or an empty one; remove it"
            )


_TEXTS = {"text": _check_texts, "text_pair": _check_texts, "tokens": _check_tokens}


def _hold_out(train: Dataset, split: str, share: float, seed: int, by_label: bool) -> tuple[DatasetDict, str]:
    """Splits train for another use, each label in proportion where the counts allow it."""
    size = max(1, round(share * len(train)))
    if size >= len(train):
        raise UserError(f"data: train has {len(train)} rows, too few to hold {size} out for {split}")
    note = f"{split}: {size} rows held out of train"
    if by_label:
        try:
            return train.train_test_split(
                size, seed=seed, stratify_by_column="label"
            ), f"{note}, in proportion by label"
        except ValueError:
            # a class of one row, or more classes than held-out rows
            note += "; too few rows of some label to hold out in proportion"
    return train.train_test_split(size, seed=seed), note


class WithDraws(torch.utils.data.Dataset):
    """Rows that also carry `draw`: (seed, epoch, number of the row and, if it is one of several, of its piece), which
    decides all that is random about a sample.

    Whoever runs epochs calls `set_epoch`; rows that are only evaluated stay in epoch 0, the same each time. others: a
    sample also carries `other`, a sample of another row of the data; there are two such rows at least.
    """

    def __init__(self, rows: Dataset, seed: int, others: bool = False):
        self.rows, self.seed, self.epoch, self.others = rows, seed, 0, others

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        drawn = row | {"draw": [self.seed, self.epoch, row["row"], *([row["piece"]] if "piece" in row else [])]}
        return drawn | {"other": self._other(row, index)} if self.others else drawn

    def _other(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, self.epoch, index, 2])  # other numbers than those of the sample
        while True:
            other = self.rows[int(rng.integers(len(self.rows)))]
            if other["row"] != row["row"]:
                return other
