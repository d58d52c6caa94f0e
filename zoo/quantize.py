"""`zoo quantize`: a finished model with weights of fewer bits, what it then reaches on its own data, and how fast.

`dynamic-int8` and `smooth-int8` are layers of our own (`models/int8.py`), which a native model keeps in its config and
code; the others are the libraries' own, of the official class where there is one, and open by `from_pretrained` alone.
"""

import importlib.util
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig

from zoo import stages
from zoo.checkpoints import writing
from zoo.data import load_splits
from zoo.encoding import encoded
from zoo.errors import RunError, UserError
from zoo.loading import load_model
from zoo.model_directory import (
    Finished,
    check_free,
    has_variant,
    open_finished,
    read_metrics,
    tested_rows,
)
from zoo.models.pretrained import ZooPreTrainedModel
from zoo.quantized import WEIGHT_BYTES, fence, int8_model
from zoo.task_types import TASK_TYPES

INT8 = {"dynamic-int8": "dynamic", "smooth-int8": "smooth"}
LIBRARIES: dict[str, dict[str, Any]] = {
    "bnb-int8": {"load_in_8bit": True},
    "bnb-nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "torchao-int8": {"torchao": "Int8WeightOnlyConfig"},
}
METHODS = (*INT8, *LIBRARIES)
NEW_TOKENS, ROUNDS, BATCHES = 32, 3, 4


def run(directory: Path, method: str, output_dir: Path, calibrate: int = 128) -> dict[str, Any]:
    """`before` and `after`: the test metrics, `bytes` of the weights, and `per_second`, tokens written one text at a
    time or samples in batches, measured in turns; `ratio` of these. output_dir is then a finished run.

    calibrate: rows of train that `smooth-int8` reads. Raises UserError for a model that cannot be quantised so.
    """
    check_free(output_dir)
    finished = open_finished(directory)
    if finished.recipe.lora:
        raise UserError(f"{directory}: an adapter; make a whole model of it first: zoo adapters merge {directory}")
    if getattr(finished.model.config, "int8", None) or getattr(finished.model.config, "quantization_config", None):
        raise UserError(f"{directory}: quantised already; give the run that it was made of")
    if method in INT8:
        model, implementation = _int8(finished, method, calibrate), "native"
    else:
        model, implementation = _by_library(finished, method)
    model.eval()
    writes = TASK_TYPES[finished.task.name].generates
    size = 1 if writes else int(finished.recipe.train.get("per_device_eval_batch_size", 8))
    batches = list(itertools.islice(stages.batches(finished, tested_rows(finished)[1], size), BATCHES))
    _check_reopened(model, batches[0])
    before, after = read_metrics(directory), stages.measured(finished, model)
    # the measuring has moved it to an accelerator, if there is one
    finished.model.eval().to(model.device)
    speed = _speed({"before": finished.model, "after": model}, batches, writes)
    section = finished.recipe.model.model_copy(update={"implementation": implementation})
    recipe = finished.recipe.model_copy(update={"model": section})
    said = f"`zoo quantize --method {method}` of {finished.directory.name}; the results above are its own."
    stages.write(finished, recipe, model, after, f"## Quantised\n\n{said}\n", output_dir)
    sizes = {"before": _bytes(directory), "after": _bytes(output_dir)}
    report: dict[str, Any] = {"method": method, "ratio": speed["ratio"], "unit": speed["unit"]}
    for side, metrics in (("before", before), ("after", after)):
        kept = {name: metrics[name] for name in after if name in metrics}
        report[side] = {**kept, "bytes": sizes[side], "per_second": speed[side]}
    return report


def _int8(finished: Finished, method: str, calibrate: int) -> nn.Module:
    """The same model with layers of 8 bits."""
    if not isinstance(finished.model, ZooPreTrainedModel):
        finished = open_finished(finished.directory, ["model.implementation=native"])
    way = INT8[method]
    return int8_model(finished.model, way, _largest_inputs(finished, calibrate) if way == "smooth" else {})


