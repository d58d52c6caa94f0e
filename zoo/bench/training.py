"""Training and evaluation: the native class against the official one, the same Trainer, data and seeds, interleaved.

The official side is its best self: sdpa, dynamic padding, fused AdamW, the same collator and threads. A round is one
turn of each side on the same rows; ratios are taken within a round, and the median over the rounds is what counts.
"""

import contextlib
import itertools
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, set_seed

from zoo import adapters
from zoo.bench.settings import Setting
from zoo.building import build_trainer, training_arguments
from zoo.data import load_splits
from zoo.encoding import encoded
from zoo.errors import UserError
from zoo.fitting import fit_images
from zoo.loading import load_model, load_processor
from zoo.memory import peak_accelerator_memory_bytes, peak_memory_bytes
from zoo.quiet import quiet_libraries
from zoo.recipe import Recipe
from zoo.samples import WithDraws
from zoo.size_counts import layers, max_length
from zoo.tasks import task_of
from zoo.trainer import ZooTrainer

SIDES = ("native", "official")
WARM_UP_STEPS = 1
EVAL_BATCHES = 4
PROFILE_ROWS = 16
# what a row of them costs is known
COUNTED_TASKS = (
    *("text-classification", "token-classification", "fill-mask", "text-generation", "summarization"),
    "image-classification",
)


def run(setting: Setting, max_lengths: Sequence[int], rounds: int, steps: int) -> dict[str, Any]:
    """Speeds, ratios, peak memory and loss curves for each maximum length of texts; see `table`.

    max_lengths: none for the recipe's own, which images have not.
    """
    recipe = setting.recipe
    _check(recipe)
    if recipe.model.implementation != "native":
        raise UserError("bench: the recipe's model.implementation must be native; the official side is added to it")
    if any(set(names) != {"full"} for names in recipe.model.attentions.values()):
        raise UserError("bench: a variant has no official class to be compared with; use attention: full")
    with tempfile.TemporaryDirectory() as directory:
        start = _start(recipe, directory)
        # turns of both sides; their memory and their losses
        lengths: list[int | None] = [*max_lengths]
        sized = [replace(setting, recipe=_sized(start, length)) for length in lengths or [None]]
        turns = len(sized) * len(SIDES) * (rounds * len(setting.kinds) + 2)
        with tqdm(total=turns, desc="Measuring", unit="turn") as bar:
            results = [_one_length(one, rounds, steps, bar) for one in sized]
    return {
        "recipe": recipe.name,
        "environment": _environment(recipe),
        "precision": str(precision(recipe)).removeprefix("torch."),
        "rounds": rounds,
        "results": results,
    }


def _check(recipe: Recipe) -> None:
    """Raises UserError for what cannot be measured: a row must be one input of the model."""
    if recipe.task.stride is not None:
        raise UserError("bench: task.stride: windows are not measured; remove the key")
    if recipe.task.type not in COUNTED_TASKS:
        raise UserError(f"bench: {recipe.task.type} is not measured; there are {', '.join(COUNTED_TASKS)}")
    if recipe.train.get("use_cpu") and device().type != "cpu":
        raise UserError("bench: train.use_cpu: both sides run where a Trainer puts them; remove the key")
    if recipe.lora.get("target_modules"):
        raise UserError("bench: lora.target_modules: the classes have other names for them; remove the key")


def _start(recipe: Recipe, directory: str) -> Recipe:
    """The recipe on a checkpoint that has the task's head already: a new one would differ from side to side."""
    task = task_of(recipe.task)
    section = recipe.model.model_copy(update={"implementation": "official", "ragged": "auto"})
    set_seed(0)
    labels = load_splits(recipe.data, task.roles, 0, kind=task.labels).labels
    processor = load_processor(section, task.processor)
    model = load_model(section, task.auto_class, labels, task.problem_type, processor=processor)
    fit_images(model, processor, recipe.task.image_size)
    for part in (model, processor):
        part.save_pretrained(directory)
    here: dict[str, Any] = {"path": directory, "config": {}, "added_tokens": []}
    here |= dict.fromkeys(("size", "tokenizer", "revision"))
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=here)})


def _sized(recipe: Recipe, max_length: int | None) -> Recipe:
    if max_length is None:
        return recipe
    return recipe.model_copy(update={"task": recipe.task.model_copy(update={"max_length": max_length})})


