"""`zoo adapters merge`: an adapter made part of its base; `zoo adapters combine`: several made one.

To merge, the base is opened at full width, also where the adapter was trained on 8 or 4 bits: what is added to rounded
weights is rounded too.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from tqdm.auto import tqdm

from zoo import stages
from zoo.adapter_types import ADAPTER_TYPES, DEFAULT_TYPE
from zoo.errors import RunError, UserError
from zoo.model_directory import (
    ADAPTER,
    Finished,
    check_free,
    open_beside,
    open_finished,
    read_metrics,
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
    recipe = finished.recipe
    if not recipe.lora:
        raise UserError(f"{directory}: has no adapter; it is a whole model already")
    kind = recipe.lora.get("type", DEFAULT_TYPE)
    if ADAPTER_TYPES[kind].prompts:
        raise UserError(f"{directory}: {kind} changes no layer, so there is nothing to merge")
    batches = list(itertools.islice(stages.batches(finished, tested_rows(finished)[1], 1), texts))
    report: dict[str, Any] = {"texts": len(batches)}
    rounded = _outputs(finished.model, batches) if recipe.quantize else None
    whole = open_finished(directory, ["quantize={}"]).model if recipe.quantize else finished.model
    if getattr(whole.get_base_model(), "is_quantized", False):
        raise UserError(f"{directory}: its base {recipe.model.path} is quantised; train on the run that it was made of")
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
    said = (
        f"The adapter of {kind} in {directory.name} was merged: on {len(batches)} rows no output differs by more than "
        f"{report['difference']:.1e} of the largest. The results above are the adapter's."
    )
    plain = recipe.model_copy(update={"lora": {}, "quantize": {}, "finetune": FinetuneSection()})
    stages.write(finished, plain, merged, read_metrics(directory), f"## Merged\n\n{said}\n", output_dir)
    return report


def combine(
    directories: Sequence[Path],
    weights: Sequence[float],
    output_dir: Path,
    combination_type: str = "cat",
    density: float | None = None,
) -> dict[str, Any]:
    """Several LoRA adapters of one base made one, by peft's `add_weighted_adapter`, and measured on the rows that the
    first was tested on: its metrics, and `r`. output_dir is then a finished run with that adapter.

    combination_type: `cat` and `svd` are the weighted sum itself, `svd` to the largest rank among them. density: the
    share of values that the methods which prune leave. Raises UserError for adapters that have no sum.
    """
    check_free(output_dir)
    if len(directories) < 2 or len(weights) != len(directories):
        raise UserError(
            f"adapters combine: give two directories or more, and a --weight for each; not {len(directories)} and "
            f"{len(weights)}"
        )
    first = open_finished(directories[0])
    if not first.recipe.lora:
        raise UserError(f"{directories[0]}: has no adapter; it is a whole model")
    opened = [first, *(open_beside(first, other, f"adapter_{n}") for n, other in enumerate(directories[1:], 1))]
    for one in opened:
        _check_has_a_sum(one)
    model, kept = first.model, ADAPTER
    # of the config of the first, which the sum inherits: its own scales are those that it was opened with
    model.peft_config[kept].use_rslora, model.peft_config[kept].init_lora_weights = False, True
    try:
        model.add_weighted_adapter(
            [one.adapter for one in opened], list(weights), "sum", combination_type, density=density
        )
        if combination_type == "cat":
            _check_is_the_sum(model, dict(zip([one.adapter for one in opened], weights, strict=True)), "sum")
        for one in opened:
            model.delete_adapter(one.adapter)
        # by the name of what lies in the directory itself
        model.add_weighted_adapter(["sum"], [1.0], kept, "cat")
        model.delete_adapter("sum")
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise UserError(f"adapters combine: refused by peft: {' '.join(str(error).split())[:300]}") from error
    first.activate()
    config = model.peft_config[kept]
    lora = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
    recipe = first.recipe.model_copy(update={"lora": lora, "finetune": FinetuneSection()})
    metrics = stages.measured(first, model)
    parts = ", ".join(f"{weight:g} x {one.name}" for one, weight in zip(directories, weights, strict=True))
    said = f"`{combination_type}` of {parts}; the results above are its own."
    stages.write(first, recipe, model, metrics, f"## Combined\n\n{said}\n", output_dir)
    return {"r": config.r, **metrics}


def _check_has_a_sum(one: Finished) -> None:
    """Raises UserError for an adapter that is no plain product of two matrices."""
    config = one.model.peft_config[one.adapter]
    what = None
    if config.peft_type != PeftType.LORA:
        what = f"{str(config.peft_type.value).lower()} is no product of two matrices"
    elif config.use_dora:
        what = "DoRA has a length of each column besides, and lengths do not add"
    elif str(config.init_lora_weights).startswith("pissa"):
        what = "PiSSA has changed the base's weights, each for itself"
    if what is not None:
        raise UserError(f"{one.directory}: {what}; only LoRA adapters are combined")


def _check_is_the_sum(model: Any, weights: dict[str, float], summed: str) -> None:
    """Raises RunError unless the change of each layer is the weighted sum of the changes."""
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or summed not in module.lora_A:
            continue
        layer: Any = module
        parts = [weight * layer.get_delta_weight(one) for one, weight in weights.items() if one in layer.lora_A]
        off = float((layer.get_delta_weight(summed) - sum(parts)).norm() / sum(parts).norm().clamp(min=1e-12))
        if not off < 1e-4:
            raise RunError(f"adapters combine: {name} is off by {off:.2g} of the sum; please report this")


def _outputs(model: Any, batches: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Of each row."""
    model.eval()
    bar = tqdm(batches, desc="Merged" if not isinstance(model, PeftModel) else "Adapter", unit="row")
    return [stages.outputs(model, batch) for batch in bar]


def _difference(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    largest = max(float(x.abs().max()) for x in before)
    return max(float((x - y).abs().max()) for x, y in zip(before, after, strict=True)) / max(largest, 1e-12)
