"""Masked tokens and two pieces of text: does one follow the other (BERT, arXiv 1810.04805, section 3.1), or are they
swapped (ALBERT, arXiv 1909.11942, section 3.1)?"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from inspect import signature
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import DataCollatorForTokenClassification, EvalPrediction, Pipeline, PreTrainedTokenizerBase

from zoo.errors import UserError
from zoo.sections import TaskSection
from zoo.task_types import TASK_TYPES
from zoo.tasks.base import IGNORED, Collate, Rows, Task, ask_text, check_length, check_padding
from zoo.tasks.fill_mask import check_mask, mask_probability, masked

# [CLS] first [SEP] second [SEP]
SPECIAL = 3
# an end of a line, or what may end a sentence
BETWEEN = re.compile(r"(?<=[.!?])\s+|\s*\n\s*")


def _encode(tokenizer: PreTrainedTokenizerBase, section: TaskSection):
    """Each text in pieces of at least two sentences, which together have `max_length` tokens or more; what is left of a
    text in the end, if it is a single sentence, is left out.

    A sentence of more than half of them is several: any span of text may be one (BERT, section 3), and there are texts
    without marks."""
    room = section.max_length - SPECIAL
    longest = max(room // 2, 1)
    if room < 2:
        raise UserError(f"task.max_length: {section.max_length}, but 3 tokens are special and each piece has one more")

    def encode(rows: Rows) -> Rows:
        found: Rows = {name: [] for name in ("sentences", "row", "piece", "unknown", "tokens")}
        for row, text in zip(rows["row"], rows["text"], strict=True):
            parts = [part for part in BETWEEN.split(text.strip()) if part]
            whole = tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"]
            sentences = [ids[at : at + longest] for ids in whole for at in range(0, len(ids), longest)]
            for number, piece in enumerate(_pieces(sentences, room)):
                tokens = list(chain(*piece))
                unknown = 0 if tokenizer.unk_token_id is None else tokens.count(tokenizer.unk_token_id)
                values = {"sentences": piece, "row": row, "piece": number, "unknown": unknown, "tokens": len(tokens)}
                for name, value in values.items():
                    found[name].append(value)
        return found

    return encode


def _pieces(sentences: Sequence[list[int]], room: int) -> Iterator[list[list[int]]]:
    piece: list[list[int]] = []
    for sentence in sentences:
        piece.append(sentence)
        if len(piece) > 1 and sum(map(len, piece)) >= room:
            yield piece
            piece = []
    if len(piece) > 1:
        yield piece


def _counts(encoded: Dataset, texts: int, section: TaskSection) -> str:
    with_pieces = len(set(encoded["row"]))
    if with_pieces < 2:
        raise UserError(
            f"data: {with_pieces} of {texts} texts {'has' if with_pieces == 1 else 'have'} two sentences; "
            f"{section.type} wants two texts at least that have"
        )
    words = f"{texts:,} texts, {texts - with_pieces:,} left out that have one sentence; {len(encoded):,} pieces"
    return f"{words}; {sum(encoded['unknown']):,} of {sum(encoded['tokens']):,} tokens unknown"


def cut_pair(first: list[int], second: list[int], room: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Both together at most `room` tokens: the longer is cut, at its beginning and its end at random."""
    half = room // 2
    longest = (max(room - len(second), room - half), max(room - len(first), half))
    sides = []
    for tokens, length in zip((first, second), longest, strict=True):
        excess = max(len(tokens) - length, 0)
        start = int(rng.binomial(excess, 0.5))
        sides.append(tokens[start : len(tokens) - excess + start])
    return sides[0], sides[1]


def next_sentence(row: dict[str, Any], rng: np.random.Generator) -> tuple[list[int], list[int], int]:
    """(first, second, 0: it follows, 1: it is of another text). Half of the pairs are of each kind."""
    first, second = _halves(row["sentences"], rng)
    if rng.random() < 0.5:
        return first, second, 0
    other = row["other"]["sentences"]
    return first, list(chain(*other[rng.integers(len(other)) :])), 1


def sentence_order(row: dict[str, Any], rng: np.random.Generator) -> tuple[list[int], list[int], int]:
    """(first, second, 0: as they were written, 1: swapped). Half of the pairs are of each kind."""
    first, second = _halves(row["sentences"], rng)
    return (first, second, 0) if rng.random() < 0.5 else (second, first, 1)


def _halves(sentences: Sequence[list[int]], rng: np.random.Generator) -> tuple[list[int], list[int]]:
    place = int(rng.integers(1, len(sentences)))
    return list(chain(*sentences[:place])), list(chain(*sentences[place:]))