def _one_length(setting: Setting, rounds: int, steps: int, bar: tqdm) -> dict[str, Any]:
    subject = Subject(setting)
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in setting.kinds}
    for number in range(rounds):
        rate = matrix_product_rate(precision(setting.recipe))
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
        memory[side] = _in_own_process(_peak_memory, setting, side)
        bar.update()
    difference = _loss_difference(subject)
    bar.update(len(SIDES))
    return {
        "max_length": subject.longest,
        "kinds": {kind: _summary(measured) for kind, measured in rows.items()},
        "peak_memory_bytes": memory,
        "loss_difference_without_dropout": difference,
    }


class Subject:
    """A recipe with its data and processor, read and encoded once; each row with a number of its own."""

    def __init__(self, setting: Setting):
        self.recipe, self.task = setting.recipe, task_of(setting.recipe.task)
        self.dropout, self.probe_steps = setting.dropout, setting.probe_steps
        self.processor = load_processor(self.recipe.model, self.task.processor)
        splits = load_splits(self.recipe.data, self.task.roles, 0, kind=self.task.labels)
        self.labels = splits.labels
        found, _ = encoded(splits.rows, self.recipe, self.task, self.processor, 0)
        table = found.rows if isinstance(found, WithDraws) else found
        table = _full_rows(table, self.recipe.task.max_length) if setting.full_rows else table
        self.table = table.remove_columns("row").add_column("row", list(range(len(table))))
        self.rows = self.drawn(self.table)
        texts = "input_ids" in table.column_names
        self.lengths = [len(ids) for ids in table["input_ids"]] if texts else None
        self.targets = [len(ids) for ids in table["labels"]] if self.task.writes else None
        self.longest = self.recipe.task.max_length if texts else None

    def drawn(self, rows: Dataset) -> Any:
        return WithDraws(rows, 0, self.task.others) if self.task.draws == "all" else rows

    def operations(self, row: int, model) -> int:
        """Real floating-point operations of a forward pass over a row: its tokens in the blocks, and no padding.

        What stands around the blocks counts where it is large: a vocabulary for each token that is predicted.
        """
        config, specs = model.config, layers(model.config)
        length = max_length(config) if self.lengths is None else self.lengths[row]
        if self.targets is not None:
            target = self.targets[row]
            read = [spec for spec in specs if not spec.cross_attention]
            write = [spec for spec in specs if spec.cross_attention]
            done = length * sum(spec.flops_per_token(length) for spec in read)
            done += target * sum(spec.flops_per_token(target, encoder_length=length) for spec in write)
            return done + 2 * target * config.vocab_size * config.hidden_size
        predicted = {"text-generation": 1.0, "fill-mask": 0.15}.get(self.task.name, 0.0) * length
        vocabulary = 2 * predicted * config.vocab_size * config.hidden_size if predicted else 0
        return length * sum(spec.flops_per_token(length) for spec in specs) + int(vocabulary)


