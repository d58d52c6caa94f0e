"""`zoo bench finetune`: the native class against the official one, the same Trainer, data and seeds, interleaved.

The official side is its best self: sdpa, dynamic padding, fused AdamW, the same collator and threads. A round is one
turn of each side on the same rows; ratios are taken within a round, and the median over the rounds is what counts.
"""

import contextlib
import itertools
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, set_seed

from zoo.data import load_splits
from zoo.errors import UserError
from zoo.loading import load_model, load_processor
from zoo.memory import peak_memory_bytes
from zoo.quiet import quiet_libraries
from zoo.recipe import Recipe
from zoo.tasks import task_of
from zoo.train import build_trainer, encoded, training_arguments
from zoo.trainer import ZooTrainer

SIDES = ("native", "official")
KINDS = ("shuffled", "grouped by length", "evaluation")
WARM_UP_STEPS = 1
EVAL_BATCHES = 4
LOSS_STEPS = 8
MEMORY_STEPS = 12
PROFILE_ROWS = 16


def run(recipe: Recipe, max_lengths: list[int], rounds: int, steps: int) -> dict[str, Any]:
    """Speeds, ratios, peak memory and loss curves for each maximum length; see `table`."""
    _check(recipe)
    if recipe.model.implementation != "native":
        raise UserError("bench: the recipe's model.implementation must be native; the official side is added to it")
    if recipe.model.attention != "full":
        raise UserError("bench: a variant has no official class to be compared with; use attention: full")
    with tempfile.TemporaryDirectory() as directory:
        start = _start(recipe, directory)
        # turns of both sides; their memory and their losses
        turns = len(max_lengths) * len(SIDES) * (rounds * len(KINDS) + 2)
        with tqdm(total=turns, desc="Measuring", unit="turn") as bar:
            results = [_one_length(start, length, rounds, steps, bar) for length in max_lengths]
    return {"recipe": recipe.name, "environment": _environment(recipe), "rounds": rounds, "results": results}


def _check(recipe: Recipe) -> None:
    """Raises UserError for what is not measured yet."""
    if recipe.task.type != "text-classification" or recipe.task.stride is not None:
        raise UserError(
            f"bench finetune measures text-classification in one piece; {recipe.name} is {recipe.task.type}"
        )


def _start(recipe: Recipe, directory: str) -> Recipe:
    """The recipe on a checkpoint that has the task's head already: a new one would differ from side to side."""
    task = task_of(recipe.task)
    section = recipe.model.model_copy(update={"implementation": "official", "ragged": "auto"})
    set_seed(0)
    labels = load_splits(recipe.data, task.roles, 0, kind=task.labels).labels
    load_model(section, task.auto_class, labels, task.problem_type).save_pretrained(directory)
    load_processor(section, task_of(recipe.task).processor).save_pretrained(directory)
    here: dict[str, Any] = {"path": directory, "revision": None, "config": {}}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=here)})


def _sized(recipe: Recipe, max_length: int) -> Recipe:
    return recipe.model_copy(update={"task": recipe.task.model_copy(update={"max_length": max_length})})


def _one_length(recipe: Recipe, max_length: int, rounds: int, steps: int, bar: tqdm) -> dict[str, Any]:
    sized = _sized(recipe, max_length)
    subject = _Subject(sized)
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        rate = matrix_product_rate()
        for kind, measured in rows.items():
            # the side that goes first changes from round to round
            order = SIDES if number % 2 == 0 else SIDES[::-1]
            turn = {}
            for side in order:
                turn[side] = _turn(subject, side, kind, number, steps)
                bar.update()
            measured.append({**turn, "matrix_product_rate": rate})
    memory = {}
    for side in SIDES:
        memory[side] = _in_own_process(_peak_memory, sized, side)
        bar.update()
    difference = _loss_difference(subject)
    bar.update(len(SIDES))
    return {
        "max_length": max_length,
        "kinds": {kind: _summary(measured) for kind, measured in rows.items()},
        "peak_memory_bytes": memory,
        "loss_difference_without_dropout": difference,
    }


