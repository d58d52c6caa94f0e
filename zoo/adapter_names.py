"""`zoo adapters rename`: an adapter of the native class by the names of the official one, or back.

Which layer is which is told by the weights of the base, opened in both classes: the layers with equal weights are one.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from zoo.adapter_types import ADAPTER_TYPES, BASE, CONFIG, DEFAULT_TYPE, WEIGHTS
from zoo.errors import UserError
from zoo.files import write_json, write_text
from zoo.loading import load_model
from zoo.model_directory import METRICS, RECIPE, check_free, open_finished
from zoo.recipe_loading import load_recipe

PREFIX = "base_model.model."


def run(directory: Path, to: Literal["native", "official"], output_dir: Path) -> dict[str, Any]:
    """`layers`: how many were renamed; output_dir is then a finished run of the other class.

    Raises UserError for a directory without an adapter of layers, and for a layer that the other class has not.
    """
    check_free(output_dir)
    finished = open_finished(directory, ["quantize={}"])
    recipe, task = finished.recipe, finished.task
    kind = recipe.lora.get("type", DEFAULT_TYPE) if recipe.lora else None
    if kind is None or ADAPTER_TYPES[kind].prompts:
        raise UserError(f"{directory}: has no adapter of layers, so that there are no names to change")
    if recipe.model.implementation == to:
        raise UserError(f"{directory}: its adapter has the names of the {to} class already")
    section = recipe.model.model_copy(update={"implementation": to, "trust_remote_code": False})
    other = load_model(section, task.auto_class, finished.labels, task.problem_type)
    names = same_layers(finished.model.get_base_model(), other)
    with safe_open(directory / WEIGHTS, framework="pt") as saved:
        tensors = {key: saved.get_tensor(key) for key in saved.keys()}  # noqa: SIM118 (not a dict)
        metadata = saved.metadata()
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    kept = tuple(f"{PREFIX}{name}." for name in config.get("modules_to_save") or ())
    renamed, layers = {}, {}
    for key, tensor in tensors.items():
        layer = key.removeprefix(PREFIX).partition(".lora_")[0].partition(".ia3_")[0]
        if key.startswith(kept):
            renamed[key] = tensor  # heads have one name in both
            continue
        if layer not in names:
            raise UserError(
                f"{directory}: the {to} class has no layer of its own for {layer}; merge it (zoo adapters merge)"
            )
        layers[layer] = names[layer]
        renamed[f"{PREFIX}{names[layer]}{key.removeprefix(PREFIX + layer)}"] = tensor
    modules = dict(other.named_modules())
    config["target_modules"] = sorted(layers.values())
    if config.get("feedforward_modules"):
        config["feedforward_modules"] = sorted(
            theirs for ours, theirs in layers.items() if ours.endswith(tuple(config["feedforward_modules"]))
        )
    config["fan_in_fan_out"] = any(isinstance(modules[name], Conv1D) for name in layers.values())
    output_dir.mkdir(parents=True, exist_ok=True)
    for file in directory.iterdir():
        if (
            file.is_file()
            and not file.name.startswith(".")
            and file.name not in (METRICS, WEIGHTS, CONFIG, BASE, RECIPE)
        ):
            shutil.copyfile(file, output_dir / file.name)
    save_file(renamed, output_dir / WEIGHTS, metadata)
    write_json(output_dir / CONFIG, config)
    base = json.loads((directory / BASE).read_text(encoding="utf-8"))
    write_json(output_dir / BASE, base | {"implementation": to})
    # as it was written: here the base was opened at full width
    own = load_recipe(str(directory / RECIPE))
    model = own.model.model_copy(update={"implementation": to, "ragged": "auto"})
    write_text(output_dir / RECIPE, own.model_copy(update={"model": model}).to_yaml())
    shutil.copyfile(directory / METRICS, output_dir / METRICS)
    return {"layers": len(layers)}


def same_layers(one: nn.Module, other: nn.Module) -> dict[str, str]:
    """Names of layers of one model -> the name in the other of the layer of its kind with the same weights."""
    theirs: dict[Any, list[str]] = {}
    for name, digest in _digests(other):
        theirs.setdefault(digest, []).append(name)
    # embeddings that are shared have several names
    found = {name: theirs[digest] for name, digest in _digests(one) if digest in theirs}
    return {name: name if name in names else names[0] for name, names in found.items()}


def _digests(model: nn.Module) -> Iterator[tuple[str, tuple[bool, str]]]:
    """(name, (whether it looks up rows, a hash of its weights)); an output layer may have those of the embeddings."""
    for name, module in model.named_modules():
        layer = getattr(module, "base_layer", module)
        if isinstance(layer, nn.Linear | Conv1D | nn.Embedding):
            rows = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
            values = rows.detach().contiguous().flatten().view(torch.uint8).numpy()
            yield name, (isinstance(layer, nn.Embedding), hashlib.sha256(values.data).hexdigest())