def _largest_inputs(finished: Finished, count: int) -> dict[str, torch.Tensor]:
    """Layer -> the largest absolute value of each of its input features on rows of train: (in_features,)."""
    recipe, task, model = finished.recipe, finished.task, finished.model
    seed = recipe.train.get("seed", 42)
    splits = load_splits(recipe.data, task.roles, seed, finished.labels, task.labels)
    train: Any = splits.train
    if train is None or not count or not hasattr(train, "select"):
        raise UserError("quantize: smooth-int8 reads rows of train, and there are none; use dynamic-int8")
    rows, _ = encoded(train.select(range(min(count, len(train)))), recipe, task, finished.processor, seed)
    if not len(rows):
        raise UserError("quantize: smooth-int8 reads rows of train, and all are empty; use dynamic-int8")
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(module, args):
            seen = args[0].detach().abs().flatten(0, -2).amax(0)
            found[name] = torch.maximum(found[name], seen) if name in found else seen

        return hook

    layers = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in layers]
    model.eval()
    try:
        for batch in tqdm(stages.batches(finished, rows, 1), total=len(rows), desc="Calibrating", unit="row"):
            stages.outputs(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _by_library(finished: Finished, method: str) -> tuple[Any, str]:
    section = LIBRARIES[method]
    if "torchao" in section and importlib.util.find_spec("torchao") is None:
        raise UserError("quantize: torchao is not installed; pip install 'transformer-zoo[torchao]'")
    if "torchao" in section and has_variant(finished.model):
        raise UserError("quantize: torchao-int8 is of official classes, and this model has attention or blocks of ours")
    implementation = "native" if has_variant(finished.model) else "official"
    opened = finished.recipe.model.model_copy(
        update={
            "path": str(finished.directory.resolve()), "implementation": implementation, "config": {},
            "added_tokens": [], **dict.fromkeys(("size", "tokenizer", "revision", "block")),
        }
    )  # fmt: skip
    task = finished.task
    model = load_model(opened, task.auto_class, finished.labels, task.problem_type, quantize=section)
    return model, implementation


def _check_reopened(model: Any, batch: dict[str, Any]) -> None:
    """Raises RunError unless the model computes the same when it is saved and opened."""
    with tempfile.TemporaryDirectory() as scratch:
        with writing(Path(scratch), "try again; TMPDIR names another place"):
            model.save_pretrained(scratch)
        again = type(model).from_pretrained(scratch, dtype=torch.float32).eval()
        fence(again)
        if isinstance(again, ZooPreTrainedModel):
            again.set_ragged(model._ragged)
        ours, theirs = stages.outputs(model, batch), stages.outputs(again, batch)
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5):
        raise RunError("quantize: opened again, the model computes something else; please report this")


def _speed(models: dict[str, Any], batches: list[dict[str, Any]], writes: bool) -> dict[str, Any]:
    """Tokens a second, one text at a time, of what writes; samples a second of the rest."""
    turn = _write if writes else _read
    turns: list[dict[str, float]] = []
    with tqdm(total=ROUNDS + 1, desc="Measuring", unit="round") as bar:
        for number in range(ROUNDS + 1):
            names = list(models) if number % 2 else list(models)[::-1]
            rates = {name: turn(models[name], batches) for name in names}
            # the first is a warm-up
            turns += [rates] if number else []
            bar.update()
    medians = {name: statistics.median(one[name] for one in turns) for name in models}
    ratio = statistics.median(one["after"] / one["before"] for one in turns)
    return {**medians, "ratio": ratio, "unit": "tokens" if writes else "samples"}


def _read(model: Any, batches: list[dict[str, Any]]) -> float:
    start = time.perf_counter()
    for batch in batches:
        stages.outputs(model, batch)
    return sum(len(next(iter(batch.values()))) for batch in batches) / (time.perf_counter() - start)


def _write(model: Any, batches: list[dict[str, Any]]) -> float:
    positions = getattr(model.config, "n_positions", None) or 512
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
    )  # fmt: skip
    prompt = batches[0]["input_ids"][:, : max(1, min(64, positions - NEW_TOKENS))].to(model.device)
    start = time.perf_counter()
    with torch.no_grad():
        model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    return NEW_TOKENS / (time.perf_counter() - start)


def _bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir() if file.suffix in WEIGHT_BYTES)


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["| | before | after |", "|---|---|---|"]
    for name in report["after"]:
        if name not in ("bytes", "per_second"):
            cells = [report[side].get(name) for side in ("before", "after")]
            lines.append(f"| {name} | " + " | ".join("" if x is None else f"{x:.4f}" for x in cells) + " |")
    size = [report[side]["bytes"] / 2**20 for side in ("before", "after")]
    rate = [report[side]["per_second"] for side in ("before", "after")]
    lines.append(f"| weights, MiB | {size[0]:.1f} | {size[1]:.1f} |")
    lines.append(f"| {report['unit']} a second | {rate[0]:.1f} | {rate[1]:.1f} (**{report['ratio']:.2f}x**) |")
    return "\n".join(lines)
