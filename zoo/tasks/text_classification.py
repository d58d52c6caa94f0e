"""A text, or a pair of texts: one class, any number of classes, or a number."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, mean_squared_error
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedTokenizerBase, TextClassificationPipeline

from zoo.labels import LABEL_KINDS
from zoo.sections import TaskSection
from zoo.task_types import DEFAULT_THRESHOLD, TASK_TYPES
from zoo.tasks.base import Collate, Records, Rows, Table, Task, arrays, check_length, check_padding, cut, token_counts
from zoo.tasks.classification import (
    ONE_METRICS,
    one_answer,
    one_classes,
    one_metrics,
    one_records,
    report,
    scores_of,
    weighted_loss,
)


def _encode(tokenizer: PreTrainedTokenizerBase, section: TaskSection):
    def encode(rows: Rows) -> Rows:
        texts = [rows[role] for role in ("text", "text_pair") if role in rows]
        encoded = cut(tokenizer, section, texts)
        of = encoded.pop("text")
        return {
            **encoded,
            "labels": [rows["label"][text] for text in of],
            "row": [rows["row"][text] for text in of],
        }

    return encode


def _collate(tokenizer: PreTrainedTokenizerBase, section: TaskSection) -> Collate:
    check_padding(tokenizer)
    pad = DataCollatorWithPadding(tokenizer)
    return lambda rows: dict(pad(rows))


def pooled(section: TaskSection, prediction: EvalPrediction, rows: Any) -> EvalPrediction:
    """One prediction a text from those of its windows, which stand together; `row` of `rows` names the text of each."""
    if section.stride is None:
        return prediction
    logits, labels = arrays(prediction)
    starts = np.flatnonzero(np.diff(rows["row"], prepend=np.nan) != 0)
    if section.pooling == "max":
        logits = np.maximum.reduceat(logits, starts)
    else:
        logits = np.add.reduceat(logits, starts) / np.diff(starts, append=len(logits))[:, None]
    return EvalPrediction(logits, labels[starts])


# Any number of classes


def threshold(section: TaskSection) -> float:
    return DEFAULT_THRESHOLD if section.threshold is None else section.threshold


def _several_metrics(section: TaskSection, labels: Sequence[str], processor: Any):
    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits, hot = arrays(prediction)
        gold, predicted = hot > 0.5, expit(logits) >= threshold(section)
        scores = {kind: f1_score(gold, predicted, average=kind, zero_division=0) for kind in ("micro", "macro")}
        # a row counts where all its classes are right
        exact = {"accuracy": float(accuracy_score(gold, predicted))}
        return exact | {f"f1_{kind}": float(score) for kind, score in scores.items()}

    return metrics


def _several_records(section: TaskSection, labels: Sequence[str], processor: Any):
    def records(prediction: EvalPrediction) -> Iterator[dict[str, Any]]:
        logits, hot = arrays(prediction)
        for gold, scores in zip(hot, expit(logits), strict=True):
            yield {
                "gold": [name for name, one in zip(labels, gold, strict=True) if one > 0.5],
                "predicted": [name for name, score in zip(labels, scores, strict=True) if score >= threshold(section)],
                "probabilities": dict(zip(labels, scores.tolist(), strict=True)),
            }

    return records


def _several_classes(labels: Sequence[str], records: Records) -> Table:
    sides = ([record[side] for record in records] for side in ("gold", "predicted"))
    hot = [np.array([[name in chosen for name in labels] for chosen in side]) for side in sides]
    return report(hot[0], hot[1], list(labels), by_name=False)


def _several_answer(section: TaskSection, answer: Any) -> dict[str, Any]:
    scores = scores_of(answer)
    chosen = [label for label, score in scores.items() if score >= threshold(section)]
    return {"predicted": chosen, "probabilities": scores}


# A number


def _number_metrics(section: TaskSection, labels: Sequence[str], processor: Any):
    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        predicted, gold = (array.reshape(-1) for array in arrays(prediction))
        moves = min(np.ptp(gold), np.ptp(predicted)) > 0
        return {
            "mse": float(mean_squared_error(gold, predicted)),
            "mae": float(mean_absolute_error(gold, predicted)),
            # where one of them is constant there is no correlation
            "pearsonr": float(pearsonr(gold, predicted).statistic) if moves else 0.0,
            "spearmanr": float(spearmanr(gold, predicted).statistic) if moves else 0.0,
        }

    return metrics


def _number_records(section: TaskSection, labels: Sequence[str], processor: Any):
    def records(prediction: EvalPrediction) -> Iterator[dict[str, Any]]:
        for predicted, gold in zip(*(array.reshape(-1) for array in arrays(prediction)), strict=True):
            yield {"gold": float(gold), "predicted": float(predicted)}

    return records


def _number_answer(section: TaskSection, answer: Any) -> dict[str, Any]:
    return {"predicted": next(iter(scores_of(answer).values()))}


# Answers


class Windows(TextClassificationPipeline):
    """Reads a long text in windows, as the model was trained (`task.stride`), and pools their logits."""

    pooling = "mean"

    def _forward(self, model_inputs):  # type: ignore[override] # as the class above has it
        model_inputs.pop("overflow_to_sample_mapping")
        logits = self.model(**model_inputs).logits
        return {"logits": logits.amax(0, keepdim=True) if self.pooling == "max" else logits.mean(0, keepdim=True)}


class MaxWindows(Windows):
    pooling = "max"


def _pipeline(section: TaskSection):
    options: dict[str, Any] = {"truncation": True, "max_length": section.max_length, "top_k": None}
    if section.stride is None:
        return None, options
    # the windows of one text are its batch
    windows = {"stride": section.stride, "return_overflowing_tokens": True, "padding": True, "batch_size": 1}
    return MaxWindows if section.pooling == "max" else Windows, options | windows


def _only_logits(outputs: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """Official models with a decoder hand out their encoder's states too."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


SINGLE_LABEL = Task(
    name="text-classification",
    auto_class="AutoModelForSequenceClassification",
    roles=TASK_TYPES["text-classification"].roles,
    labels=LABEL_KINDS["class"],
    encode=_encode,
    counts=token_counts,
    check=check_length,
    collate=_collate,
    metrics=one_metrics,
    metric_names=ONE_METRICS,
    reduce=_only_logits,
    records=one_records,
    classes=one_classes,
    pool=pooled,
    loss=weighted_loss,
    problem_type="single_label_classification",
    asked=("text", "text_pair"),
    pipeline=_pipeline,
    answer=one_answer,
)
MULTI_LABEL = replace(
    SINGLE_LABEL,
    labels=LABEL_KINDS["classes"],
    metrics=_several_metrics,
    metric_names=("accuracy", "f1_micro", "f1_macro"),
    records=_several_records,
    classes=_several_classes,
    loss=None,
    problem_type="multi_label_classification",
    answer=_several_answer,
)
REGRESSION = replace(
    SINGLE_LABEL,
    labels=LABEL_KINDS["number"],
    metrics=_number_metrics,
    metric_names=("mse", "mae", "pearsonr", "spearmanr"),
    records=_number_records,
    classes=None,
    loss=None,
    problem_type="regression",
    answer=_number_answer,
)