def _full_rows(rows: Dataset, length: int) -> Dataset:
    """The texts one after another, in rows of exactly `length` tokens."""
    stream = [token for ids in rows["input_ids"] for token in ids]
    whole = [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
    columns = {"input_ids": whole, "labels": whole, "attention_mask": [[1] * length] * len(whole)}
    return Dataset.from_dict({**columns, "row": list(range(len(whole)))})


def without_dropout(model: nn.Module) -> None:
    """No dropout anywhere, whichever class has it and under whatever name."""
    for module in model.modules():
        for name in ("p", "dropout_p", "attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _turn(subject: Subject, side: str, kind: str, seed: int, steps: int) -> dict[str, float]:
    """Samples and real floating-point operations a second of one side, on rows that depend on the seed alone."""
    with _trainer(subject, side, seed, steps, grouped=kind == "grouped by length") as trainer:
        if kind == "evaluation":
            count = min(EVAL_BATCHES * trainer.args.eval_batch_size, len(subject.table))
            rows = subject.table.shuffle(seed=seed).select(range(count))
            trainer.evaluate(subject.drawn(rows.select(range(min(trainer.args.eval_batch_size, count)))))
            start = now()
            trainer.evaluate(subject.drawn(rows))
            seconds, seen, passes = now() - start, list(rows["row"]), 1
        else:
            clock = _Clock()
            trainer.add_callback(clock)
            trainer.train()
            warm_up = WARM_UP_STEPS * trainer.args.gradient_accumulation_steps
            seconds, seen, passes = clock.seconds, list(itertools.chain(*trainer.seen_rows[warm_up:])), 3
        operations = passes * sum(subject.operations(row, trainer.model) for row in seen)
        return {"samples_per_second": len(seen) / seconds, "flops_per_second": operations / seconds}


class _Clock(TrainerCallback):
    """Seconds of the steps after the warm-up."""

    start = seconds = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP_STEPS:
            self.start = now()
        if state.global_step == state.max_steps:
            self.seconds = now() - self.start


class _NotingTrainer(ZooTrainer):
    """Notes the rows and the loss of each training step."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen_rows: list[list[int]] = []
        self.seen_losses: list[float] = []

    def train(self, *args, **kwargs):
        # nothing of it is kept, so that a signal ends it at once
        return super(ZooTrainer, self).train(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.seen_rows.append(self.rows)
        self.seen_losses.append(loss.item())
        return loss


@contextlib.contextmanager
def _trainer(
    subject: Subject, side: str, seed: int, steps: int, grouped: bool = False, dropout: bool = True
) -> Iterator[_NotingTrainer]:
    recipe = subject.recipe
    model_section = recipe.model.model_copy(update={"implementation": side, "ragged": "auto"})
    changes: dict[str, Any] = {
        "max_steps": WARM_UP_STEPS + steps, "seed": seed, "eval_strategy": "no", "save_strategy": "no",
        "load_best_model_at_end": False, "logging_strategy": "no", "disable_tqdm": True,
        "train_sampling_strategy": "group_by_length" if grouped else "random",
    }  # fmt: skip
    sized = recipe.model_copy(update={"train": recipe.train | changes, "model": model_section})
    set_seed(seed)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(None):
        task = subject.task
        model: Any = load_model(
            sized.model, task.auto_class, subject.labels, task.problem_type, quantize=sized.quantize
        )
        if sized.lora:
            model = adapters.adapt(model, sized.lora, task.name)
        if not (dropout and subject.dropout):
            without_dropout(model)
        subject.task.check(sized.task, model)
        arguments = training_arguments(sized, Path(scratch))
        trainer = build_trainer(
            sized, subject.task, model, subject.processor, arguments, subject.labels, subject.rows, None, _NotingTrainer
        )
        yield cast(_NotingTrainer, trainer)


def _loss_difference(subject: Subject) -> float:
    """The largest difference between the two sides' losses over a few steps with all dropout off."""
    curves = []
    for side in SIDES:
        with _trainer(subject, side, 0, subject.probe_steps, dropout=False) as trainer:
            trainer.train()
            curves.append(trainer.seen_losses)
    return max(abs(a - b) for a, b in zip(*curves, strict=True))


def _peak_memory(setting: Setting, side: str) -> int:
    with _trainer(Subject(setting), side, 0, setting.probe_steps) as trainer:
        trainer.train()
    return peak_accelerator_memory_bytes() or peak_memory_bytes()


def _in_own_process(function, *arguments):
    """A process of its own, whose peak is that of one side alone."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_quiet) as pool:
        return pool.submit(function, *arguments).result()


def _quiet() -> None:
    """Standard output is for the answer, which another process gives."""
    quiet_libraries()
    sys.stdout = sys.stderr


def profile(setting: Setting, max_lengths: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """Each operation's share of the time of native training steps, by torch.profiler, for each maximum length."""
    _check(setting.recipe)
    profiles = []
    with tempfile.TemporaryDirectory() as directory:
        start = _start(setting.recipe, directory)
        lengths: list[int | None] = [*max_lengths]
        for max_length in lengths or [None]:
            subject = Subject(replace(setting, recipe=_sized(start, max_length)))
            with _trainer(subject, "native", 0, steps) as trainer:
                clock = _ProfilerClock()
                trainer.add_callback(clock)
                trainer.train()
            on = "cpu" if device().type == "cpu" else "device"
            # an accelerator's kernels stand beside the operations that start them, and are counted there
            operations = [x for x in clock.profiler.key_averages() if x.device_type == torch.autograd.DeviceType.CPU]
            times = {operation.key: getattr(operation, f"self_{on}_time_total") for operation in operations}
            total = sum(times.values())
            largest = sorted(times, key=lambda name: -times[name])[:PROFILE_ROWS]
            shares = {name: times[name] / total for name in largest}
            profiles.append(
                {"max_length": subject.longest, "milliseconds_per_step": total / steps / 1000, "shares": shares}
            )
    return profiles


class _ProfilerClock(TrainerCallback):
    """Profiles the steps after the warm-up."""

    def __init__(self) -> None:
        self.profiler = torch.profiler.profile(activities=torch.profiler.supported_activities())

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP_STEPS:
            self.profiler.start()
        if state.global_step == state.max_steps:
            self.profiler.stop()


def profile_table(profiles: list[dict[str, Any]]) -> str:
    """What `profile` found, as Markdown."""
    lines = []
    for entry in profiles:
        lines += [f"{_of(entry)}, {entry['milliseconds_per_step']:.0f} ms a training step", ""]
        lines += ["| operation | share |", "|---|---|"]
        lines += [f"| {name} | {share:.1%} |" for name, share in entry["shares"].items()] + [""]
    return "\n".join(lines)


def device() -> torch.device:
    """Where the Trainer puts a model: this machine's accelerator, if it has one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def now() -> float:
    """Seconds, when all that was asked of the accelerator is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def matrix_product_rate(dtype: torch.dtype = torch.float32, repeats: int = 8) -> float:
    """Matrix products of this machine, now: operations a second."""
    place = device()
    size = 2048 if place.type == "cpu" else 8192
    a = torch.randn(size, size, device=place, dtype=dtype)
    a @ a
    start = now()
    for _ in range(repeats):
        a @ a
    return 2 * size**3 * repeats / (now() - start)


def precision(recipe: Recipe) -> torch.dtype:
    """Of the recipe's matrix products."""
    chosen = [dtype for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)) if recipe.train.get(name)]
    return chosen[0] if chosen else torch.float32


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


