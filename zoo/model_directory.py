"""What a finished run leaves: how its directory is written so that it is whole or not there, and opened again."""

import contextlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zoo import adapters
from zoo.adapter_types import DEFAULT_TYPE
from zoo.checkpoints import writing
from zoo.data import load_splits
from zoo.encoding import encoded
from zoo.errors import UserError
from zoo.files import write_json, write_text
from zoo.fitting import fit_images
from zoo.loading import Processor, load_model, load_processor
from zoo.quantized import assert_kept
from zoo.recipe import Recipe
from zoo.recipe_loading import load_recipe
from zoo.tasks import Task, task_of
from zoo.tasks.base import Collate
from zoo.weights import assert_same_weights

METRICS = "metrics.json"
NEW = ".model-"
RECIPE = "recipe.yaml"
# what peft calls the one that it keeps in the directory itself
ADAPTER = "default"


@dataclass(frozen=True)
class Finished:
    """A finished run, opened: its recipe, task, model (in fp32), tokenizer or image processor, and labels' names.

    Of a run with adapters the model is a PeftModel, which several may share.
    """

    recipe: Recipe
    task: Task
    model: Any
    processor: Processor
    labels: list[str]
    directory: Path
    adapter: str = ADAPTER

    def activate(self) -> None:
        """Makes its adapter the one that the model computes with."""
        adapters.activate(self.model, self.adapter, self.directory, self.labels)


def save(
    recipe: Recipe,
    model: PreTrainedModel | PeftModel,
    processor: Processor,
    metrics: Mapping[str, Any],
    output_dir: Path,
    extras: Mapping[str, str | bytes],
    then: str = "continue with --resume",
) -> None:
    """Moves the finished files into place one by one; metrics.json, which says that the run is finished, is last.

    extras: file name -> its content: the card, predictions, plots. then: what to do once a full disk has room again.
    """
    for leftover in output_dir.glob(f"{NEW}*"):
        # of a run that was killed here; a link is somebody else's
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
    # standard attention is saved as the official class, so that any tool opens it
    official = recipe.model.implementation == "native" and not has_variant(model)
    if isinstance(processor, PreTrainedTokenizerBase):
        # what transformers' pipelines cut at, given truncation=True
        processor.model_max_length = recipe.task.max_length
    with writing(output_dir, then):
        new = Path(tempfile.mkdtemp(prefix=NEW, dir=output_dir))
        if isinstance(model, PeftModel):
            adapters.save(model, recipe.model, new)
        else:
            options: dict[str, Any] = {"official": True} if official else {}
            model.save_pretrained(new, **options)
        processor.save_pretrained(new)
        for name, content in extras.items():
            (new / name).parent.mkdir(exist_ok=True)
            if isinstance(content, bytes):
                (new / name).write_bytes(content)
            else:
                write_text(new / name, content)
        if not isinstance(model, PeftModel):
            quantised = getattr(model, "hf_quantizer", None) is not None
            assert_kept(model, new) if quantised else assert_same_weights(model, new, whole=True)
        for file in sorted(file for file in new.rglob("*") if file.is_file()):
            target = output_dir / file.relative_to(new)
            target.parent.mkdir(exist_ok=True)
            os.replace(file, target)
        shutil.rmtree(new)
        write_json(output_dir / METRICS, dict(metrics))


def has_variant(model) -> bool:
    """Whether a model has attention that the official class does not know."""
    from zoo.models.pretrained import ZooPreTrainedModel, is_standard

    model = model.get_base_model() if isinstance(model, PeftModel) else model
    return isinstance(model, ZooPreTrainedModel) and not is_standard(model.config)


