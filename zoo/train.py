"""The stage `train`: a recipe in, a model directory out.

The directory holds the model and tokenizer, `recipe.yaml` as resolved, `metrics.json`, `events.jsonl`, a card, and the
run's `checkpoints/`, from which it resumes.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from zoo.data import load_splits
from zoo.errors import UserError, did_you_mean
from zoo.files import write_json, write_text
from zoo.loading import assert_same_weights, load_model, load_tokenizer
from zoo.memory import peak_memory_bytes
from zoo.recipe import Recipe
from zoo.tasks import TASKS, Task
from zoo.trainer import EventLog, ZooTrainer, newest_complete, writing

METRICS = "metrics.json"
RECIPE = "recipe.yaml"


def run(recipe: Recipe, output_dir: Path, resume: bool = False) -> dict[str, Any]:
    """Trains, chooses the best checkpoint on the validation split, reads the test split once; returns the metrics.

    resume: continue an unfinished run in `output_dir`, or report a finished one. Raises UserError for a directory in
    use, wrong data or a wrong checkpoint; RunError for a run that cannot go on.
    """
    _check_directory(recipe, output_dir, resume)
    if (output_dir / METRICS).exists():
        print(f"{output_dir} is finished; nothing is trained again")
        return json.loads((output_dir / METRICS).read_text())
    task = TASKS[recipe.task.type]
    arguments = training_arguments(recipe, output_dir)
    _check_choice(arguments, task)
    set_seed(arguments.seed)
    tokenizer = load_tokenizer(recipe.model)
    splits = load_splits(recipe.data, task.roles, arguments.seed)
    for note in splits.notes:
        print(note)
    model = load_model(recipe.model, task.auto_class, splits.labels)
    check_length(recipe, model)
    train_rows, eval_rows = (encoded(rows, recipe, task, tokenizer) for rows in (splits.train, splits.validation))
    trainer = build_trainer(task, model, tokenizer, arguments, train_rows, eval_rows)
    checkpoint = _claim(recipe, output_dir, arguments)
    events = EventLog(output_dir / "events.jsonl")
    trainer.add_callback(events)
    trained = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    metrics = dict(trained.metrics)
    metrics |= trainer.evaluate()
    if splits.test is not None:
        test_rows = encoded(splits.test, recipe, task, tokenizer)
        metrics |= trainer.evaluate(test_rows, metric_key_prefix="test")
    metrics["peak_memory_bytes"] = peak_memory_bytes()
    # a step is a batch of any size, so their rate says nothing beside that of the samples
    metrics = {name: value for name, value in metrics.items() if not name.endswith(("_steps_per_second", "total_flos"))}
    _save(recipe, trainer.model, tokenizer, metrics, output_dir)
    events.write("finished", trainer.state.global_step, metrics)
    return metrics


def _check_directory(recipe: Recipe, output_dir: Path, resume: bool) -> None:
    """Refuses a directory that holds something else, or that cannot be made."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output-dir {output_dir}: a file of that name exists")
    old = output_dir / RECIPE
    # folders without a file in them are what a refused recipe has left
    if any(not path.is_dir() for path in output_dir.rglob("*")):
        if not old.exists():
            raise UserError(f"--output-dir {output_dir}: not empty, and not a run of zoo; choose another directory")
        if not resume:
            state = "finished" if (output_dir / METRICS).exists() else "unfinished"
            raise UserError(
                f"--output-dir {output_dir}: holds a {state} run; add --resume to continue it, delete it, or choose "
                "another --output-dir"
            )
        if old.read_text(encoding="utf-8") != recipe.to_yaml():
            raise UserError(f"--output-dir {output_dir}: its run had another recipe ({old}); choose another directory")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: cannot be written: {error.strerror}") from error


def _claim(recipe: Recipe, output_dir: Path, arguments: TrainingArguments) -> Path | None:
    """Makes the directory this run's, now that nothing speaks against it; returns the checkpoint to continue from."""
    try:
        write_text(output_dir / RECIPE, recipe.to_yaml())
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: cannot be written: {error.strerror}") from error
    checkpoint = newest_complete(output_dir / "checkpoints")
    if checkpoint is not None and arguments.save_only_model:
        raise UserError(
            f"train.save_only_model: {checkpoint} holds no optimizer, so the run cannot continue; delete {output_dir}"
        )
    return checkpoint


