"""`zoo evaluate`: a finished model directory on a split of its data, or of the same data elsewhere."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.building import build_trainer, training_arguments
from zoo.data import load_splits
from zoo.encoding import encoded
from zoo.errors import UserError
from zoo.fitting import set_generation
from zoo.model_directory import open_finished
from zoo.recipe import Recipe
from zoo.task_types import TASK_TYPES
from zoo.tasks.metrics import OURS

# what an evaluation reads of a recipe besides `data`; the rest would be ignored
_READ = (
    *("task.max_length", "task.threshold", "task.metrics", "task.image_size"),
    *("task.max_answer_length", "task.n_best_size", "task.version_2_with_negative"),
    *("task.mask_ratio", "task.mask_patch_size"),
    *("model.implementation", "model.ragged", "model.attn_implementation", "train", "generate"),
)


def run(
    directory: Path,
    split: str = "test",
    overrides: Sequence[str] = (),
    data: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Metrics of the model in `directory` on one split, by the recipe it was made with.

    data: another file, directory or hub id with the same columns and labels; a file is the split. overrides:
    `section.key=value` on the recipe, which say more than that. trust_remote_code: code that the directory brings, or
    names as a metric, may be run.
    """
    overrides = [*(_other_data(data, split) if data is not None else ()), *overrides]
    for override in overrides:
        key = override.partition("=")[0]
        if not f"{key}.".startswith(("data.", *(f"{read}." for read in _READ))):
            raise UserError(f"{override}: an evaluation does not read it; it reads data and {', '.join(_READ)}")
    finished = open_finished(directory, overrides, trust_remote_code)
    recipe, task = finished.recipe, finished.task
    foreign = sorted(recipe.task.metrics.keys() - OURS.keys())
    if foreign and not trust_remote_code:
        raise UserError(
            f"{directory}: its recipe names metrics that are code of their own, {', '.join(foreign)}; look at it, then "
            "add --trust-remote-code, or leave them out with task.metrics={}"
        )
    task.check(recipe.task, finished.model)
    if TASK_TYPES[task.name].generates:
        set_generation(finished.model, {}, recipe.generate)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = training_arguments(_only_evaluating(recipe), Path(scratch))
        splits = load_splits(recipe.data, task.roles, arguments.seed, finished.labels, task.labels)
        for note in splits.notes:
            print(note)
        rows = splits.rows if split == "train" and splits.train is not None else getattr(splits, split)
        if rows is None:
            raise UserError(f"--split {split}: the data of {directory} has no such split")
        encoded_rows, note = encoded(rows, recipe, task, finished.processor, arguments.seed)
        print(f"{split}: {note}")
        trainer = build_trainer(recipe, task, finished.model, finished.processor, arguments, finished.labels)
        metrics = trainer.evaluate(encoded_rows, metric_key_prefix=split)
        # a step is a batch of any size, and to put a model into place is no part of it
        return {name: x for name, x in metrics.items() if not name.endswith(("_steps_per_second", "_preparation_time"))}


def _other_data(data: str, split: str) -> list[str]:
    """What replaces the recipe's own data. A file is read as the datasets library reads one: as its split train."""
    splits = {split: "train"} if Path(data).is_file() else {}
    return [
        f"data.path={json.dumps(data)}",
        *("data.files={}", "data.options={}", "data.format=null", "data.name=null", "data.revision=null"),
        *("data.limit=null", "data.test=null", "data.streaming=false", "data.buffer_size=null", "data.mixture=[]"),
        "data.stopping_strategy=null",
        f"data.splits={json.dumps(splits)}",
    ]


def _only_evaluating(recipe: Recipe) -> Recipe:
    """The same precision, batches and seed, without what Trainer wants training data for."""
    off = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "report_to": "none"}
    return recipe.model_copy(update={"train": recipe.train | off})
