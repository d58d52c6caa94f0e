"""Classification of a text, or of a pair of texts, into one of several classes."""

from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, f1_score
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedTokenizerBase

from zoo.errors import UserError
from zoo.recipe import TaskSection
from zoo.tasks.base import Task


def _encode(tokenizer: PreTrainedTokenizerBase, section: TaskSection):
    def encode(rows: dict[str, list]) -> dict[str, list]:
        pairs = (rows["text_pair"],) if "text_pair" in rows else ()
        special = tokenizer.num_special_tokens_to_add(pair=bool(pairs))
        if section.max_length <= special:
            # the tokenizer would not cut at all
            raise UserError(f"task.max_length: {section.max_length}, but {special} tokens are special; give more")
        # a pair is cut at its longer text
        encoded = tokenizer(rows["text"], *pairs, truncation=True, max_length=section.max_length)
        return {**encoded, "labels": rows["label"]}

    return encode


def _collate(tokenizer: PreTrainedTokenizerBase):
    if tokenizer.pad_token is None:
        raise UserError("model: its tokenizer has no padding token; save it with one (tokenizer.pad_token = ...)")
    pad = DataCollatorWithPadding(tokenizer)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(pad(rows))

    return collate


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    logits, labels = prediction.predictions, prediction.label_ids
    predicted = np.argmax(logits, axis=-1)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1_macro": float(f1_score(labels, predicted, average="macro", zero_division=0)),
    }


TEXT_CLASSIFICATION = Task(
    name="text-classification",
    auto_class="AutoModelForSequenceClassification",
    roles=("text", "text_pair", "label"),
    encode=_encode,
    collate=_collate,
    metrics=_metrics,
    metric_names=("accuracy", "f1_macro"),
)
