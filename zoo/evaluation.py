"""`zoo evaluate`: a finished model directory on a split of its data, or of the same data elsewhere."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.data import load_splits
from zoo.errors import UserError
from zoo.model_directory import open_finished
from zoo.recipe import Recipe
from zoo.train import build_trainer, encoded, training_arguments

# what an evaluation reads of a recipe besides `data`; the rest would be ignored
_READ = (
    *("task.max_length", "task.threshold", "task.metrics"),
    *("model.implementation", "model.ragged", "model.attn_implementation", "train"),
)


def run(directory: Path, split: str = "test", overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Metrics of the model in `directory` on one split, by the recipe it was made with.

    overrides: `section.key=value` on that recipe, such as data.path=... for other data with the same labels.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if not f"{key}.".startswith(("data.", *(f"{read}." for read in _READ))):
            raise UserError(f"{override}: an evaluation does not read it; it reads data and {', '.join(_READ)}")
    finished = open_finished(directory, overrides)
    recipe, task = finished.recipe, finished.task
    with tempfile.TemporaryDirectory() as scratch:
        arguments = training_arguments(_only_evaluating(recipe), Path(scratch))
        splits = load_splits(recipe.data, task.roles, arguments.seed, finished.labels, task.labels)
        rows = getattr(splits, split)
        if rows is None:
            raise UserError(f"--split {split}: the data of {directory} has no such split")
        encoded_rows, note = encoded(rows, recipe, task, finished.tokenizer, arguments.seed)
        print(f"{split}: {note}")
        trainer = build_trainer(recipe, task, finished.model, finished.tokenizer, arguments, finished.labels)
        return trainer.evaluate(encoded_rows, metric_key_prefix=split)


def _only_evaluating(recipe: Recipe) -> Recipe:
    """The same precision, batches and seed, without what Trainer wants training data for."""
    off = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "report_to": "none"}
    return recipe.model_copy(update={"train": recipe.train | off})
