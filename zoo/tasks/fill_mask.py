"""Masked language modelling: some tokens are hidden, and the model says which (BERT, arXiv 1810.04805, section 3.1)."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorForTokenClassification, EvalPrediction, PreTrainedTokenizerBase

from zoo.errors import UserError
from zoo.sections import TaskSection
from zoo.task_types import DEFAULT_MLM_PROBABILITY, TASK_TYPES
from zoo.tasks.base import (
    IGNORED,
    Collate,
    Rows,
    Task,
    arrays,
    ask_text,
    check_length,
    check_padding,
    cut,
    token_counts,
)

# of the chosen tokens: hidden, replaced by any other, and the rest left as they are
HIDDEN, REPLACED = 0.8, 0.1
TOP_WORDS = 5  # of an answer


def _encode(tokenizer: PreTrainedTokenizerBase, section: TaskSection):
    def encode(rows: Rows) -> Rows:
        encoded = cut(tokenizer, section, [rows["text"]], return_special_tokens_mask=True)
        of = encoded.pop("text")
        return {**encoded, "row": [rows["row"][text] for text in of]}

    return encode


def masked(
    input_ids: list[int], special: list[int], tokenizer: PreTrainedTokenizerBase, probability: float, draw: list[int]
) -> tuple[list[int], list[int]]:
    """(input ids, labels) of one text. `draw` decides everything; at least one token is chosen where there is one."""
    rng = np.random.default_rng(draw)
    ids, labels = np.array(input_ids), np.full(len(input_ids), IGNORED)
    free = np.flatnonzero(np.array(special) == 0)
    chosen = free[rng.random(len(free)) < probability]
    if not len(chosen) and len(free):
        chosen = free[[rng.integers(len(free))]]
    labels[chosen] = ids[chosen]
    fate = rng.random(len(chosen))
    ids[chosen[fate < HIDDEN]] = tokenizer.mask_token_id
    replaced = chosen[(fate >= HIDDEN) & (fate < HIDDEN + REPLACED)]
    ids[replaced] = rng.integers(len(tokenizer), size=len(replaced))
    return ids.tolist(), labels.tolist()


def mask_probability(section: TaskSection) -> float:
    return DEFAULT_MLM_PROBABILITY if section.mlm_probability is None else section.mlm_probability


def check_mask(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for a tokenizer that cannot hide a token."""
    if tokenizer.mask_token is None:
        raise UserError("model: its tokenizer has no mask token, so it cannot learn to fill one")


def _collate(tokenizer: PreTrainedTokenizerBase, section: TaskSection) -> Collate:
    check_padding(tokenizer)
    check_mask(tokenizer)
    pad, probability = DataCollatorForTokenClassification(tokenizer), mask_probability(section)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        prepared = []
        for row in rows:
            kept = {name: value for name, value in row.items() if name not in ("special_tokens_mask", "draw")}
            ids, labels = masked(row["input_ids"], row["special_tokens_mask"], tokenizer, probability, row["draw"])
            prepared.append(kept | {"input_ids": ids, "labels": labels})
        return dict(pad(prepared))

    return collate


def likeliest(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """The likeliest tokens: whole logits of an evaluation would fill the memory."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def token_metrics(section: TaskSection, labels: Sequence[str], processor: Any):
    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        predicted, gold = arrays(prediction)
        found = {"accuracy": float((predicted == gold)[gold != IGNORED].mean())}
        if prediction.losses is not None:
            # of the mean over batches, as eval_loss is
            found["perplexity"] = math.exp(min(float(np.mean(prediction.losses)), 700.0))
        return found

    return metrics


def _ask(row: dict[str, Any], number: int, tokenizer: PreTrainedTokenizerBase) -> str:
    text = ask_text(row, number, tokenizer)
    if tokenizer.mask_token not in text:
        raise UserError(f"predict: text {number} has no {tokenizer.mask_token} to fill: {text[:60]!r}")
    return text


def _pipeline(section: TaskSection):
    return None, {"top_k": TOP_WORDS, "tokenizer_kwargs": {"truncation": True, "max_length": section.max_length}}


def _answer(section: TaskSection, answer: Any) -> dict[str, Any]:
    # one list of words for each mask, where there are several
    masks = answer if isinstance(answer[0], list) else [answer]
    return {"predicted": [[{"word": word["token_str"], "score": word["score"]} for word in mask] for mask in masks]}


FILL_MASK = Task(
    name="fill-mask",
    auto_class="AutoModelForMaskedLM",
    roles=TASK_TYPES["fill-mask"].roles,
    labels=None,
    encode=_encode,
    counts=token_counts,
    check=check_length,
    collate=_collate,
    metrics=token_metrics,
    metric_names=("accuracy", "perplexity"),
    reduce=likeliest,
    draws="all",
    ask=_ask,
    pipeline=_pipeline,
    answer=_answer,
    example='"Wheat [MASK] rose"',
)
