"""What a task is, and what encoding a batch of texts has in common."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase

from zoo.errors import UserError
from zoo.labels import LabelKind
from zoo.recipe import TaskSection

Rows = dict[str, list]  # of a batch, by column
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]

IGNORED = -100  # the label of a token that is not learned

# of the metrics that tasks have; of the others more is better
LOWER_IS_BETTER = ("mse", "mae", "perplexity", "calibration_error")

# columns of encoded rows that are counted before training, and never reach a batch
COUNTED = ("truncated", "unknown", "tokens")


@dataclass(frozen=True)
class Task:
    """encode: (tokenizer, section) -> a function of a batch of rows, as `Dataset.map` calls it.
    collate: (tokenizer, section) -> a function of a list of encoded rows to a batch of tensors.
    metrics: (section, label names) -> a function of gathered predictions to numbers, under `metric_names`.
    records: (section, label names) -> a function of gathered predictions to a mapping for each row: `gold`,
    `predicted`, `probabilities`. None where a row has no answer of its own.
    roles: the columns it reads; a task without pairs has no text_pair. labels: how the one it learns is read.
    reduce: logits on the device -> what is gathered, where whole logits would be too much.
    draws: its collate makes random choices, from the `draw` that each row then carries.
    """

    name: str
    auto_class: str
    roles: tuple[str, ...]
    labels: LabelKind | None
    encode: Callable[[PreTrainedTokenizerBase, TaskSection], Callable[[Rows], Rows]]
    collate: Callable[[PreTrainedTokenizerBase, TaskSection], Collate]
    metrics: Callable[[TaskSection, Sequence[str]], Callable[[EvalPrediction], dict[str, float]]]
    metric_names: tuple[str, ...]
    records: Callable[[TaskSection, Sequence[str]], Callable[[EvalPrediction], Iterator[dict[str, Any]]]] | None = None
    problem_type: str | None = None
    reduce: Callable[..., Any] | None = None
    draws: bool = False


def cut(tokenizer: PreTrainedTokenizerBase, section: TaskSection, texts: Sequence[Any], **options) -> Rows:
    """Tokenises to windows of at most `max_length` tokens: the first of each text, or with `stride` all of them.

    Returns the model's inputs and, for each window: `text`, the number of its text in the batch, what is COUNTED and,
    for texts that are words, `word_ids`.
    """
    pairs = [texts[1]] if len(texts) > 1 else []
    special = tokenizer.num_special_tokens_to_add(pair=bool(pairs))
    overlap = section.stride or 0
    if section.max_length <= special + overlap:
        # the tokenizer would not cut at all, or never come to an end
        also = f" and {overlap} overlap (task.stride)" if overlap else ""
        raise UserError(f"task.max_length: {section.max_length}, but {special} tokens are special{also}; give more")
    # a pair is cut at its longer text
    encoding = tokenizer(
        texts[0], *pairs, truncation=True, max_length=section.max_length, stride=overlap,
        return_overflowing_tokens=True, **options,
    )  # fmt: skip
    encoded = dict(encoding)
    text_of = encoded.pop("overflow_to_sample_mapping")
    several = np.bincount(text_of, minlength=len(texts[0])) > 1
    first = [number for number, text in enumerate(text_of) if number == 0 or text_of[number - 1] != text]
    kept = range(len(text_of)) if section.stride is not None else first
    rows = {name: [values[number] for number in kept] for name, values in encoded.items()}
    if options.get("is_split_into_words"):
        rows["word_ids"] = [encoding.word_ids(number) for number in kept]
    rows["text"] = [text_of[number] for number in kept]
    rows["truncated"] = [bool(several[text]) and section.stride is None for text in rows["text"]]
    unknown = tokenizer.unk_token_id
    rows["unknown"] = [0 if unknown is None else ids.count(unknown) for ids in rows["input_ids"]]
    rows["tokens"] = [len(ids) for ids in rows["input_ids"]]
    return rows


def padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for a tokenizer that cannot pad."""
    if tokenizer.pad_token is None:
        raise UserError("model: its tokenizer has no padding token; save it with one (tokenizer.pad_token = ...)")


def arrays(prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
    """(logits, labels) of a prediction."""
    return np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
