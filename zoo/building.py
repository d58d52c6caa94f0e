"""A Trainer made of a recipe: the arguments of its `train` section, and what the task adds."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, Seq2SeqTrainingArguments, TrainingArguments

from zoo import finetuning
from zoo.encoding import by_rows
from zoo.errors import UserError, did_you_mean
from zoo.loading import Processor
from zoo.recipe import Recipe
from zoo.run_directory import CHECKPOINTS
from zoo.samples import WithDraws
from zoo.streaming import Stream
from zoo.tasks import LOWER_IS_BETTER, Task, task_of
from zoo.tasks.metrics import OURS, all_right, own_metrics
from zoo.trainer import HeadlessTrainer, WritingTrainer, ZooTrainer

# of the train section: numbers that make no sense below 1
_AT_LEAST_ONE = (
    *("gradient_accumulation_steps", "eval_accumulation_steps"),
    *("per_device_train_batch_size", "per_device_eval_batch_size"),
)
# what configs call the dropout of attention's weights
ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "dropout_rate")


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


def check_choice(arguments: TrainingArguments, task: Task, measured: Iterable[str]) -> None:
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
        check_choice(arguments, task, measure(all_right(task, labels, eval_rows["labels"])))
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
