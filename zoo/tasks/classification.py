"""One class of several, whatever it is that is classified: metrics, records, a table of classes, a weighted loss."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import softmax
from sklearn.metrics import accuracy_score, classification_report, f1_score
from transformers import EvalPrediction

from zoo.errors import RunError
from zoo.sections import TaskSection
from zoo.tasks.base import Records, Table, arrays

ONE_METRICS = ("accuracy", "f1_macro", "calibration_error")


def weighted_loss(
    section: TaskSection, labels: Sequence[int], classes: int, smoothing: float = 0.0
) -> Callable[..., torch.Tensor] | None:
    """The loss of `task.class_weights: balanced`: a class weighs rows / (classes * its rows), in training alone.

    The weights' mean over the rows is 1, so that the learning rate means what it meant.
    """
    if section.class_weights is None:
        return None
    counts = np.bincount(labels, minlength=classes)
    weights = torch.tensor(len(labels) / (classes * np.maximum(counts, 1)), dtype=torch.float32)

    def loss(outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        logits = outputs["logits"]
        weight = weights.to(logits) if logits.requires_grad else None
        total = F.cross_entropy(logits, labels, weight=weight, reduction="sum", label_smoothing=smoothing)
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return loss


def calibration_error(probabilities: np.ndarray, gold: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (arXiv 1706.04599, section 3): how far confidence is from accuracy, in equal bins."""
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == gold
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(confidence[bin_of == n].sum() - right[bin_of == n].sum()) for n in range(bins)]
    return float(sum(gaps) / len(gold))


def one_metrics(section: TaskSection, labels: Sequence[str], processor: Any):
    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits, gold = arrays(prediction)
        predicted = logits.argmax(-1)
        return {
            "accuracy": float(accuracy_score(gold, predicted)),
            "f1_macro": float(f1_score(gold, predicted, average="macro", zero_division=0)),
            "calibration_error": calibration_error(softmax(logits, axis=-1), gold),
        }

    return metrics


def one_records(section: TaskSection, labels: Sequence[str], processor: Any):
    def records(prediction: EvalPrediction) -> Iterator[dict[str, Any]]:
        logits, labels_of = arrays(prediction)
        for gold, scores in zip(labels_of, softmax(logits, axis=-1), strict=True):
            yield {
                "gold": labels[int(gold)],
                "predicted": labels[int(scores.argmax())],
                "probabilities": dict(zip(labels, scores.tolist(), strict=True)),
            }

    return records


def one_classes(labels: Sequence[str], records: Records) -> Table:
    gold, predicted = ([record[side] for record in records] for side in ("gold", "predicted"))
    return report(gold, predicted, list(labels))


def report(gold: Any, predicted: Any, labels: list[str], by_name: bool = True) -> Table:
    """sklearn's, which puts its averages beside the classes: under numbers, a class may be called as one of them."""
    numbers = [str(number) for number in range(len(labels))]
    named = {"labels": labels} if by_name else {}
    found = classification_report(gold, predicted, target_names=numbers, output_dict=True, zero_division=0, **named)
    return {
        label: {key.replace("f1-score", "f1"): float(value) for key, value in found[number].items()}
        for label, number in zip(labels, numbers, strict=True)
    }


def scores_of(answer: Any) -> dict[str, float]:
    """A pipeline's answer, as label -> score. Raises RunError where one is not finite."""
    scores = {entry["label"]: entry["score"] for entry in answer}
    if not all(math.isfinite(score) for score in scores.values()):
        raise RunError("predict: the model's answer is not finite: its weights or its config are damaged")
    return scores


def one_answer(section: TaskSection, answer: Any) -> dict[str, Any]:
    scores = scores_of(answer)
    return {"predicted": max(scores, key=lambda label: scores[label]), "probabilities": scores}
