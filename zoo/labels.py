"""The column that a task learns: a class, several, a number, tags, answers, a choice; read, checked and numbered."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from datasets import ClassLabel, Dataset, LargeList, List, Value

from zoo.errors import UserError

# pandas' reader, which the format csv is, takes some words for nothing
NOTHING = "; remove the row, or if it is a word such as NA or null, set data.options.keep_default_na: false"


@dataclass(frozen=True)
class LabelKind:
    """names: of the classes in train, in order. numbered: rows of a split with labels as a model reads them.

    role: the column. in_proportion: rows are held out so that each label keeps its share. declared: names that need no
    look at the data. learned: by the model; otherwise the column only says how rows are held out.
    """

    role: str
    names: Callable[[Dataset], list[str]]
    numbered: Callable[[Dataset, str, list[str]], Dataset]
    in_proportion: bool = False
    declared: list[str] | None = None
    learned: bool = True


def _is_missing(feature: Any, label: Any) -> bool:
    # -1 is how published test splits leave their labels out
    return label is None or (isinstance(feature, ClassLabel) and label == -1)


def _missing(split: str, row: int) -> UserError:
    return UserError(f"data: {split} row {row}: the label is missing{NOTHING}")


def _at_least_two(names: list[str]) -> list[str]:
    if len(names) < 2:
        there = f"one label only, {names[0]!r}" if names else "no label at all"
        raise UserError(f"data: train has {there}; there is nothing to learn")
    return names


def _words(feature: Any, values: Iterable[Any]) -> list[str]:
    """The distinct labels as words, in order: a ClassLabel's own, numbers by size, words by the alphabet."""
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    kind = feature.dtype if isinstance(feature, Value) else ""
    if kind not in ("string", "large_string", "bool") and not kind.startswith(("int", "uint")):
        raise UserError(f"data: labels are {kind or feature}; a class is a word or a whole number")
    return [str(value) for value in sorted(set(values))]


def _word(feature: Any, label: Any) -> str:
    return feature.int2str(label) if isinstance(feature, ClassLabel) else str(label)


def _number(name: str, numbers: dict[str, int], split: str, row: int) -> int:
    if name not in numbers:
        known = ", ".join(list(numbers)[:20]) + (", ..." if len(numbers) > 20 else "")
        raise UserError(f"data: {split} row {row}: the label {name!r} is unknown to training, which has {known}")
    return numbers[name]


def _replaced(rows: Dataset, role: str, values: list[Any], feature: Any) -> Dataset:
    return rows.remove_columns(role).add_column(role, values, feature=feature)


# One class


def _class_names(train: Dataset) -> list[str]:
    feature = train.features["label"]
    for row, label in zip(train["row"], train["label"], strict=True):
        if label is None:
            raise _missing("train", row)
    return _at_least_two(_words(feature, train["label"]))


def _class_numbers(rows: Dataset, split: str, names: list[str]) -> Dataset:
    feature, numbers = rows.features["label"], {name: number for number, name in enumerate(names)}
    numbered = []
    for row, label in zip(rows["row"], rows["label"], strict=True):
        if _is_missing(feature, label):
            raise _missing(split, row)
        numbered.append(_number(_word(feature, label), numbers, split, row))
    return _replaced(rows, "label", numbered, ClassLabel(names=names))


# One class, which decides only what is held out, where there is one


def _beside_numbers(rows: Dataset, split: str, names: list[str]) -> Dataset:
    if "label" not in rows.column_names:
        return rows
    there = [label for label in rows["label"] if label is not None]
    return _class_numbers(rows, split, _words(rows.features["label"], there))


# Any number of classes: a list of words


def _listed(rows: Dataset, role: str, split: str) -> Iterator[tuple[int, Sequence[Any]]]:
    if not isinstance(rows.features[role], List | LargeList):
        raise UserError(
            f"data: the {role} of {split} is no list, as this task wants it; a file of JSON lines or parquet can hold "
            f'one: {{"{role}": ["a", "b"]}}'
        )
    for row, labels in zip(rows["row"], rows[role], strict=True):
        if labels is None or any(label is None or label == "" for label in labels):
            raise _missing(split, row)
        yield row, labels


def _classes_names(train: Dataset) -> list[str]:
    values = [label for _, labels in _listed(train, "label", "train") for label in labels]
    return _at_least_two(_words(train.features["label"].feature, values))


def _classes_numbers(rows: Dataset, split: str, names: list[str]) -> Dataset:
    """A row of 0 and 1, one for each class, in floating point as the loss takes it."""
    numbers = {name: number for number, name in enumerate(names)}
    hot = []
    for row, labels in _listed(rows, "label", split):
        feature = rows.features["label"].feature
        chosen = {_number(_word(feature, label), numbers, split, row) for label in labels}
        hot.append([float(number in chosen) for number in range(len(names))])
    return _replaced(rows, "label", hot, List(Value("float32")))


# A number

ONE_OUTPUT = ["LABEL_0"]  # transformers' own name for it


def _numeric_names(train: Dataset) -> list[str]:
    return ONE_OUTPUT


def _numeric(rows: Dataset, split: str, names: list[str]) -> Dataset:
    values = []
    for row, label in zip(rows["row"], rows["label"], strict=True):
        if label is None:
            raise _missing(split, row)
        if isinstance(label, bool) or not isinstance(label, int | float) or not math.isfinite(label):
            raise UserError(f"data: {split} row {row}: the label is {label!r}; a regression learns a finite number")
        values.append(float(label))
    if split == "train" and len(set(values)) == 1:
        raise UserError(f"data: train has one label only, {values[0]}; there is nothing to learn")
    return _replaced(rows, "label", values, Value("float32"))


# A tag for each token