class _Subject:
    """A recipe with its data and tokenizer, read and encoded once."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.task = recipe, task_of(recipe.task)
        self.processor = load_processor(recipe.model, task_of(recipe.task).processor)
        splits = load_splits(recipe.data, self.task.roles, 0, kind=self.task.labels)
        self.labels = splits.labels
        self.rows, _ = encoded(splits.train, recipe, self.task, self.processor, 0)
        self.lengths = {row: len(ids) for row, ids in zip(self.rows["row"], self.rows["input_ids"], strict=True)}


def _turn(subject: _Subject, side: str, kind: str, seed: int, steps: int) -> dict[str, float]:
    """Samples and real floating-point operations a second of one side, on rows that depend on the seed alone."""
    with _trainer(subject, side, seed, steps, grouped=kind == "grouped by length") as trainer:
        if kind == "evaluation":
            count = min(EVAL_BATCHES * trainer.args.eval_batch_size, len(subject.rows))
            rows = subject.rows.shuffle(seed=seed).select(range(count))
            trainer.evaluate(rows.select(range(min(trainer.args.eval_batch_size, count))))
            start = time.perf_counter()
            trainer.evaluate(rows)
            seconds, seen, passes = time.perf_counter() - start, rows["row"], 1
        else:
            clock = _Clock()
            trainer.add_callback(clock)
            trainer.train()
            warm_up = WARM_UP_STEPS * trainer.args.gradient_accumulation_steps
            seconds, seen, passes = clock.seconds, list(itertools.chain(*trainer.seen_rows[warm_up:])), 3
        lengths = [subject.lengths[row] for row in seen]
        operations = passes * sum(length * _flops_per_token(trainer.model, length) for length in lengths)
        return {"samples_per_second": len(lengths) / seconds, "flops_per_second": operations / seconds}


def _flops_per_token(model, length: int) -> int:
    from zoo.models.modeling_bert import block_spec

    return model.config.num_hidden_layers * block_spec(model.config).flops_per_token(length)


class _Clock(TrainerCallback):
    """Seconds of the steps after the warm-up."""

    start = seconds = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP_STEPS:
            self.start = time.perf_counter()
        self.seconds = time.perf_counter() - self.start


class _NotingTrainer(ZooTrainer):
    """Notes the rows and the loss of each training step."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen_rows: list[list[int]] = []
        self.seen_losses: list[float] = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.seen_rows.append(self.rows)
        self.seen_losses.append(loss.item())
        return loss


@contextlib.contextmanager
def _trainer(subject: _Subject, side: str, seed: int, steps: int, grouped=False, **config) -> Iterator[_NotingTrainer]:
    recipe = subject.recipe
    model_section = recipe.model.model_copy(
        update={"implementation": side, "ragged": "auto", "config": recipe.model.config | config}
    )
    changes: dict[str, Any] = {
        "max_steps": WARM_UP_STEPS + steps, "seed": seed, "eval_strategy": "no", "save_strategy": "no",
        "load_best_model_at_end": False, "logging_strategy": "no", "disable_tqdm": True,
        "train_sampling_strategy": "group_by_length" if grouped else "random",
    }  # fmt: skip
    sized = recipe.model_copy(update={"train": recipe.train | changes, "model": model_section})
    set_seed(seed)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(None):
        model = load_model(sized.model, subject.task.auto_class, subject.labels, subject.task.problem_type)
        subject.task.check(sized.task, model)
        arguments = training_arguments(sized, Path(scratch))
        trainer = build_trainer(
            sized, subject.task, model, subject.processor, arguments, subject.labels, subject.rows, None, _NotingTrainer
        )
        yield cast(_NotingTrainer, trainer)


def _loss_difference(subject: _Subject) -> float:
    """The largest difference between the two sides' losses over a few steps with all dropout off."""
    curves = []
    for side in SIDES:
        dropout_off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        with _trainer(subject, side, 0, LOSS_STEPS, **dropout_off) as trainer:
            trainer.train()
            curves.append(trainer.seen_losses)
    return max(abs(a - b) for a, b in zip(*curves, strict=True))


def _peak_memory(recipe: Recipe, side: str) -> int:
    with _trainer(_Subject(recipe), side, 0, MEMORY_STEPS) as trainer:
        trainer.train()
    return peak_memory_bytes()


