"""`zoo evaluate`: a finished model directory on a split of its data, or of the same data elsewhere."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.data import load_splits
from zoo.errors import UserError
from zoo.loading import load_model, load_tokenizer
from zoo.recipe import Recipe
from zoo.recipe_loading import load_recipe
from zoo.tasks import TASKS
from zoo.train import METRICS, RECIPE, build_trainer, encoded, training_arguments

# what an evaluation reads of a recipe besides `data`; the rest would be ignored
_READ = ("task.max_length", "model.implementation", "model.ragged", "model.attn_implementation", "train")


def run(directory: Path, split: str = "test", overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Metrics of the model in `directory` on one split, by the recipe it was made with.

    overrides: `section.key=value` on that recipe, such as data.path=... for other data with the same labels.
    """
    recipe = _recipe(directory, overrides)
    task = TASKS[recipe.task.type]
    section = recipe.model.model_copy(update={"path": str(directory.resolve()), "revision": None, "config": {}})
    model, tokenizer = load_model(section, task.auto_class), load_tokenizer(section)
    labels = [name for _, name in sorted(dict(model.config.id2label or {}).items())]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = training_arguments(_only_evaluating(recipe), Path(scratch))
        splits = load_splits(recipe.data, task.roles, arguments.seed, labels)
        rows = getattr(splits, split)
        if rows is None:
            raise UserError(f"--split {split}: the data of {directory} has no such split")
        trainer = build_trainer(task, model, tokenizer, arguments)
        return trainer.evaluate(encoded(rows, recipe, task, tokenizer), metric_key_prefix=split)


def _only_evaluating(recipe: Recipe) -> Recipe:
    """The same precision, batches and seed, without what Trainer wants training data for."""
    off = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "report_to": "none"}
    return recipe.model_copy(update={"train": recipe.train | off})


def _recipe(directory: Path, overrides: Sequence[str]) -> Recipe:
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give one that zoo train has made")
    if not (directory / RECIPE).exists() or not (directory / METRICS).exists():
        raise UserError(f"{directory}: not a finished run (no {RECIPE} or no {METRICS}); finish it with --resume")
    for override in overrides:
        key = override.partition("=")[0]
        if not f"{key}.".startswith(("data.", *(f"{read}." for read in _READ))):
            raise UserError(f"{override}: an evaluation does not read it; it reads data and {', '.join(_READ)}")
    return load_recipe(str(directory / RECIPE), overrides)
