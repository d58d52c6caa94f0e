"""A recipe's own metrics (`task.metrics`): modules of the evaluate library, ours, a file's, or the hub's."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from transformers import EvalPrediction

from zoo.errors import UserError, did_you_mean
from zoo.labels import LABEL_KINDS
from zoo.sections import TaskSection
from zoo.tasks.base import IGNORED, Task

OURS = {file.stem: file for file in sorted((Path(__file__).parents[1] / "metrics").glob("*.py"))}


def own_metrics(
    task: Task, section: TaskSection, labels: Sequence[str], processor: Any
) -> Callable[[EvalPrediction], dict[str, float]]:
    """The task's metrics and then the recipe's, as one function of gathered predictions. Raises UserError."""
    modules = {name: _load(name) for name in section.metrics}
    of_task = task.metrics(section, labels, processor)

    def measure(prediction: EvalPrediction) -> dict[str, float]:
        found = of_task(prediction)
        if modules:
            given = _columns(task, section, labels, processor, prediction)
            for name, module in modules.items():
                found |= _computed(name, module, given, section.metrics[name])
        return found

    return measure


def all_right(task: Task, labels: Sequence[str], gold: Sequence[Any]) -> EvalPrediction:
    """A prediction that is right in each of the rows with these encoded labels, shaped as a model's.

    To rehearse the metrics with: what refuses its options refuses them here, where no training is lost.
    """
    if task.labels is LABEL_KINDS["number"]:
        return EvalPrediction(np.array(gold)[:, None], np.array(gold))
    if task.writes:
        longest = max(map(len, gold))
        written = np.array([[*row, *[IGNORED] * (longest - len(row))] for row in gold])
        return EvalPrediction(written, written)
    sure = 50.0  # logits of which softmax and sigmoid make 0 and 1
    if task.labels is LABEL_KINDS["classes"]:
        return EvalPrediction(sure * (2 * np.array(gold) - 1), np.array(gold))
    if task.labels is LABEL_KINDS["tags"]:
        longest = max(map(len, gold))
        gold = [[*row, *[IGNORED] * (longest - len(row))] for row in gold]
    numbers = np.array(gold)
    return EvalPrediction(sure * np.eye(len(labels), dtype=np.float32)[np.maximum(numbers, 0)], numbers)


def _load(name: str) -> evaluate.EvaluationModule:
    try:
        return evaluate.load(str(OURS.get(name, name)), keep_in_memory=True)
    except (OSError, ValueError, TypeError, ImportError, SyntaxError, AttributeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        near = did_you_mean(name, OURS)
        raise UserError(
            f"task.metrics.{name}: cannot be loaded{near}; ours are {', '.join(OURS)}; others are a module's file, "
            f"or a name on the hub ({reason[:200]})"
        ) from error


def _columns(
    task: Task, section: TaskSection, labels: Sequence[str], processor: Any, prediction: EvalPrediction
) -> dict[str, list]:
    assert task.records is not None  # the recipe's schema refuses metrics for tasks without
    records = list(task.records(section, labels, processor)(prediction))
    numbers = {name: number for number, name in enumerate(labels)}

    def column(side: str) -> list:
        values = [record[side] for record in records]
        if task.labels is LABEL_KINDS["class"]:
            return [numbers[value] for value in values]
        if task.labels is LABEL_KINDS["classes"]:
            return [[int(name in value) for name in labels] for value in values]
        return values

    columns = {"predictions": column("predicted"), "references": column("gold")}
    if "probabilities" in (records[0] if records else {}):
        columns["prediction_scores"] = [list(record["probabilities"].values()) for record in records]
    return columns


def _computed(
    name: str, module: evaluate.EvaluationModule, given: Mapping[str, list], options: Mapping[str, Any]
) -> dict[str, float]:
    """Numbers only: what else a module returns has no place in a flat table."""
    features = module.features[0] if isinstance(module.features, list) else module.features
    columns = {column: values for column, values in given.items() if column in features}
    try:
        result = module.compute(**columns, **options) or {}
        return {key: float(value) for key, value in result.items() if isinstance(value, Real)}
    except Exception as error:
        # the module is anybody's code
        said = f"{type(error).__name__}: {str(error)[:300]}"
        raise UserError(f"task.metrics.{name}: refused what it was given: {said}; look at its options") from error