def read_metrics(directory: Path) -> dict[str, Any]:
    """What `save` has written of them; null was a number that is not finite. Raises UserError."""
    file = directory / METRICS
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read: {error}; the run's result is damaged") from error
    if not isinstance(metrics, dict):
        raise UserError(f"{file}: holds no mapping; the run's result is damaged")
    for name, value in metrics.items():
        if not isinstance(value, Real | None):
            raise UserError(f"{file}: {name} is {str(value)[:60]!r}, and no number; the run's result is damaged")
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def check_finished(directory: Path) -> None:
    """Raises UserError unless zoo train has finished in `directory`."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give one that zoo train has made")
    missing = [name for name in (RECIPE, METRICS) if not (directory / name).is_file()]
    if missing:
        raise UserError(f"{directory}: not a finished run (no {' and no '.join(missing)}); finish it with --resume")
    if not (directory / "config.json").exists():
        seeds = sorted(path.name for path in directory.glob("seed-*"))
        if not seeds:
            raise UserError(f"{directory}: has no config.json; the model is damaged")
        raise UserError(f"{directory}: a run of several seeds; name one of them: {', '.join(seeds)}")


def _labels(directory: Path) -> list[str]:
    """Of the config that lies beside an adapter."""
    try:
        named = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("id2label", {})
        return [name for _, name in sorted((int(number), name) for number, name in named.items())]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{directory / 'config.json'}: cannot be read: {error}; the model is damaged") from error


def open_finished(directory: Path, overrides: Sequence[str] = (), trust_remote_code: bool = False) -> Finished:
    """Opens what `zoo train` has left. overrides: `section.key=value` on the run's recipe. Raises UserError.

    trust_remote_code: the directory's code may be run; what its own recipe says of that does not count.
    """
    check_finished(directory)
    recipe = load_recipe(str(directory / RECIPE), overrides)
    task = task_of(recipe.task)
    own: dict[str, Any] = {
        "path": str(directory.resolve()),
        "added_tokens": [],
        **dict.fromkeys(("size", "tokenizer", "revision")),
        "config": {},
        "trust_remote_code": trust_remote_code,
    }
    section = recipe.model.model_copy(update=own)
    model: Any
    if recipe.lora:
        processor = load_processor(section, task.processor)
        labels = _labels(directory)
        base = recipe.model.model_copy(update={"trust_remote_code": trust_remote_code})
        # what is said of the base was said in training; standard output is for answers
        with contextlib.redirect_stdout(sys.stderr):
            model = load_model(
                base, task.auto_class, labels, task.problem_type, processor=processor, quantize=recipe.quantize
            )
        fit_images(model, processor, recipe.task.image_size)
        adapted = adapters.open_adapter(model, base, directory, ADAPTER)
        finished = Finished(recipe, task, adapted, processor, labels, directory)
        finished.activate()
        return finished
    model = load_model(section, task.auto_class, whole=True)
    processor = load_processor(section, task.processor)
    fit_images(model, processor, recipe.task.image_size)
    labels = [name for _, name in sorted(dict(model.config.id2label or {}).items())]
    return Finished(recipe, task, model, processor, labels, directory)


def open_beside(first: Finished, directory: Path, name: str) -> Finished:
    """Another adapter of the same base in the same model, which then computes with it. Raises UserError."""
    check_finished(directory)
    recipe = load_recipe(str(directory / RECIPE))
    for one, found in ((first.directory, first.recipe), (directory, recipe)):
        if not found.lora:
            raise UserError(f"{one}: has no adapter; it is a whole model")
    of_recipes = [(one.task.type, one.model.implementation, one.quantize) for one in (first.recipe, recipe)]
    if of_recipes[0] != of_recipes[1]:
        raise UserError(
            f"{directory}: it goes with {first.directory} only if task.type, model.implementation and quantize of both "
            "recipes are the same"
        )
    methods = [one.lora.get("type", DEFAULT_TYPE) for one in (first.recipe, recipe)]
    if methods[0] != methods[1]:
        raise UserError(f"{directory}: peft puts only adapters of one method into a model, and its is {methods[1]}")
    labels = _labels(directory)
    adapters.open_adapter(first.model, recipe.model, directory, name)
    finished = Finished(recipe, first.task, first.model, first.processor, labels, directory, name)
    finished.activate()
    return finished


def tested_rows(finished: Finished) -> tuple[str, Any]:
    """What a run was tested on, or else chosen by, as its model reads it; before it, what its metrics begin with."""
    recipe, task = finished.recipe, finished.task
    seed = recipe.train.get("seed", 42)
    splits = load_splits(recipe.data, task.roles, seed, finished.labels, task.labels)
    prefix, split = ("test", splits.test) if splits.test is not None else ("eval", splits.validation)
    return prefix, encoded(split, recipe, task, finished.processor, seed)[0]


def collate_of(finished: Finished) -> Collate:
    """Rows -> a batch, as in its training."""
    task, config = finished.task, finished.model.config
    fields = {field: getattr(config, field) for field in task.config_fields}
    return task.collate(finished.processor, finished.recipe.task, **fields)


def check_free(directory: Path) -> None:
    """Raises UserError where something would be written over."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"--output-dir {directory}: there is something already; choose another")