def _collate(label: str, pair: Callable) -> Callable[[PreTrainedTokenizerBase, TaskSection], Collate]:
    def make(tokenizer: PreTrainedTokenizerBase, section: TaskSection) -> Collate:
        check_padding(tokenizer)
        check_mask(tokenizer)
        if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
            raise UserError(f"model: its tokenizer has no class token, or no separator; {section.type} needs both")
        pad = DataCollatorForTokenClassification(tokenizer)
        room, probability = section.max_length - SPECIAL, mask_probability(section)

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            prepared, relations = [], []
            for row in rows:
                rng = np.random.default_rng([*row["draw"], 1])  # other numbers than those of the masks
                first, second, relation = pair(row, rng)
                first, second = cut_pair(first, second, room, rng)
                ids = [tokenizer.cls_token_id, *first, tokenizer.sep_token_id, *second, tokenizer.sep_token_id]
                special = [1, *[0] * len(first), 1, *[0] * len(second), 1]
                segments = [0] * (len(first) + 2) + [1] * (len(second) + 1)
                hidden, labels = masked(ids, special, tokenizer, probability, row["draw"])
                made = {"input_ids": hidden, "token_type_ids": segments, "attention_mask": [1] * len(ids)}
                prepared.append(made | {"labels": labels} | ({"row": row["row"]} if "row" in row else {}))
                relations.append(relation)
            return dict(pad(prepared)) | {label: torch.tensor(relations)}

        return collate

    return make


def _check(label: str, other: str) -> Callable[[TaskSection, Any], None]:
    def check(section: TaskSection, model: Any) -> None:
        check_length(section, model)
        if label not in signature(model.forward).parameters:
            raise UserError(f"task.type: {section.type}: {type(model).__name__} does not learn it; use {other}")

    return check


def _relation_loss(label: str, logits: str) -> Callable[[Any, dict[str, Any]], torch.Tensor]:
    return lambda outputs, batch: F.cross_entropy(outputs[logits], batch[label])


def _reduce(logits: tuple, labels: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """(likeliest tokens, likeliest relation)."""
    return logits[0].argmax(-1), logits[1].argmax(-1)


def _metrics(name: str):
    def make(section: TaskSection, labels: Sequence[str], processor: Any):
        def metrics(prediction: EvalPrediction) -> dict[str, float]:
            predicted: Any = prediction.predictions
            labelled: Any = prediction.label_ids
            (tokens, relation), (gold, related) = predicted, labelled
            return {
                "accuracy": float((tokens == gold)[gold != IGNORED].mean()),
                name: float((relation == np.reshape(related, -1)).mean()),
            }

        return metrics

    return make


class Relations(Pipeline):
    """How two texts belong together."""

    _load_tokenizer = True  # type: ignore[assignment]
    tokenizer: Any
    model: Any

    def _sanitize_parameters(self, names=(), **options):
        return options, {}, {"names": names}

    def preprocess(self, input_, **options):
        return self.tokenizer(input_["text"], input_["text_pair"], return_tensors="pt", **options)

    def _forward(self, input_tensors, **options):
        # the tokens come first, in every class
        return {"logits": self.model(**input_tensors).to_tuple()[1]}

    def postprocess(self, model_outputs, **options):
        probabilities = model_outputs["logits"].float().softmax(-1)[0].tolist()
        return dict(zip(options["names"], probabilities, strict=True))


def _ask(row: dict[str, Any], number: int, tokenizer: PreTrainedTokenizerBase) -> Any:
    if "text_pair" not in row:
        raise UserError(f"predict: text {number} stands alone; give a --file with the columns text and text_pair")
    return ask_text(row, number, tokenizer)


def _answer(section: TaskSection, answer: dict[str, float]) -> dict[str, Any]:
    return {"predicted": max(answer, key=lambda name: answer[name]), "probabilities": answer}


def _pipeline(names: tuple[str, str]):
    return lambda section: (Relations, {"names": names, "truncation": True, "max_length": section.max_length})


USAGE = """from transformers import AutoModelForPreTraining, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForPreTraining.from_pretrained("."{{trusted}})
output = model(**tokenizer("Wheat shipments rose.", "Prices fell.", return_tensors="pt"))
print(output.{logits}.softmax(-1))  # {names}"""

NEXT_SENTENCE_PREDICTION = Task(
    name="next-sentence-prediction",
    auto_class="AutoModelForPreTraining",
    label="next_sentence_label",
    roles=TASK_TYPES["next-sentence-prediction"].roles,
    labels=None,
    encode=_encode,
    counts=_counts,
    check=_check("next_sentence_label", "sentence-order-prediction, or fill-mask"),
    collate=_collate("next_sentence_label", next_sentence),
    row_loss=_relation_loss("next_sentence_label", "seq_relationship_logits"),
    metrics=_metrics("next_sentence_accuracy"),
    metric_names=("accuracy", "next_sentence_accuracy"),
    reduce=_reduce,
    draws="all",
    others=True,
    asked=("text", "text_pair"),
    ask=_ask,
    pipeline=_pipeline(("next", "random")),
    answer=_answer,
    usage=USAGE.format(logits="seq_relationship_logits", names="next, random"),
    tag="fill-mask",
)
SENTENCE_ORDER_PREDICTION = replace(
    NEXT_SENTENCE_PREDICTION,
    name="sentence-order-prediction",
    auto_class="AutoModelForPreTraining",
    label="sentence_order_label",
    roles=TASK_TYPES["sentence-order-prediction"].roles,
    check=_check("sentence_order_label", "next-sentence-prediction, or fill-mask"),
    collate=_collate("sentence_order_label", sentence_order),
    row_loss=_relation_loss("sentence_order_label", "sop_logits"),
    metrics=_metrics("sentence_order_accuracy"),
    metric_names=("accuracy", "sentence_order_accuracy"),
    others=False,
    pipeline=_pipeline(("in order", "swapped")),
    usage=USAGE.format(logits="sop_logits", names="in order, swapped"),
)
