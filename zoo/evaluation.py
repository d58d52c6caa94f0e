"""`zoo evaluate`: a finished model directory on a split of its data, or of the same data elsewhere."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from zoo.data import load_splits
from zoo.errors import UserError
from zoo.loading import load_model, load_tokenizer
from zoo.recipe import Recipe, load_recipe
from zoo.tasks import TASKS
from zoo.train import RECIPE, build_trainer, encoded


def run(directory: Path, split: str = "test", overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Metrics of the model in `directory` on one split, by the recipe it was made with.

    overrides: `section.key=value` on that recipe, such as data.path=... for other data with the same labels.
    """
    recipe = _recipe(directory, overrides)
    task = TASKS[recipe.task.type]
    section = recipe.model.model_copy(update={"path": str(directory.resolve()), "revision": None, "config": {}})
    model, tokenizer = load_model(section, task.auto_class), load_tokenizer(section)
    labels = [model.config.id2label[number] for number in range(model.config.num_labels)]
    splits = load_splits(recipe.data, task.roles, recipe.train.get("seed", TrainingArguments.seed), labels)
    rows = getattr(splits, split)
    if rows is None:
        raise UserError(f"--split {split}: the data of {directory} has no such split")
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            report_to="none",
            remove_unused_columns=False,
            per_device_eval_batch_size=recipe.train.get("per_device_eval_batch_size", 64),
        )
        trainer = build_trainer(task, model, tokenizer, arguments)
        return trainer.evaluate(encoded(rows, recipe, task, tokenizer), metric_key_prefix=split)


def _recipe(directory: Path, overrides: Sequence[str]) -> Recipe:
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give one that zoo train has made")
    if not (directory / RECIPE).exists() or not (directory / "config.json").exists():
        raise UserError(f"{directory}: not a finished run (no {RECIPE} or no config.json); finish it with --resume")
    return load_recipe(str(directory / RECIPE), overrides)
