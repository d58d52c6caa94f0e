"""A recipe's own metrics (`task.metrics`): modules of the evaluate library, ours, a file's, or the hub's."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import evaluate
from transformers import EvalPrediction

from zoo.errors import UserError, did_you_mean
from zoo.labels import LABEL_KINDS
from zoo.recipe import TaskSection
from zoo.tasks.base import Task

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
        result = module.compute(**columns, **options)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"task.metrics.{name}: refused what it was given: {str(error)[:300]}") from error
    return {key: float(value) for key, value in (result or {}).items() if isinstance(value, Real)}