def _tag_names(train: Dataset) -> list[str]:
    values = [tag for _, tags in _listed(train, "tags", "train") for tag in tags]
    return _at_least_two(_words(train.features["tags"].feature, values))


def _tag_numbers(rows: Dataset, split: str, names: list[str]) -> Dataset:
    numbers = {name: number for number, name in enumerate(names)}
    tokens, numbered = rows["tokens"], []
    for index, (row, tags) in enumerate(_listed(rows, "tags", split)):
        if len(tags) != len(tokens[index]):
            raise UserError(f"data: {split} row {row}: {len(tokens[index])} tokens and {len(tags)} tags")
        feature = rows.features["tags"].feature
        numbered.append([_number(_word(feature, tag), numbers, split, row) for tag in tags])
    return _replaced(rows, "tags", numbered, List(ClassLabel(names=names)))


# Answers to a question: {"text": [...], "answer_start": [...]}, as SQuAD has them

TWO_OUTPUTS = ["start", "end"]


def _span_names(train: Dataset) -> list[str]:
    rows = _answers(train, "train")
    if not any(answers["text"] for _, answers in rows):
        raise UserError("data: no question of train has an answer; there is nothing to learn")
    return TWO_OUTPUTS


def _answers(rows: Dataset, split: str) -> Iterator[tuple[int, dict[str, list]]]:
    feature = rows.features["answers"]
    if not isinstance(feature, dict) or not {"text", "answer_start"} <= feature.keys():
        raise UserError(
            f"data: the answers of {split} are {feature}; this task wants what SQuAD has, with empty lists where there "
            'is none: {"answers": {"text": ["May"], "answer_start": [24]}}'
        )
    for row, answers in zip(rows["row"], rows["answers"], strict=True):
        texts, starts = (None if answers is None else answers[key] for key in ("text", "answer_start"))
        if texts is None or starts is None:
            raise UserError(f"data: {split} row {row}: the answers are missing; empty lists say that there is none")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise UserError(
                f"data: {split} row {row}: text and answer_start are {str(texts)[:60]} and {str(starts)[:60]}, not two "
                "lists of the same length"
            )
        yield row, {"text": texts, "answer_start": starts}


def _spans(rows: Dataset, split: str, names: list[str]) -> Dataset:
    """Checked: each answer stands in its context where it says."""
    checked, contexts = [], rows["context"]
    for (row, answers), context in zip(_answers(rows, split), contexts, strict=True):
        for text, start in zip(answers["text"], answers["answer_start"], strict=True):
            where = f"data: {split} row {row}: the answer"
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{where} {text!r} is no text; empty lists say that there is none")
            if not isinstance(start, int) or not 0 <= start < len(context):
                raise UserError(f"{where} {text[:60]!r} starts at {start!r}; its context has {len(context)} letters")
            there = context[start : start + len(text)]
            if there != text:
                place = context.find(text)
                remedy = f"; it stands at {place}" if place >= 0 else "; its context does not hold it"
                raise UserError(f"{where} {text[:60]!r} starts at {start}, but {there[:60]!r} stands there{remedy}")
        checked.append(answers)
    feature = {"text": List(Value("string")), "answer_start": List(Value("int64"))}
    return _replaced(rows, "answers", checked, feature)


# One of the choices that a row has


def choices_problem(choices: Any) -> str | None:
    """What is wrong with a row's choices, in words, or None."""
    if not isinstance(choices, list):
        return f"holds {choices!r:.60}, not a list of texts, as JSON lines and parquet can hold one"
    if len(choices) < 2:
        return f"holds fewer than two choices, {choices!r:.60}"
    for number, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            return f"choice {number} is {choice!r:.60}, and not a text"
    return None


def _choice_numbers(rows: Dataset, split: str, names: list[str]) -> Dataset:
    """Labels are numbers from 0, texts of choices or, where not all of a split are such texts, letters from A."""
    feature, labels, choices = rows.features["label"], list(rows["label"]), list(rows["choices"])
    for row, label in zip(rows["row"], labels, strict=True):
        if _is_missing(feature, label):
            raise _missing(split, row)
    if not any(isinstance(label, str) for label in labels):
        known: list[Sequence[Any]] = [range(len(given)) for given in choices]
    elif all(label in given for label, given in zip(labels, choices, strict=True)):
        known = choices
    else:
        lettered = all(label in ascii_uppercase and len(label) == 1 for label in labels)
        known = [ascii_uppercase[: len(given)] for given in choices] if lettered else choices
    numbered = []
    for row, label, given in zip(rows["row"], labels, known, strict=True):
        found = [number for number, name in enumerate(given) if name == label and not isinstance(label, bool)]
        if len(found) != 1:
            there = ", ".join(f"{name!r:.40}" for name in given)
            what = "is none" if not found else "is more than one"
            raise UserError(
                f"data: {split} row {row}: the label {label!r:.60} {what} of its choices, {there}; give a choice's "
                "number from 0, its letter from A, or its text"
            )
        numbered += found
    return _replaced(rows, "label", numbered, Value("int64"))


LABEL_KINDS: dict[str, LabelKind] = {
    "class": LabelKind("label", _class_names, _class_numbers, in_proportion=True),
    "beside": LabelKind("label", lambda train: [], _beside_numbers, in_proportion=True, declared=[], learned=False),
    "classes": LabelKind("label", _classes_names, _classes_numbers),
    "number": LabelKind("label", _numeric_names, _numeric, declared=ONE_OUTPUT),
    "tags": LabelKind("tags", _tag_names, _tag_numbers),
    "answers": LabelKind("answers", _span_names, _spans, declared=TWO_OUTPUTS),
    "choice": LabelKind("label", lambda train: [], _choice_numbers, declared=[]),
}