def _in_own_process(function, *arguments):
    """A process of its own, whose peak is that of one side alone."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=quiet_libraries) as pool:
        return pool.submit(function, *arguments).result()


def profile(recipe: Recipe, max_lengths: list[int], steps: int) -> list[dict[str, Any]]:
    """Each operation's share of the time of native training steps, by torch.profiler, for each maximum length."""
    _check(recipe)
    profiles = []
    with tempfile.TemporaryDirectory() as directory:
        start = _start(recipe, directory)
        for max_length in max_lengths:
            with _trainer(_Subject(_sized(start, max_length)), "native", 0, steps) as trainer:
                clock = _ProfilerClock()
                trainer.add_callback(clock)
                trainer.train()
            operations = clock.profiler.key_averages()
            total = sum(operation.self_cpu_time_total for operation in operations)
            largest = sorted(operations, key=lambda operation: -operation.self_cpu_time_total)[:PROFILE_ROWS]
            shares = {operation.key: operation.self_cpu_time_total / total for operation in largest}
            profiles.append({"max_length": max_length, "milliseconds_per_step": total / steps / 1000, "shares": shares})
    return profiles


class _ProfilerClock(TrainerCallback):
    """Profiles the steps after the warm-up."""

    def __init__(self) -> None:
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP_STEPS:
            self.profiler.start()
        if state.global_step == state.max_steps:
            self.profiler.stop()


def profile_table(profiles: list[dict[str, Any]]) -> str:
    """What `profile` found, as Markdown."""
    lines = []
    for entry in profiles:
        lines += [f"{entry['max_length']} tokens, {entry['milliseconds_per_step']:.0f} ms a training step", ""]
        lines += ["| operation | share |", "|---|---|"]
        lines += [f"| {name} | {share:.1%} |" for name, share in entry["shares"].items()] + [""]
    return "\n".join(lines)


def matrix_product_rate(size: int = 2048, repeats: int = 8) -> float:
    """fp32 matrix products of this machine, now: operations a second."""
    a = torch.randn(size, size)
    a @ a
    start = time.perf_counter()
    for _ in range(repeats):
        a @ a
    return 2 * size**3 * repeats / (time.perf_counter() - start)


def _summary(measured: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [turn["native"]["samples_per_second"] / turn["official"]["samples_per_second"] for turn in measured]
    summary: dict[str, Any] = {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}
    for side in SIDES:
        summary[side] = {
            "samples_per_second": statistics.median(turn[side]["samples_per_second"] for turn in measured),
            "fraction_of_matrix_products": statistics.median(
                turn[side]["flops_per_second"] / turn["matrix_product_rate"] for turn in measured
            ),
        }
    summary["matrix_product_rate"] = statistics.median(turn["matrix_product_rate"] for turn in measured)
    return summary


def _environment(recipe: Recipe) -> dict[str, Any]:
    names = ("torch", "transformers", "accelerate")
    return {
        **{name: version(name) for name in names},
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "official": f"sdpa, dynamic padding, {recipe.train.get('optim', 'adamw_torch_fused')}, same collator and rows",
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown, as docs/performance.md shows it."""
    environment = ", ".join(f"{name} {value}" for name, value in result["environment"].items())
    lines = [f"{result['recipe']}: median of {result['rounds']} rounds; {environment}", ""]
    lines.append("| tokens | what | native samples/s | official samples/s | ratio (range) | native / official fraction "
                 "of fp32 matrix products | their rate |")  # fmt: skip
    lines.append("|---|---|---|---|---|---|---|")
    for entry in result["results"]:
        for kind, summary in entry["kinds"].items():
            native, official = summary["native"], summary["official"]
            low, high = summary["ratio_range"]
            lines.append(
                f"| {entry['max_length']} | {kind} | {native['samples_per_second']:.1f} | "
                f"{official['samples_per_second']:.1f} | **{summary['ratio']:.2f}** ({low:.2f}-{high:.2f}) | "
                f"{native['fraction_of_matrix_products']:.2f} / {official['fraction_of_matrix_products']:.2f} | "
                f"{summary['matrix_product_rate'] / 1e9:.0f} GFLOP/s |"
            )
    for entry in result["results"]:
        memory = {side: f"{size / 2**20:,.0f} MiB" for side, size in entry["peak_memory_bytes"].items()}
        lines += [
            "",
            f"{entry['max_length']} tokens: peak memory native {memory['native']}, official {memory['official']}; "
            f"largest difference of the losses without dropout {entry['loss_difference_without_dropout']:.1e}",
        ]
    return "\n".join(lines)
