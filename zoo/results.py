"""What a run's predictions say beyond its metrics: each row, each class, and pictures."""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix

from zoo.tasks import Task
from zoo.tasks.base import Records, Table

MAX_DRAWN_CLASSES = 50  # of a confusion matrix: more cannot be read


def predictions_file(ids: Iterable[Any], records: Records) -> str:
    """JSON lines: id, gold, predicted and, where there are some, probabilities."""
    lines = ({"id": number, **record} for number, record in zip(ids, records, strict=True))
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def per_class(task: Task, labels: Sequence[str], records: Records) -> Table | None:
    """Precision, recall, F1 and support of each class, or kind of span; None for a task without."""
    if task.classes is None:
        return None
    found = task.classes(labels, records)
    return {name: {key: round(value, 6) for key, value in values.items()} for name, values in found.items()}


def confusion(labels: Sequence[str], records: Records) -> np.ndarray:
    """(gold, predicted) -> rows."""
    gold, predicted = ([record[side] for record in records] for side in ("gold", "predicted"))
    return confusion_matrix(gold, predicted, labels=list(labels))


# Pictures


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    # without the time and the library's version: the same run gives the same file
    figure.savefig(stream, format="png", dpi=120, metadata={"Software": None})
    return stream.getvalue()


def curves(log_history: Iterable[Mapping[str, float]], metric: str) -> bytes:
    """Training and validation loss by step, and the metric that chose the checkpoint below them."""
    history = list(log_history)
    names = {"loss": "training loss", "eval_loss": "validation loss"} | (
        {metric: metric} if metric != "eval_loss" else {}
    )
    figure = Figure(figsize=(7, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for name, label in names.items():
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axes = lower if name == metric and name != "eval_loss" else upper
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if name.startswith("eval") else None)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    lower.set_xlabel("step")
    return _png(figure)


def confusion_picture(labels: Sequence[str], matrix: np.ndarray) -> bytes:
    """Shares of each gold class, with the counts written in where there is room."""
    size = 3 + 0.35 * len(labels)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, label="share of the gold class")
    # between dollars matplotlib reads formulas
    shown = [label.replace("$", r"\$") for label in labels]
    axes.set_xticks(range(len(labels)), shown, rotation=60, ha="right")
    axes.set_yticks(range(len(labels)), shown)
    axes.set_xlabel("predicted")
    axes.set_ylabel("gold")
    if len(labels) <= 20:
        for (gold, predicted), count in np.ndenumerate(matrix):
            if count:
                colour = "white" if shares[gold, predicted] > 0.5 else "black"
                axes.text(predicted, gold, f"{count}", ha="center", va="center", color=colour, fontsize=8)
    return _png(figure)
