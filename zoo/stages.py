"""What stages share that make one finished run of another: its model measured anew, and written like the first."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from zoo import train
from zoo.card import card
from zoo.checkpoints import writing
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
    """A finished run like the one that it was made of, with another model, whole or not there.

    section: what its card says besides. Raises RunError where it cannot be written.
    """
    task, environment = finished.task, (finished.directory / "environment.json").read_bytes()
    usage = task.usage(recipe.task, model) if callable(task.usage) else task.usage
    text = card(recipe, task, metrics, None, json.loads(environment), [], usage, has_variant(model))
    extras: dict[str, str | bytes] = {"README.md": f"{text}\n{section}", "environment.json": environment}
    with writing(output_dir, "try again"):
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}-", dir=output_dir.parent) as scratch:
            made = Path(scratch) / output_dir.name
            made.mkdir()
            write_text(made / RECIPE, recipe.to_yaml())
            save(recipe, model, finished.processor, metrics, made, extras, "try again")
            os.replace(made, output_dir)
