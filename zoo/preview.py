"""`zoo preview`: what a model really sees of a recipe's first rows, token by token, with what it learns."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.text import Text

from zoo.building import training_arguments
from zoo.data import load_splits
from zoo.errors import UserError
from zoo.fitting import fit_images
from zoo.loading import load_model
from zoo.recipe import Recipe
from zoo.samples import WithDraws
from zoo.streaming import Unread
from zoo.tasks import COUNTED, Task, task_of
from zoo.tasks.base import IGNORED
from zoo.tokenizer import processor_for

OTHERS = 8  # rows that are read besides, for tasks that want another text
MASKED = "bool_masked_pos"


def run(recipe: Recipe, split: str = "train", rows: int = 3) -> list[dict[str, Any]]:
    """The samples that the first rows of a split become, as their batch holds them.

    Each has `row` and, where there are tokens, `tokens` with `labels` beside them: None where nothing is learned; what
    a decoder learns is `targets`. Numbers stand under the batch's own names, and of pixels their shape.
    Raises UserError for a split that there is not.
    """
    task, seed = task_of(recipe.task), training_arguments(recipe, Path()).seed
    splits = load_splits(recipe.data, task.roles, seed, kind=task.labels)
    for note in splits.notes:
        print(note)
    processor = processor_for(recipe.model, task.processor, splits)
    task.prepare(processor)
    asked = getattr(splits, split)
    if asked is None:
        raise UserError(f"--split {split}: the data has no such split")
    fields: dict[str, Any] = {}
    if task.processor == "image_processor":
        model = load_model(recipe.model, task.auto_class, splits.labels, task.problem_type, processor=processor)
        fit_images(model, processor, recipe.task.image_size)
        task.check(recipe.task, model)
        fields = {field: getattr(model.config, field) for field in task.config_fields}
    wanted = rows + (OTHERS if task.others else 0)
    first = asked.first(wanted) if isinstance(asked, Unread) else asked.select(range(min(wanted, len(asked))))
    collate = task.collate(processor, recipe.task, **fields)
    shown = set(first["row"][:rows])
    found = (sample for sample in _samples(first, task, recipe, processor, seed, split) if sample["row"] in shown)
    return [_seen(sample["row"], collate([sample]), task, processor, splits.labels) for sample in found]


def _samples(rows: Dataset, task: Task, recipe: Recipe, processor: Any, seed: int, split: str) -> Iterator[dict]:
    columns = task.encode(processor, recipe.task)(rows.to_dict())
    kept = {name: values for name, values in columns.items() if name not in COUNTED}
    images = rows.rename_column("label", "labels") if "label" in rows.column_names else rows
    samples = Dataset.from_dict(kept) if kept else images
    drawn = task.draws == "all" or (task.draws is not None and split == "train")
    yield from WithDraws(samples, seed, task.others) if drawn else samples  # type: ignore[misc]


def _seen(row: int, batch: dict[str, Any], task: Task, processor: Any, names: list[str]) -> dict[str, Any]:
    seen: dict[str, Any] = {"row": row}
    # numbers of whole texts are nothing to see
    hidden = ("row", "attention_mask", "token_type_ids", *(("labels",) if task.learn is not None else ()))
    for name, values in batch.items():
        if not isinstance(values, torch.Tensor) or name in hidden:
            continue
        if name == MASKED:
            seen["masked"] = values[0].int().tolist()
        elif name == "pixel_values":
            seen["pixels"] = list(values.shape[1:])
        elif name == "input_ids":
            seen["tokens"] = _tokens(values, processor)
        elif name == "labels" and "input_ids" in batch and batch["input_ids"].ndim > 2:
            # behind the right choice stands how many there are
            seen["label"] = int(values[0, 0])
        elif name == "labels" and values.ndim > 1 and "input_ids" in batch:
            same = values.shape == batch["input_ids"].shape
            if values.is_floating_point():
                seen["label"] = [label for label, one in zip(names, values[0], strict=True) if one > 0.5]
            elif names:
                seen["labels"] = [None if one == IGNORED else names[one] for one in values[0].tolist()]
            else:
                seen["labels" if same else "targets"] = _tokens(values, processor)
        elif name == "labels" and names and not values.is_floating_point():
            seen["label"] = names[int(values[0])]
        else:
            seen["label" if name == "labels" else name] = values[0].tolist()
    return seen


def _tokens(ids: torch.Tensor, tokenizer: Any) -> list:
    """Of one row; None for what is not learned. Of several rows, which are one sample, a list each."""
    if ids.ndim > 2:
        return [_tokens(one, tokenizer) for one in ids[0].unsqueeze(1)]
    found = [[None if one == IGNORED else tokenizer.convert_ids_to_tokens(one) for one in row] for row in ids.tolist()]
    return found[0] if len(found) == 1 else found


def in_colour(sample: dict[str, Any]) -> Text:
    """For a terminal: what is learned is green, what it was hidden behind red, and what is only read dim."""
    text = Text().append(f"row {sample['row']}\n", style="bold")
    for name, value in sample.items():
        if name == "tokens" and value and isinstance(value[0], list):
            for one in value:
                text.append_text(_line(one, None)).append("\n")
        elif name == "tokens":
            text.append_text(_line(value, sample.get("labels"))).append("\n")
        elif name == "targets":
            text.append("learned: ", style="dim").append_text(_line(value, value)).append("\n")
        elif name == "masked":
            text.append("".join("#" if one else "." for one in value), style="red").append("\n")
        elif name not in ("row", "labels"):
            text.append(f"{name}: ", style="dim").append(f"{value}\n", style="green")
    return text


def _line(tokens: list[str | None], labels: list[str | None] | None) -> Text:
    line = Text()
    for token, label in zip(tokens, labels or [None] * len(tokens), strict=True):
        if label is None:
            line.append(f"{token} ", style="dim" if labels else "")
        elif label == token:
            line.append(f"{token} ", style="green")
        else:
            line.append(f"{token}", style="red").append(f"={label} ", style="green")
    return line
