"""A text, or a pair of texts: one class, any number of classes, or a number."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit, softmax
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, mean_squared_error
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedTokenizerBase

from zoo.labels import LABEL_KINDS
from zoo.recipe import DEFAULT_THRESHOLD, TASK_ROLES, TaskSection
from zoo.tasks.base import Collate, Rows, Task, arrays, cut, padding


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
    padding(tokenizer)
    pad = DataCollatorWithPadding(tokenizer)
    return lambda rows: dict(pad(rows))


def weighted_loss(labels: Sequence[int], classes: int, smoothing: float = 0.0):
    """The loss of `task.class_weights: balanced`: a class weighs rows / (classes * its rows), in training alone.

    The weights' mean over the rows is 1, so that the learning rate means what it meant.
    """
    counts = np.bincount(labels, minlength=classes)
    weights = torch.tensor(len(labels) / (classes * np.maximum(counts, 1)), dtype=torch.float32)

    def loss(outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        logits = outputs["logits"]
        weight = weights.to(logits) if logits.requires_grad else None
        total = F.cross_entropy(logits, labels, weight=weight, reduction="sum", label_smoothing=smoothing)
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return loss


def pooled(prediction: EvalPrediction, rows: Sequence[int], section: TaskSection) -> EvalPrediction:
    """One prediction a text from those of its windows, which stand together; `rows` names the text of each."""
    if section.stride is None:
        return prediction
    logits, labels = arrays(prediction)
    starts = np.flatnonzero(np.diff(rows, prepend=np.nan) != 0)
    if section.pooling == "max":
        logits = np.maximum.reduceat(logits, starts)
    else:
        logits = np.add.reduceat(logits, starts) / np.diff(starts, append=len(rows))[:, None]
    return EvalPrediction(logits, labels[starts])


# One class


def calibration_error(probabilities: np.ndarray, gold: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (arXiv 1706.04599, section 3): how far confidence is from accuracy, in equal bins."""
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == gold
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(confidence[bin_of == n].sum() - right[bin_of == n].sum()) for n in range(bins)]
    return float(sum(gaps) / len(gold))


def _one_metrics(section: TaskSection, labels: Sequence[str]):
    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits, gold = arrays(prediction)
        predicted = logits.argmax(-1)
        return {
            "accuracy": float(accuracy_score(gold, predicted)),
            "f1_macro": float(f1_score(gold, predicted, average="macro", zero_division=0)),
            "calibration_error": calibration_error(softmax(logits, axis=-1), gold),
        }

    return metrics


def _one_records(section: TaskSection, labels: Sequence[str]):
    def records(prediction: EvalPrediction) -> Iterator[dict[str, Any]]:
        logits, labels_of = arrays(prediction)
        for gold, scores in zip(labels_of, softmax(logits, axis=-1), strict=True):
            yield {
                "gold": labels[int(gold)],
                "predicted": labels[int(scores.argmax())],
                "probabilities": dict(zip(labels, scores.tolist(), strict=True)),
            }

    return records


# Any number of classes


def threshold(section: TaskSection) -> float:
    return DEFAULT_THRESHOLD if section.threshold is None else section.threshold


def _several_metrics(section: TaskSection, labels: Sequence[str]):
    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits, hot = arrays(prediction)
        gold, predicted = hot > 0.5, expit(logits) >= threshold(section)
        scores = {kind: f1_score(gold, predicted, average=kind, zero_division=0) for kind in ("micro", "macro")}
        # a row counts where all its classes are right
        exact = {"accuracy": float(accuracy_score(gold, predicted))}
        return exact | {f"f1_{kind}": float(score) for kind, score in scores.items()}

    return metrics


def _several_records(section: TaskSection, labels: Sequence[str]):
    def records(prediction: EvalPrediction) -> Iterator[dict[str, Any]]:
        logits, hot = arrays(prediction)
        for gold, scores in zip(hot, expit(logits), strict=True):
            yield {
                "gold": [name for name, one in zip(labels, gold, strict=True) if one > 0.5],
                "predicted": [name for name, score in zip(labels, scores, strict=True) if score >= threshold(section)],
                "probabilities": dict(zip(labels, scores.tolist(), strict=True)),
            }

    return records


# A number


def _number_metrics(section: TaskSection, labels: Sequence[str]):
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


def _number_records(section: TaskSection, labels: Sequence[str]):
    def records(prediction: EvalPrediction) -> Iterator[dict[str, Any]]:
        for predicted, gold in zip(*(array.reshape(-1) for array in arrays(prediction)), strict=True):
            yield {"gold": float(gold), "predicted": float(predicted)}

    return records


def _task(problem_type: str, labels: str, metrics: Callable, metric_names: tuple[str, ...], records: Callable) -> Task:
    return Task(
        name="text-classification",
        auto_class="AutoModelForSequenceClassification",
        roles=TASK_ROLES["text-classification"],
        labels=LABEL_KINDS[labels],
        encode=_encode,
        collate=_collate,
        metrics=metrics,
        metric_names=metric_names,
        records=records,
        problem_type=problem_type,
    )


SINGLE_LABEL = _task(
    "single_label_classification", "class", _one_metrics, ("accuracy", "f1_macro", "calibration_error"), _one_records
)
MULTI_LABEL = _task(
    "multi_label_classification", "classes", _several_metrics, ("accuracy", "f1_micro", "f1_macro"), _several_records
)
REGRESSION = _task("regression", "number", _number_metrics, ("mse", "mae", "pearsonr", "spearmanr"), _number_records)
