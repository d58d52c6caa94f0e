"""What a task is, and what encoding a batch of texts has in common."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from transformers import EvalPrediction, Pipeline, PreTrainedModel, PreTrainedTokenizerBase

from zoo.errors import UserError
from zoo.labels import LabelKind
from zoo.sections import TaskSection

Rows = dict[str, list]  # of a batch, by column
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]
Records = Sequence[Mapping[str, Any]]
ReadRecords = Callable[[EvalPrediction], Iterator[dict[str, Any]]]
Table = dict[str, dict[str, float]]  # class -> precision, recall, f1, support

IGNORED = -100  # the label of a token that is not learned

# of the metrics that tasks have; of the others more is better
LOWER_IS_BETTER = ("mse", "mae", "perplexity", "calibration_error")

# columns of encoded rows that are counted before training, and never reach a batch
COUNTED = ("truncated", "unknown", "tokens", "width", "height", "targets_cut", "learned")
# families whose first token stands behind the position of check_padding
COUNTS_FROM_PADDING = ("roberta", "xlm-roberta", "camembert")


def ask_text(row: dict[str, Any], number: int, tokenizer: Any) -> Any:
    """The text, or the pair, of a row that is asked about. Raises UserError where there is none."""
    for role, text in row.items():
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"predict: {role} {number} is {'empty' if text == '' else repr(text)}")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(f"predict: {role} {number} is not UTF-8: {text[:60]!r}")
    return row if len(row) > 1 else row["text"]


@dataclass(frozen=True)
class Task:
    """What is learned, from a row of data to the words of an answer. A `processor` is a tokenizer, or makes pixels.

    processor: which of them it wants. label: what a batch holds besides `labels`, for heads that learn two things.
    roles: the columns it reads; labels: how the one it learns is read.
    encode: (processor, section) -> a function of a batch of rows, as `Dataset.map` calls it; its columns COUNTED are
    what `counts` puts in words, from the encoded rows, how many rows there were, and the section.
    collate: (processor, section) -> a function of a list of encoded rows to a batch of tensors. config_fields: of the
    model's config, which it takes by name besides. label_names: what the loss wants of a batch, where it is no label.
    prepare: makes a processor fit for training, and says what `generate` begins with; a finished one is.
    draws: the rows whose collate makes random choices, from the `draw` that each of them then carries. others: it wants
    as `other` a row of another text, too.
    check: raises UserError for a model that cannot read what this section makes.

    metrics: (section, label names, processor) -> a function of gathered predictions to numbers, under `metric_names`.
    reduce: logits on the device -> what is gathered, where whole logits would be too much.
    pool: (section, predictions, the encoded rows) -> predictions a row, where a row was encoded as several.
    records: (section, label names, processor) -> a function of gathered predictions to a mapping for each row: `gold`,
    `predicted`, `probabilities`. None where a row has no answer of its own.
    classes: (label names, records) -> a table of each class. loss: (section, labels of train, classes, smoothing) ->
    another loss than the model's own, or None; where nothing is trained there are no labels. row_loss: (outputs, batch)
    -> the part of the model's loss that is a mean over rows, where the rest is one over tokens.

    writes: predictions are what the model generates, and not its logits. learn: section -> a function of a model that
    has no head, and of a batch, to the loss, a mean over rows, and what is gathered as predictions.

    asked: the roles that a prediction wants, the first of them or messages at least; ask: (these of a row, its number,
    processor) -> what a pipeline takes, or UserError. pipeline: section -> transformers' own pipeline, or one of ours,
    and the options of a call. answer: what that says, under the names of `predictions.jsonl`. example: what a card asks
    it; usage: the card's whole code, where transformers has no such pipeline, with places for `trusted`, `prefix` and a
    `text` behind that, or (section, model) -> it. tag: the hub's name for it, where that is another; library: what
    opens the model. files: (section, model) -> what that wants to find beside the weights, by name.
    """

    name: str
    auto_class: str
    roles: tuple[str, ...]
    labels: LabelKind | None
    encode: Callable[[Any, TaskSection], Callable[[Rows], Rows]]
    counts: Callable[[Dataset, int, TaskSection], str]
    collate: Callable[..., Collate]
    metrics: Callable[[TaskSection, Sequence[str], Any], Callable[[EvalPrediction], dict[str, float]]]
    metric_names: tuple[str, ...]
    pipeline: Callable[[TaskSection], tuple[type[Pipeline] | None, dict[str, Any]]]
    answer: Callable[[TaskSection, Any], dict[str, Any]]
    asked: tuple[str, ...] = ("text",)
    ask: Callable[[dict[str, Any], int, Any], Any] = ask_text
    example: str = '"Wheat shipments rose"'
    processor: Literal["tokenizer", "image_processor"] = "tokenizer"
    prepare: Callable[[Any], dict[str, Any]] = lambda processor: {}
    check: Callable[[TaskSection, PreTrainedModel], None] = lambda section, model: None
    records: (
        Callable[[TaskSection, Sequence[str], Any], Callable[[EvalPrediction], Iterator[dict[str, Any]]]] | None
    ) = None
    classes: Callable[[Sequence[str], Records], Table] | None = None
    pool: Callable[[TaskSection, EvalPrediction, Any], EvalPrediction] | None = None
    loss: Callable[[TaskSection, Sequence[int], int, float], Callable | None] | None = None
    row_loss: Callable[[Any, dict[str, Any]], torch.Tensor] | None = None
    problem_type: str | None = None
    reduce: Callable[..., Any] | None = None
    writes: bool = False
    learn: Callable[[TaskSection], Callable[[Any, dict[str, Any]], tuple[Any, Any]]] | None = None
    usage: str | Callable[[TaskSection, PreTrainedModel], str] | None = None
    label: str | None = None
    tag: str | None = None
    library: str = "transformers"
    files: Callable[[TaskSection, PreTrainedModel], dict[str, str]] | None = None
    draws: Literal["all", "train"] | None = None
    others: bool = False
    config_fields: tuple[str, ...] = ()
    label_names: tuple[str, ...] | None = None


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


def pieces(tokenizer: PreTrainedTokenizerBase, rows: Sequence[int], texts: Sequence[list[int]], length: int) -> Rows:
    """Each text whole, in pieces of at most `length` tokens; a last one of a single token is left out.

    Returns `input_ids`, the `row` of each, its number there as `piece`, and what is COUNTED.
    """
    found: Rows = {name: [] for name in ("input_ids", "row", "piece", "unknown", "tokens")}
    for row, ids in zip(rows, texts, strict=True):
        for start in range(0, len(ids) - 1, length):
            piece = ids[start : start + length]
            found["input_ids"].append(piece)
            found["row"].append(row)
            found["piece"].append(start // length)
            found["unknown"].append(0 if tokenizer.unk_token_id is None else piece.count(tokenizer.unk_token_id))
            found["tokens"].append(len(piece))
    return found


def token_counts(encoded: Dataset, texts: int, section: TaskSection) -> str:
    """What `cut` has counted, in words."""
    truncated, unknown, tokens = (sum(encoded[name]) for name in ("truncated", "unknown", "tokens"))
    if section.stride is not None:
        pieces = f"{len(encoded):,} windows of {section.max_length} tokens"
    else:
        pieces = f"{truncated:,} ({truncated / texts:.1%}) cut at {section.max_length} tokens"
    return f"{texts:,} texts; {pieces}; {unknown:,} of {tokens:,} tokens unknown"


def position_count(model: PreTrainedModel) -> int | None:
    """How many tokens a model has positions for, behind a learned prefix; None where they go on without end."""
    config: Any = model.config
    if (getattr(config, "block", None) or {}).get("positions", "learned") != "learned":
        return None
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and str(config.model_type).removeprefix("zoo_") in COUNTS_FROM_PADDING:
        positions -= config.pad_token_id + 1
    prefix = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    return positions if positions is None else positions - prefix


def check_length(section: TaskSection, model: PreTrainedModel) -> None:
    """Raises UserError where texts may be longer than the model has positions for."""
    positions = position_count(model)
    if positions is not None and section.max_length > positions:
        raise UserError(f"task.max_length: {section.max_length}, but the model has {positions} positions")


def check_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for a tokenizer that cannot pad."""
    if tokenizer.pad_token is None:
        raise UserError("model: its tokenizer has no padding token; save it with one (tokenizer.pad_token = ...)")


def arrays(prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
    """(logits, labels) of a prediction."""
    return np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
