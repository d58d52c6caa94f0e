"""A tag for each token of a text: names (BIO, IOB2 and the like, measured by spans) or parts of speech."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import DataCollatorForTokenClassification, EvalPrediction, PreTrainedTokenizerBase

from zoo.labels import LABEL_KINDS
from zoo.sections import TaskSection
from zoo.task_types import TASK_TYPES
from zoo.tasks.base import (
    IGNORED,
    Collate,
    Records,
    Rows,
    Table,
    Task,
    arrays,
    check_length,
    check_padding,
    cut,
    token_counts,
)
from zoo.tasks.spans import scores


def _prepare(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Byte-level BPE (RoBERTa, GPT-2) has other pieces for a word behind a space: tokens get one, as texts have it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    written = json.loads(backend.to_str()) if backend is not None else {}
    first = written.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", [first])
    bare = [step for step in steps if step.get("type") == "ByteLevel" and not step.get("add_prefix_space")]
    if bare and backend is not None:
        for step in bare:
            step["add_prefix_space"] = True
        tokenizer._tokenizer = type(backend).from_str(json.dumps(written))
        # the class makes its pre-tokenizer anew when it is opened, by this
        tokenizer.init_kwargs["add_prefix_space"] = tokenizer.add_prefix_space = True
        print("the tokenizer puts a space before each token, as texts have one between words, and is saved so")
    return {}


def _encode(tokenizer: PreTrainedTokenizerBase, section: TaskSection):
    def encode(rows: Rows) -> Rows:
        encoded = cut(tokenizer, section, [rows["tokens"]], is_split_into_words=True)
        # the first piece of a token bears its tag; the others, and what the tokenizer adds, are not learned
        labels = []
        for text, words in zip(encoded.pop("text"), encoded.pop("word_ids"), strict=True):
            first = [word is not None and word != before for before, word in zip([None, *words], words, strict=False)]
            tags = rows["tags"][text]
            labels.append([tags[word] if new else IGNORED for new, word in zip(first, words, strict=True)])
        return {**encoded, "labels": labels, "row": rows["row"]}

    return encode


def _collate(tokenizer: PreTrainedTokenizerBase, section: TaskSection) -> Collate:
    check_padding(tokenizer)
    pad = DataCollatorForTokenClassification(tokenizer)
    return lambda rows: dict(pad(rows))


def _tags(prediction: EvalPrediction, labels: Sequence[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Gold and predicted tags of each row, one for each token that was not cut off."""
    logits, gold = arrays(prediction)
    learned = gold != IGNORED

    def named(numbers: np.ndarray) -> list[list[str]]:
        return [[labels[number] for number in row[mask]] for row, mask in zip(numbers, learned, strict=True)]

    return named(gold), named(logits.argmax(-1))


def _metrics(section: TaskSection, labels: Sequence[str], processor: Any):
    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        gold, predicted = _tags(prediction, labels)
        right = [one == other for row in zip(gold, predicted, strict=True) for one, other in zip(*row, strict=True)]
        found = scores(gold, predicted)[""]
        return {"accuracy": float(np.mean(right)), **{name: found[name] for name in ("precision", "recall", "f1")}}

    return metrics


def _records(section: TaskSection, labels: Sequence[str], processor: Any):
    def records(prediction: EvalPrediction) -> Iterator[dict[str, Any]]:
        for gold, predicted in zip(*_tags(prediction, labels), strict=True):
            yield {"gold": gold, "predicted": predicted}

    return records


def _classes(labels: Sequence[str], records: Records) -> Table:
    """Of each kind of span."""
    found = scores(*([record[side] for record in records] for side in ("gold", "predicted")))
    return {kind: values for kind, values in found.items() if kind}


def _answer(section: TaskSection, answer: Any) -> dict[str, Any]:
    spans = ({key: value.item() if hasattr(value, "item") else value for key, value in span.items()} for span in answer)
    return {"predicted": list(spans)}


TOKEN_CLASSIFICATION = Task(
    name="token-classification",
    auto_class="AutoModelForTokenClassification",
    prepare=_prepare,
    roles=TASK_TYPES["token-classification"].roles,
    labels=LABEL_KINDS["tags"],
    encode=_encode,
    counts=token_counts,
    check=check_length,
    collate=_collate,
    metrics=_metrics,
    metric_names=("accuracy", "precision", "recall", "f1"),
    records=_records,
    classes=_classes,
    # a word's tag is learned and measured at its first piece
    pipeline=lambda section: (None, {"aggregation_strategy": "first"}),
    answer=_answer,
)
