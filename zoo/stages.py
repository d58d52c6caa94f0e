"""What stages share that make a finished run of another: batches, outputs and metrics of its model, and its writing."""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from zoo.building import build_trainer, training_arguments
from zoo.card import card
from zoo.checkpoints import writing
from zoo.files import write_text
from zoo.model_directory import RECIPE, Finished, collate_of, has_variant, save, tested_rows
from zoo.recipe import Recipe

_TIMED = ("_runtime", "per_second", "epoch", "_preparation_time")


def batches(finished: Finished, rows: Any, size: int) -> Iterator[dict[str, Any]]:
    """Encoded rows as the model takes them, `size` at a time."""
    collate = collate_of(finished)
    for start in range(0, len(rows), size):
        batch = collate([rows[number] for number in range(start, min(start + size, len(rows)))])
        given = {name: x for name, x in batch.items() if name != "row"}
        # of several texts a row, which learn from each other
        yield {name: x.flatten(0, 1) for name, x in given.items()} if finished.task.learn is not None else given


@torch.no_grad()
def outputs(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """All numbers that a model tells of a batch, on the CPU: (numbers,). The batch goes where the model is."""
    told = model(**{name: x.to(model.device) for name, x in batch.items()})
    return torch.cat([x.float().flatten().cpu() for x in told.values() if isinstance(x, torch.Tensor)])


def measured(finished: Finished, model: Any) -> dict[str, Any]:
    """Metrics of a model on the rows that the finished run was tested on."""
    recipe, task = finished.recipe, finished.task
    with tempfile.TemporaryDirectory() as scratch:
        batch = {"per_device_eval_batch_size": recipe.train.get("per_device_eval_batch_size", 8)}
        arguments = training_arguments(recipe.model_copy(update={"train": batch}), Path(scratch))
        trainer = build_trainer(recipe, task, model, finished.processor, arguments, finished.labels)
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
