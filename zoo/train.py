"""The stage `train`: a recipe in, a model directory out.

The directory holds the model and tokenizer, `recipe.yaml` as resolved, `metrics.json`, `events.jsonl`, a card, and the
run's `checkpoints/`, from which it resumes.
"""

import json
from pathlib import Path
from typing import Any

from transformers import (
    EvalPrediction,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

from zoo import adapters, hub, tokenizer
from zoo.building import build_trainer, check_choice, training_arguments
from zoo.card import card
from zoo.checkpoints import PROGRESS, STATE, newest_complete
from zoo.data import Splits, load_splits
from zoo.distillation import load_teacher
from zoo.encoding import by_rows, encoded, stream
from zoo.environment import changed, data_of, environment
from zoo.errors import UserError
from zoo.event_log import EventLog
from zoo.files import as_json, write_json, write_text
from zoo.fitting import fit_images, set_generation
from zoo.loading import load_model
from zoo.memory import peak_accelerator_memory_bytes, peak_memory_bytes, reset_peak_memory
from zoo.model_directory import METRICS, RECIPE, has_variant, read_metrics, save
from zoo.packed_rows import check_kept_apart
from zoo.quantized import check_learns
from zoo.recipe import Recipe
from zoo.results import MAX_DRAWN_CLASSES, confusion, confusion_picture, curves, per_class, predictions_file
from zoo.run_directory import CHECKPOINTS, EVENTS, alone, check_directory
from zoo.sections import TokenizerSection
from zoo.streaming import Unread
from zoo.task_types import DEFAULT_TARGET_LENGTH, TASK_TYPES
from zoo.tasks import Task, task_of
from zoo.trainer import ZooTrainer

TOKENIZER = "tokenizer"  # among them, where a run has learned its own
PUSHED = ".pushed.json"


def run(recipe: Recipe, output_dir: Path, resume: bool = False) -> dict[str, Any]:
    """Trains, chooses the best checkpoint on the validation split, reads the test split once; returns the metrics.

    resume: continue an unfinished run in `output_dir`, or report a finished one. Raises UserError for a directory in
    use, wrong data or a wrong checkpoint; RunError for a run that cannot go on.
    """
    check_directory(recipe, output_dir, resume)
    if (output_dir / METRICS).exists():
        print(f"{output_dir} is finished; nothing is trained again")
        metrics = read_metrics(output_dir)
        _push(recipe, output_dir)
        return metrics
    with alone(output_dir):
        # another run may have begun, or ended, since
        check_directory(recipe, output_dir, resume)
        return _run(recipe, output_dir)


def _run(recipe: Recipe, output_dir: Path) -> dict[str, Any]:
    if recipe.hub.repo is not None:
        hub.check(recipe.hub.repo)
    task = task_of(recipe.task)
    arguments = training_arguments(recipe, output_dir)
    if not recipe.task.metrics:
        check_choice(arguments, task, task.metric_names)
    set_seed(arguments.seed)
    reset_peak_memory()
    splits = load_splits(recipe.data, task.roles, arguments.seed, kind=task.labels)
    for note in splits.notes:
        print(note)
    kept = output_dir / CHECKPOINTS / TOKENIZER
    processor = tokenizer.processor_for(recipe.model, task.processor, splits, kept)
    settings = task.prepare(processor)
    model: Any = load_model(
        recipe.model, task.auto_class, splits.labels, task.problem_type, processor=processor, quantize=recipe.quantize
    )
    check_learns(model, recipe.model.path)
    fit_images(model, processor, recipe.task.image_size)
    generation = None
    if TASK_TYPES[task.name].generates:
        length = recipe.task.max_target_length or DEFAULT_TARGET_LENGTH
        # said outright: a pipeline would draw where nothing is said
        generation = set_generation(model, {"max_new_tokens": length, "do_sample": False, **settings}, recipe.generate)
    if recipe.task.packing:
        check_kept_apart(model)
    if recipe.lora:
        model = adapters.adapt(model, recipe.lora, task.name)
        print(adapters.learned(model))
    task.check(recipe.task, model)
    rows = {}
    for name, split in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
        if split is not None:
            if isinstance(split, Unread):
                rows[name] = stream(split, recipe, task, processor, arguments.seed)
                continue
            rows[name], note = encoded(split, recipe, task, processor, arguments.seed, training=name == "train")
            print(f"{name}: {note}")
    trainer = build_trainer(recipe, task, model, processor, arguments, splits.labels, rows["train"], rows["validation"])
    trainer.data = data_of(recipe.data)
    if recipe.distill.teacher is not None:
        trainer.distillation = load_teacher(recipe.distill, model, recipe.model, task, processor)
    checkpoint = _claim(recipe, output_dir, arguments)
    if isinstance(recipe.model.tokenizer, TokenizerSection) and not kept.is_dir():
        # not before, so that a run that is refused leaves nothing behind
        tokenizer.save(processor, kept)
    if checkpoint is not None:
        _check_data(checkpoint, trainer.data)
    events = EventLog(output_dir / EVENTS)
    trainer.add_callback(events)
    trained = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    metrics = dict(trained.metrics)
    metrics |= trainer.evaluate()
    records = None
    if "test" in rows:
        predicted = trainer.predict(rows["test"], metric_key_prefix="test")
        metrics |= predicted.metrics or {}
        if task.records is not None:
            prediction = EvalPrediction(predicted.predictions, predicted.label_ids)
            by_row = by_rows(task, recipe, prediction, trainer.evaluated_rows)
            records = list(task.records(recipe.task, splits.labels, processor)(by_row))
    metrics["peak_memory_bytes"] = peak_memory_bytes()
    on_accelerator = peak_accelerator_memory_bytes()
    if on_accelerator is not None:
        metrics["peak_accelerator_memory_bytes"] = on_accelerator
    # a step is a batch of any size, so their rate says nothing beside that of the samples
    metrics = {name: value for name, value in metrics.items() if not name.endswith(("_steps_per_second", "total_flos"))}
    if generation is not None:
        model.generation_config = generation
    save(recipe, model, processor, metrics, output_dir, _extras(recipe, task, model, trainer, splits, metrics, records))
    events.write("finished", trainer.state.global_step, metrics)
    _push(recipe, output_dir)
    return metrics


def _push(recipe: Recipe, output_dir: Path) -> None:
    """To the recipe's repository, once: a push that failed is made up for by --resume."""
    done = output_dir / PUSHED
    if recipe.hub.repo is None or done.exists():
        return
    pushed = hub.push(output_dir, recipe.hub.repo, recipe.hub.private, recipe.hub.branch)
    write_json(done, {name: pushed[name] for name in ("repo", "url", "commit")})
    print(f"pushed to {pushed['url']}")


def _extras(
    recipe: Recipe,
    task: Task,
    model: PreTrainedModel,
    trainer: ZooTrainer,
    splits: Splits,
    metrics: dict[str, Any],
    records: list[dict[str, Any]] | None,
) -> dict[str, str | bytes]:
    """The files beside the weights: predictions, tables, pictures, environment and card."""
    made = environment(recipe, trainer.args.world_size, getattr(model.config, "_commit_hash", None))
    chosen_by = f"eval_{str(trainer.args.metric_for_best_model or 'loss').removeprefix('eval_')}"
    extras: dict[str, str | bytes] = {"curves.png": curves(trainer.state.log_history, chosen_by)}
    classes = None
    if records is not None:
        assert splits.test is not None
        extras["predictions.jsonl"] = predictions_file(splits.test["row"], records)
        classes = per_class(task, splits.labels, records)
        if classes is not None:
            extras["per_class.json"] = as_json(classes)
        if task.problem_type == "single_label_classification" and len(splits.labels) <= MAX_DRAWN_CLASSES:
            extras["confusion_matrix.png"] = confusion_picture(splits.labels, confusion(splits.labels, records))
    if task.files is not None:
        extras |= task.files(recipe.task, model)
    pictures = [name for name in extras if name.endswith(".png")]
    variant = has_variant(model)
    extras["environment.json"] = as_json(made)
    usage = task.usage(recipe.task, model) if callable(task.usage) else task.usage
    extras["README.md"] = card(recipe, task, metrics, classes, made, pictures, usage, variant)
    return extras


def _claim(recipe: Recipe, output_dir: Path, arguments: TrainingArguments) -> Path | None:
    """Makes the directory this run's, now that nothing speaks against it; returns the checkpoint to continue from."""
    for leftover in output_dir.glob(f".{RECIPE}.*"):
        leftover.unlink()
    try:
        write_text(output_dir / RECIPE, recipe.to_yaml())
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: cannot be written: {error.strerror}") from error
    checkpoint = newest_complete(output_dir / CHECKPOINTS, () if arguments.save_only_model else STATE)
    if checkpoint is not None and arguments.save_only_model:
        raise UserError(
            f"train.save_only_model: {checkpoint} holds no optimizer, so the run cannot continue; delete {output_dir}"
        )
    return checkpoint


def _check_data(checkpoint: Path, data: dict[str, Any]) -> None:
    """Raises UserError where the data are not those that a checkpoint was trained on."""
    progress = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
    # of one that says nothing of data the trainer says what is wrong with it
    names = changed(progress["data"], data) if isinstance(progress, dict) and "data" in progress else []
    if names:
        raise UserError(
            f"data: {', '.join(names[:5])} changed since {checkpoint} was written (hashes differ); put the data back, "
            "or train anew in another --output-dir"
        )
