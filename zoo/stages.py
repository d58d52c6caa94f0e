"""What stages share that make one finished run of another: its model measured anew, and written like the first."""

import json
import tempfile
from pathlib import Path
from typing import Any

from zoo import train
from zoo.card import card
from zoo.files import write_text
from zoo.model_directory import RECIPE, Finished, has_variant, save, tested_rows
from zoo.recipe import Recipe

_TIMED = ("_runtime", "per_second", "epoch", "_preparation_time")


def measured(finished: Finished, model: Any) -> dict[str, Any]:
    """Metrics of a model on the rows that the finished run was tested on."""
    recipe, task = finished.recipe, finished.task
    with tempfile.TemporaryDirectory() as scratch:
        batch = {"per_device_eval_batch_size": recipe.train.get("per_device_eval_batch_size", 8)}
        arguments = train.training_arguments(recipe.model_copy(update={"train": batch}), Path(scratch))
        trainer = train.build_trainer(recipe, task, model, finished.processor, arguments, finished.labels)
        prefix, rows = tested_rows(finished)
        metrics = trainer.evaluate(rows, metric_key_prefix=prefix)
    return {name: value for name, value in metrics.items() if not name.endswith(_TIMED)}


def write(
    finished: Finished, recipe: Recipe, model: Any, metrics: dict[str, Any], section: str, output_dir: Path
) -> None:
    """A finished run like the one that it was made of, with another model. section: what its card says besides."""
    task, environment = finished.task, (finished.directory / "environment.json").read_bytes()
    usage = task.usage(recipe.task, model) if callable(task.usage) else task.usage
    text = card(recipe, task, metrics, None, json.loads(environment), [], usage, has_variant(model))
    extras: dict[str, str | bytes] = {"README.md": f"{text}\n{section}", "environment.json": environment}
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / RECIPE, recipe.to_yaml())
    save(recipe, model, finished.processor, metrics, output_dir, extras)
