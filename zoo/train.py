"""The stage `train`: a recipe in, a model directory out.

The directory holds the model and tokenizer, `recipe.yaml` as resolved, `metrics.json`, `events.jsonl`, a card, and the
run's `checkpoints/`, from which it resumes.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import (
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    Seq2SeqTrainingArguments,
    TrainingArguments,
    set_seed,
)

from zoo import adapters, finetuning, hub, tokenizer
from zoo.card import card
from zoo.checkpoints import PROGRESS, STATE, newest_complete
from zoo.data import Splits, load_splits
from zoo.distillation import load_teacher
from zoo.encoding import by_rows, encoded, stream
from zoo.environment import changed, data_of, environment
from zoo.errors import UserError, did_you_mean
from zoo.event_log import EventLog
from zoo.files import as_json, write_json, write_text
from zoo.loading import Processor, fit_images, load_model, set_generation
from zoo.memory import peak_accelerator_memory_bytes, peak_memory_bytes, reset_peak_memory
from zoo.model_directory import METRICS, RECIPE, has_variant, read_metrics, save
from zoo.packed_rows import check_kept_apart
from zoo.quantized import check_learns
from zoo.recipe import Recipe
from zoo.recipe_loading import load_recipe
from zoo.results import MAX_DRAWN_CLASSES, confusion, confusion_picture, curves, per_class, predictions_file
from zoo.samples import WithDraws
from zoo.sections import TokenizerSection
from zoo.streaming import Stream, Unread
from zoo.task_types import DEFAULT_TARGET_LENGTH, TASK_TYPES
from zoo.tasks import LOWER_IS_BETTER, Task, task_of
from zoo.tasks.metrics import OURS, all_right, own_metrics
from zoo.trainer import HeadlessTrainer, WritingTrainer, ZooTrainer

CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"  # among them, where a run has learned its own
EVENTS = "events.jsonl"
LOCK = ".lock"
# of the train section: numbers that make no sense below 1
_AT_LEAST_ONE = (
    *("gradient_accumulation_steps", "eval_accumulation_steps"),
    *("per_device_train_batch_size", "per_device_eval_batch_size"),
)
PUSHED = ".pushed.json"
# what configs call the dropout of attention's weights
ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "dropout_rate")


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
        _check_choice(arguments, task, task.metric_names)
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


def check_directory(recipe: Recipe, output_dir: Path, resume: bool) -> None:
    """Refuses a directory that holds something else, or that cannot be made."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output-dir {output_dir}: a file of that name exists")
    for name in (RECIPE, EVENTS, METRICS, CHECKPOINTS):
        path, kinds = output_dir / name, ("a directory", "a file")
        if path.exists() and path.is_dir() != (name == CHECKPOINTS):
            is_, wanted = kinds if path.is_dir() else kinds[::-1]
            raise UserError(f"--output-dir {output_dir}: {name} is {is_}, where a run has {wanted}; move it away")
    old = output_dir / RECIPE
    # folders without a file in them are what a refused recipe has left
    if any(not path.is_dir() and not _is_ours(path) for path in output_dir.rglob("*")):
        if not old.exists():
            raise UserError(f"--output-dir {output_dir}: not empty, and not a run of zoo; choose another directory")
        if not resume:
            state = "a finished" if (output_dir / METRICS).exists() else "an unfinished"
            raise UserError(
                f"--output-dir {output_dir}: holds {state} run; add --resume to continue it, delete it, or choose "
                "another --output-dir"
            )
        if not _says(old, recipe):
            raise UserError(f"--output-dir {output_dir}: its run had another recipe ({old}); choose another directory")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: cannot be written: {error.strerror}") from error


def _says(file: Path, recipe: Recipe) -> bool:
    """Whether a run's recipe is this one; one that an older version wrote may lack keys that have come since."""
    try:
        return file.read_bytes() == recipe.to_yaml().encode() or load_recipe(str(file)) == recipe
    except (OSError, UserError):
        return False


def _is_ours(path: Path) -> bool:
    """Whether a file is the lock, or what a run that was killed has left of writing its recipe."""
    return path.name == LOCK or path.name.startswith(f".{RECIPE}.")


@contextlib.contextmanager
def alone(output_dir: Path) -> Iterator[None]:
    """Holds the directory, until the process ends at the latest. Raises UserError where another run has it."""
    lock = FileLock(output_dir / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"--output-dir {output_dir}: another run is at work in it; wait for it, or choose another directory"
        ) from None
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        (output_dir / LOCK).unlink(missing_ok=True)
        lock.release()


def discard(output_dir: Path) -> None:
    """Removes a run of zoo, such as an earlier trial; anything else stays."""
    if (output_dir / RECIPE).is_file() and not output_dir.is_symlink():
        with alone(output_dir):
            shutil.rmtree(output_dir)


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