def training_arguments(recipe: Recipe, output_dir: Path) -> TrainingArguments:
    """The recipe's `train` section, verbatim, with what the project decides."""
    # the bar stays although the libraries' messages are quiet, which the library takes for a wish to have none
    defaults: dict[str, Any] = {
        "report_to": "none",
        "disable_tqdm": False,
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    try:
        return TrainingArguments(
            output_dir=str(output_dir / "checkpoints"), remove_unused_columns=False, **(defaults | recipe.train)
        )
    except _REFUSALS as error:
        raise _refused(error) from error


# what transformers raises for values that its source alone does not rule out
_REFUSALS = (ValueError, TypeError, ImportError, RuntimeError, KeyError)


def _refused(error: Exception) -> UserError:
    return UserError(f"train: refused by transformers: {next(iter(str(error).splitlines()), type(error).__name__)}")


def _check_choice(arguments: TrainingArguments, task: Task) -> None:
    """Raises UserError where the best checkpoint is chosen by a metric that the task does not measure."""
    metric = str(arguments.metric_for_best_model or "loss").removeprefix("eval_")
    known = ("loss", *task.metric_names)
    if metric not in known:
        near = did_you_mean(metric, known) or f"; it is one of {', '.join(known)}"
        raise UserError(f"train.metric_for_best_model: {task.name} does not measure {metric!r}{near}")


def encoded(rows, recipe: Recipe, task: Task, tokenizer):
    """The rows as the model reads them, and their numbers in the data."""
    drop = [column for column in rows.column_names if column != "row"]
    return rows.map(task.encode(tokenizer, recipe.task), batched=True, remove_columns=drop, desc="Tokenising")


def build_trainer(
    task: Task,
    model,
    tokenizer,
    arguments: TrainingArguments,
    train_rows=None,
    eval_rows=None,
    trainer_class=ZooTrainer,
) -> ZooTrainer:
    """A Trainer on encoded rows. Raises UserError for a `train` section it cannot work with."""
    try:
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            data_collator=task.collate(tokenizer),
            compute_metrics=task.metrics,
            processing_class=tokenizer,
        )
        if train_rows is not None:
            # made now, while it is plain whose words were wrong; the scheduler is made again when the steps are known
            trainer.create_optimizer()
            trainer.create_scheduler(1)
            trainer.get_train_dataloader()
        return trainer
    except _REFUSALS as error:
        raise _refused(error) from error


def check_length(recipe: Recipe, model) -> None:
    """Raises UserError where texts may be longer than the model has positions for."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and recipe.task.max_length > positions:
        raise UserError(f"task.max_length: {recipe.task.max_length}, but the model has {positions} positions")


def _save(recipe: Recipe, model, tokenizer, metrics: dict[str, Any], output_dir: Path) -> None:
    """Moves the finished files into place one by one; metrics.json, which says that the run is finished, is last."""
    new = output_dir / ".model"
    shutil.rmtree(new, ignore_errors=True)
    # standard attention is saved as the official class, so that any tool opens it
    official = recipe.model.implementation == "native" and not _has_variant(model)
    with writing(output_dir):
        model.save_pretrained(new, **({"official": True} if official else {}))
        tokenizer.save_pretrained(new)
        write_text(new / "README.md", _card(recipe, metrics))
        assert_same_weights(model, new, whole=True)
        for file in sorted(new.iterdir()):
            os.replace(file, output_dir / file.name)
        new.rmdir()
        write_json(output_dir / METRICS, metrics)


def _has_variant(model) -> bool:
    from zoo.models.pretrained import is_standard

    return not is_standard(model.config)


def _card(recipe: Recipe, metrics: dict[str, Any]) -> str:
    results = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
    return (
        f"# {recipe.name}\n\n`{recipe.task.type}`, from `{recipe.model.path}` on `{recipe.data.path}`, "
        f"by the recipe in `recipe.yaml`.\n\n| metric | value |\n|---|---|\n{results}\n\n"
        f'```python\nfrom transformers import pipeline\n\npipeline("{recipe.task.type}", ".")("a text")\n```\n'
    )