def accelerator_name() -> dict[str, str]:
    place = device()
    # Apple's have no name
    name = getattr(torch.get_device_module(place), "get_device_name", lambda: place.type)
    return {} if place.type == "cpu" else {"accelerator": name()}


def _environment(recipe: Recipe) -> dict[str, Any]:
    names = ("torch", "transformers", "accelerate")
    return {
        **{name: version(name) for name in names},
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **accelerator_name(),
        "official": f"sdpa, dynamic padding, {recipe.train.get('optim', 'adamw_torch_fused')}, same collator and rows",
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown, as docs/performance.md shows it."""
    environment = ", ".join(f"{name} {value}" for name, value in result["environment"].items())
    lines = [f"{result['recipe']}: median of {result['rounds']} rounds; {environment}", ""]
    lines.append("| tokens | what | native samples/s | official samples/s | ratio (range) | native / official fraction "
                 f"of {result['precision']} matrix products | their rate |")  # fmt: skip
    lines.append("|---|---|---|---|---|---|---|")
    for entry in result["results"]:
        for kind, summary in entry["kinds"].items():
            native, official = summary["native"], summary["official"]
            low, high = summary["ratio_range"]
            lines.append(
                f"| {entry['max_length'] or 'images'} | {kind} | {native['samples_per_second']:.1f} | "
                f"{official['samples_per_second']:.1f} | **{summary['ratio']:.2f}** ({low:.2f}-{high:.2f}) | "
                f"{native['fraction_of_matrix_products']:.2f} / {official['fraction_of_matrix_products']:.2f} | "
                f"{summary['matrix_product_rate'] / 1e9:.0f} GFLOP/s |"
            )
    for entry in result["results"]:
        memory = {side: f"{size / 2**20:,.0f} MiB" for side, size in entry["peak_memory_bytes"].items()}
        lines += [
            "",
            f"{_of(entry)}: peak memory native {memory['native']}, official {memory['official']}; "
            f"largest difference of the losses without dropout {entry['loss_difference_without_dropout']:.1e}",
        ]
    return "\n".join(lines)


def _of(entry: dict[str, Any]) -> str:
    return "images" if entry["max_length"] is None else f"{entry['max_length']} tokens"
