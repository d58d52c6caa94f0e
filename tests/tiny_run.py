"""A run of 40 steps of a tiny model, as the tests of training make it, and what they read of its directory."""

import json
import multiprocessing
from pathlib import Path

import torch
from safetensors.torch import load_file

from zoo.recipe import Recipe

STEPS, SAVE, TRAIN_ROWS = 40, 4, 72
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["zoo.train"])


def make_recipe(model: Path, data: Path, train: dict | None = None, **model_keys) -> Recipe:
    """40 steps over four epochs, dropout on, checkpoints that do not fall on the steps that are logged."""
    arguments = {
        "max_steps": STEPS, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 16, "learning_rate": 3e-3,
        "eval_strategy": "steps", "eval_steps": SAVE, "save_steps": SAVE, "save_total_limit": 2, "logging_steps": 3,
        "load_best_model_at_end": True, "metric_for_best_model": "accuracy", "disable_tqdm": True, "seed": 7,
    }  # fmt: skip
    fields = {
        "name": "tiny",
        "model": {"path": str(model), **model_keys},
        "task": {"type": "text-classification", "max_length": 32},
        "data": {"path": str(data), "files": {"train": "train.csv", "test": "test.csv"}, "validation": 0.25},
        "train": arguments | (train or {}),
    }
    return Recipe.model_validate(fields)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def without_time(values: dict) -> dict:
    timed = ("runtime", "per_second", "memory_bytes")
    return {name: value for name, value in values.items() if not name.endswith(timed)}


def events(directory: Path, *phases: str) -> list[tuple[int, dict]]:
    lines = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    return [(line["step"], without_time(line["values"])) for line in lines if line["phase"] in phases]


def checkpoints(directory: Path) -> dict[int, Path]:
    found = (directory / "checkpoints").glob("checkpoint-*")
    return {int(path.name.partition("-")[2]): path for path in found}