def training_arguments(recipe: Recipe, output_dir: Path) -> TrainingArguments:
    """The recipe's `train` section, verbatim, with what the project decides."""
    # the bar stays although the libraries' messages are quiet, which the library takes for a wish to have none
    defaults: dict[str, Any] = {
        "report_to": "none",
        "disable_tqdm": False,
        "include_for_metrics": ["loss"],
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    for key in _AT_LEAST_ONE:
        if recipe.train.get(key) is not None and recipe.train[key] < 1:
            raise UserError(f"train.{key}: {recipe.train[key]}; give 1 or more")
    for key in ("seed", "data_seed"):
        if recipe.train.get(key) is not None and not 0 <= recipe.train[key] < 2**32:
            raise UserError(f"train.{key}: {recipe.train[key]}; a seed is a number from 0 to 2**32 - 1")
    metric = str(recipe.train.get("metric_for_best_model") or "loss").removeprefix("eval_")
    if metric in LOWER_IS_BETTER:
        # the library looks at the end of the name only, and would take the worst of these for the best
        defaults["greater_is_better"] = False
    elif metric in recipe.task.metrics.keys() - OURS.keys() and "greater_is_better" not in recipe.train:
        raise UserError(f"train.metric_for_best_model: {metric}: say train.greater_is_better, true or false")
    task = task_of(recipe.task)
    made: type[TrainingArguments] = Seq2SeqTrainingArguments if task.writes else TrainingArguments
    if task.label_names is not None:
        defaults["label_names"] = list(task.label_names)
    if task.writes:
        defaults["predict_with_generate"] = True
    if recipe.data.streaming:
        # the stream itself goes on where it was; each process reads all of it and takes its share
        defaults |= {"ignore_data_skip": True, "accelerator_config": {"dispatch_batches": False}}
    try:
        return made(output_dir=str(output_dir / CHECKPOINTS), remove_unused_columns=False, **(defaults | recipe.train))
    except (*_REFUSALS, OSError, AttributeError) as error:
        raise _refused(error) from error


# what transformers raises for values that its source alone does not rule out
_REFUSALS = (ValueError, TypeError, ImportError, RuntimeError, KeyError)


def _refused(error: Exception) -> UserError:
    return UserError(f"train: refused by transformers: {next(iter(str(error).splitlines()), type(error).__name__)}")


def _check_choice(arguments: TrainingArguments, task: Task, measured: Iterable[str]) -> None:
    """Raises UserError where the best checkpoint is chosen by a metric that is not `measured`."""
    metric = str(arguments.metric_for_best_model or "loss").removeprefix("eval_")
    known = ("loss", *measured)
    if metric not in known:
        near = did_you_mean(metric, known) or f"; it is one of {', '.join(known)}"
        raise UserError(f"train.metric_for_best_model: {task.name} does not measure {metric!r}{near}")


def build_trainer(
    recipe: Recipe,
    task: Task,
    model,
    processor: Processor,
    arguments: TrainingArguments,
    labels: Sequence[str],
    train_rows=None,
    eval_rows=None,
    trainer_class: type[ZooTrainer] | None = None,
) -> ZooTrainer:
    """A Trainer on encoded rows. Raises UserError for a `train` section it cannot work with."""
    trainer: ZooTrainer
    measure, loss = own_metrics(task, recipe.task, labels, processor), None
    of_model = {field: getattr(model.config, field) for field in task.config_fields}
    if task.loss is not None:
        rows = train_rows.rows if isinstance(train_rows, WithDraws) else train_rows
        # nothing that weighs classes is trained on a stream
        learned = [] if rows is None or isinstance(rows, Stream) else rows["labels"]
        loss = task.loss(recipe.task, learned, len(labels), arguments.label_smoothing_factor)
    if recipe.task.metrics and eval_rows is not None:
        # a recipe's own metrics say only when they run what they are called, and whether they take their options
        _check_choice(arguments, task, measure(all_right(task, labels, eval_rows["labels"])))
    if train_rows is not None:
        _check_flex(model.config, arguments)
        for note in finetuning.apply(model, recipe.finetune):
            print(note)
    try:
        made: Callable[..., ZooTrainer] = trainer_class or (WritingTrainer if task.writes else ZooTrainer)
        if task.learn is not None:
            made = partial(HeadlessTrainer, learn=task.learn(recipe.task))
        trainer = made(
            model=model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            data_collator=task.collate(processor, recipe.task, **of_model),
            compute_metrics=lambda prediction: measure(by_rows(task, recipe, prediction, trainer.evaluated_rows)),
            compute_loss_func=loss,
            preprocess_logits_for_metrics=task.reduce,
            processing_class=processor,
        )
        trainer.row_loss = task.row_loss
        if train_rows is not None:
            trainer.tune(recipe.finetune)
            # made now, while it is plain whose words were wrong; the scheduler is made again when the steps are known
            trainer.create_optimizer()
            trainer.create_scheduler(1)
            trainer.get_train_dataloader()
        return trainer
    except _REFUSALS as error:
        raise _refused(error) from error


def _check_flex(config: PreTrainedConfig, arguments: TrainingArguments) -> None:
    """Raises UserError where flex_attention, which says so at the first step only, cannot train a model."""
    if config._attn_implementation != "flex_attention":
        return
    if arguments.device.type == "cpu":
        raise UserError("model.attn_implementation: flex_attention cannot train on a CPU; use sdpa, or an accelerator")
    for name in ATTENTION_DROPOUTS:
        if getattr(config, name, 0.0):
            raise UserError(
                f"model.attn_implementation: flex_attention trains without dropout only; set model.config.{name}: 0.0 "
                f"(it is {getattr(config, name)}), or use sdpa"
            )
