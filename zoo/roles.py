"""The columns of a source by the roles they have for a task, checked row by row."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, LargeList, List

from zoo.chats import chat_fault
from zoo.data_sections import SourceSection
from zoo.derived import DERIVED
from zoo.errors import UserError, did_you_mean
from zoo.images import from_pixels, image_column
from zoo.labels import NOTHING, choices_problem


def by_role(
    rows: Dataset, split: str, section: SourceSection, roles: Sequence[str], folder: Path, first: int = 0
) -> Dataset:
    """Only the columns the task reads, under the names of their roles, and each row's number, from `first` on.

    folder: where the names of image files begin. Raises UserError naming the column or row that is wrong.
    """
    given: Mapping[Any, str] = section.columns
    # a label that a task does not learn, and no pixel either
    roles = [*roles, *(role for role in given if role not in roles)]
    columns = {role: given.get(role, role) for role in roles}
    where = f"data {section.path}: {split}"
    if section.pixels is not None:
        others = [columns[role] for role in roles if role != "image" and columns[role] in rows.column_names]
        columns["image"] = "image"
        rows = from_pixels(rows, section.pixels, others, where)
    wanted = _wanted(roles, given, rows.column_names)
    if any(columns[role] not in rows.column_names for role in wanted):
        # a column within another has a name such as translation.de
        rows = rows.flatten()
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
    rows = rows.add_column("row", list(range(first, first + len(rows))))
    if section.drop_empty:
        rows = filled(rows, wanted)
    for role in (role for role in wanted if role in _TEXTS):
        _TEXTS[role](rows, role, columns[role], split, section.place)
    if "image" in wanted:
        rows = image_column(rows, "image", folder, where)
    return rows


def _wanted(roles: Sequence[str], given: Mapping[Any, str], names: Sequence[str]) -> list[str]:
    """The roles that are read: a second text only where there is one; messages, or else a prompt and a completion."""
    pairs = ("prompt", "completion")
    in_messages = "messages" in given or ("messages" in names and not any(role in given for role in pairs))
    alternatives = pairs if in_messages or "messages" not in roles else ("messages",)
    there = [role for role in roles if role not in alternatives]
    return [role for role in there if role not in _OPTIONAL or role in given or role in names]


def derived(rows: Dataset, split: str, section: SourceSection) -> Dataset:
    """The rows that `data.derive`, if there is one, makes of these. Raises UserError where they are of another kind."""
    if section.derive is None:
        return rows
    derive = DERIVED[section.derive]
    made: list[dict[str, Any]] = []
    for column in derive.columns:
        if column not in rows.column_names:
            raise UserError(
                f"data.derive: {section.derive} wants a column {column!r}; the {split} split of {section.path} has "
                f"{', '.join(rows.column_names)}; data.derive: null reads the rows as they are"
            )
    for number, row in enumerate(rows):
        try:
            made += derive.rows(row)
        except (KeyError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {str(error)[:200]}"
            raise UserError(f"data.derive: {section.derive} cannot read {split} row {number}: {why}") from error
    return Dataset.from_list(made)


def filled(rows: Dataset, roles: Sequence[str]) -> Dataset:
    """Only the rows that have a value in each column."""
    kept = set(range(len(rows)))
    for role in roles:
        values = rows[role]
        if isinstance(rows.features[role], ClassLabel):
            values = [None if value == -1 else value for value in values]
        kept -= {n for n, value in enumerate(values) if value is None or (isinstance(value, str) and not value.strip())}
    return rows if len(kept) == len(rows) else rows.select(sorted(kept))


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


def _check_chats(rows: Dataset, role: str, column: str, split: str, path: str) -> None:
    for row, chat in zip(rows["row"], rows[role], strict=True):
        if fault := chat_fault(chat, answered=True):
            raise UserError(f"data {path}: {split} row {row}: the chat in column {column!r} {fault}")


def _check_choices(rows: Dataset, role: str, column: str, split: str, path: str) -> None:
    for row, choices in zip(rows["row"], rows[role], strict=True):
        if problem := choices_problem(choices):
            raise UserError(f"data {path}: {split} row {row}: column {column!r}: {problem}; mend the row, or remove it")


_OPTIONAL = ("text_pair", "negative")
_PLAIN = ("text", *_OPTIONAL, "summary", "translation", "question", "context", "prompt", "completion")
_TEXTS = dict.fromkeys(_PLAIN, _check_texts)
_TEXTS |= {"tokens": _check_tokens, "messages": _check_chats, "choices": _check_choices}
