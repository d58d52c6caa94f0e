"""`zoo adapters merge`: an adapter made part of its base, where both then compute the same.

The base is opened at full width, also where the adapter was trained on 8 or 4 bits: what is added to rounded weights is
rounded too.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm

from zoo.adapter_types import ADAPTER_TYPES, DEFAULT_TYPE
from zoo.card import card
from zoo.errors import RunError, UserError
from zoo.files import write_text
from zoo.model_directory import (
    RECIPE,
    Finished,
    check_free,
    collate_of,
    has_variant,
    open_finished,
    read_metrics,
    save,
    tested_rows,
)
from zoo.sections import FinetuneSection

# the largest difference of an output, over the largest output
BOUND = 1e-3


def run(directory: Path, output_dir: Path, texts: int = 64, bound: float = BOUND) -> dict[str, Any]:
    """`difference`, on the first `texts` rows that the run was tested on; where it was trained on rounded weights, also
    that from those, `difference_from_quantized`. output_dir is then a finished run without an adapter.

    Raises UserError for a directory that holds no adapter that can be merged, RunError where it would change outputs by
    more than `bound` of the largest.
    """
    check_free(output_dir)
    finished = open_finished(directory)
    recipe, task = finished.recipe, finished.task
    if not recipe.lora:
        raise UserError(f"{directory}: has no adapter; it is a whole model already")
    kind = recipe.lora.get("type", DEFAULT_TYPE)
    if ADAPTER_TYPES[kind].prompts:
        raise UserError(f"{directory}: {kind} changes no layer, so there is nothing to merge")
    batches = list(_batches(finished, texts))
    report: dict[str, Any] = {"texts": len(batches)}
    rounded = _outputs(finished.model, batches) if recipe.quantize else None
    whole = open_finished(directory, ["quantize={}"]).model if recipe.quantize else finished.model
    before = _outputs(whole, batches)
    merged = whole.merge_and_unload(safe_merge=True)
    after = _outputs(merged, batches)
    report["difference"] = _difference(before, after)
    if rounded is not None:
        report["difference_from_quantized"] = _difference(rounded, after)
    if not report["difference"] <= bound:
        raise RunError(
            f"{directory}: merged, its outputs differ by {report['difference']:.2g} of the largest, more than "
            f"{bound:g} (--bound); keep the adapter apart"
        )
    plain = recipe.model_copy(update={"lora": {}, "quantize": {}, "finetune": FinetuneSection()})
    metrics = read_metrics(directory)
    made = json.loads((directory / "environment.json").read_text(encoding="utf-8"))
    usage = task.usage(recipe.task, merged) if callable(task.usage) else task.usage
    text = card(plain, task, metrics, None, made, [], usage, has_variant(merged))
    said = (
        f"The adapter of {kind} in {directory.name} was merged: on {len(batches)} rows no output differs by more than"
    )
    said += f" {report['difference']:.1e} of the largest. The results above are the adapter's."
    extras: dict[str, str | bytes] = {"README.md": f"{text}\n## Merged\n\n{said}\n"}
    extras["environment.json"] = (directory / "environment.json").read_bytes()
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / RECIPE, plain.to_yaml())
    save(plain, merged, finished.processor, metrics, output_dir, extras)
    return report


def _batches(finished: Finished, texts: int) -> Iterator[dict[str, Any]]:
    """One row each, as the model reads it."""
    (_, rows), collate, task = tested_rows(finished), collate_of(finished), finished.task
    for number in range(min(texts, len(rows))):
        batch = {name: x for name, x in collate([rows[number]]).items() if name != "row"}
        # of several texts a row, which learn from each other
        yield {name: x.flatten(0, 1) for name, x in batch.items()} if task.learn is not None else batch


def _outputs(model: Any, batches: list[dict[str, Any]]) -> list[torch.Tensor]:
    """All numbers that a model tells of each row."""
    model.eval()
    found = []
    with torch.no_grad():
        for batch in tqdm(batches, desc="Merged" if not isinstance(model, PeftModel) else "Adapter", unit="row"):
            told = model(**batch)
            found.append(torch.cat([x.float().flatten() for x in told.values() if isinstance(x, torch.Tensor)]))
    return found


def _difference(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    largest = max(float(x.abs().max()) for x in before)
    return max(float((x - y).abs().max()) for x, y in zip(before, after, strict=True)) / max(largest, 1e-12)
