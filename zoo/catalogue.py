"""What there is, by name: recipes, models, attention variants, tasks.

Read from the project's own source as text: nothing that imports torch is imported, so that listing is instant.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from zoo.errors import UserError, did_you_mean
from zoo.files import write_text
from zoo.recipe_loading import shipped_recipes
from zoo.sizes import SIZES
from zoo.task_types import TASK_TYPES
from zoo.variants import variants

_PACKAGE = Path(__file__).parent
_MODELS = _PACKAGE / "models"


def recipes() -> Iterator[dict[str, Any]]:
    """Shipped recipes; the comment that opens each is its summary."""
    for name, file in shipped_recipes().items():
        lines = file.read_text(encoding="utf-8").splitlines()
        yield {"name": name, "summary": lines[0].removeprefix("# "), "file": str(file)}


def models() -> Iterator[dict[str, Any]]:
    """Native families: the class that each Auto class opens, the tasks that recipes train them on, published sizes."""
    families = _assigned(_parsed(_MODELS / "__init__.py"), "FAMILIES")
    assert isinstance(families, ast.Dict)
    heads = _heads_of_tasks()
    counts = json.loads((_PACKAGE / "sizes.json").read_text(encoding="utf-8"))
    for name in map(ast.literal_eval, filter(None, families.keys)):
        text = (_MODELS / f"modeling_{name}.py").read_text(encoding="utf-8")
        summary = text.removeprefix('"""').partition("\n")[0].removesuffix('"""')
        classes = {auto: path.rpartition(".")[2] for auto, path in _auto_map(text).items()}
        yield {
            "name": name,
            "summary": summary,
            "model_type": f"zoo_{name}",
            "classes": classes,
            "tasks": [task for task in TASK_TYPES if heads[task][0] in classes and heads[task][1] in text],
            "sizes": [{"name": size, **counts[size]} for size, (family, _) in SIZES.items() if family == name],
        }


def attentions() -> Iterator[dict[str, Any]]:
    """Values of `model.attention`, with their parameters in `model.attention_kwargs`."""
    for name, variant in variants().items():
        yield {"name": name, "summary": variant.summary, "parameters": list(variant.parameters)}


def tasks() -> Iterator[dict[str, Any]]:
    """Values of `task.type`, with the columns and the keys of `task` that each reads."""
    for name, task in TASK_TYPES.items():
        yield {"name": name, "summary": task.summary, "columns": list(task.roles), "keys": list(task.keys)}


KINDS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "recipes": recipes,
    "models": models,
    "attentions": attentions,
    "tasks": tasks,
}


def listed(kind: str | None = None) -> list[dict[str, Any]]:
    """The entries of one kind, or of all; each has `kind`, `name` and `summary`."""
    if kind is not None and kind not in KINDS:
        raise UserError(f"ls {kind}: there are {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
    return [{"kind": name, **entry} for name in ([kind] if kind else KINDS) for entry in KINDS[name]()]


def as_text(entries: list[dict[str, Any]], details: bool) -> str:
    """A line for each entry below its kind; with `details` also the tasks and the sizes of models."""
    width = max(len(entry["name"]) for entry in entries)
    lines = []
    for kind, group in groupby(entries, key=lambda entry: entry["kind"]):
        lines.append(kind)
        for entry in group:
            lines.append(f"  {entry['name']:<{width}}  {entry['summary']}")
            if details and kind == "models":
                lines.append(f"    tasks of recipes: {', '.join(entry['tasks']) or 'none'}")
                lines += _table(entry["sizes"])
    return "\n".join(lines)


# field of a size -> its heading, and thousands, millions and so on of it
_COLUMNS = {
    "parameters": ("parameters", ("", "K", "M", "B")),
    "flops_per_token": ("FLOPs/token", ("", "K", "M", "G", "T")),
    "train_bytes": ("to train", (" B", " kB", " MB", " GB", " TB")),
    "serve_bytes": ("to serve", (" B", " kB", " MB", " GB", " TB")),
    "cache_bytes_per_token": ("cache/token", (" B", " kB", " MB")),
}


def _table(sizes: list[dict[str, Any]]) -> list[str]:
    width = max(len(size) for size in SIZES)
    lines = [f"    {'size':<{width}}" + "".join(f"{heading:>13}" for heading, _ in _COLUMNS.values())]
    for size in sizes:
        cells = (_short(size[field], units) for field, (_, units) in _COLUMNS.items())
        lines.append(f"    {size['name']:<{width}}" + "".join(f"{cell:>13}" for cell in cells))
    return lines


def _short(value: float, units: tuple[str, ...]) -> str:
    """With one decimal, in the unit that leaves less than a thousand, or the last; nothing is a dash."""
    power = 0
    while value >= 999.95 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.1f}{units[power]}" if value else "-"


def copy_recipe(name: str, target: Path, overwrite: bool = False) -> Path:
    """Copies a shipped recipe to a file, or into a directory; returns the file. Raises UserError."""
    shipped = shipped_recipes()
    if name not in shipped:
        near = did_you_mean(name, shipped) or f"; there are {', '.join(shipped)}"
        raise UserError(f"cp {name}: no shipped recipe of that name{near}")
    file = target / shipped[name].name if target.is_dir() else target
    if file.exists() and not overwrite:
        raise UserError(f"cp: {file} exists; name another file, or add --overwrite")
    try:
        write_text(file, shipped[name].read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cp: {file} cannot be written: {error.strerror}") from error
    return file


def _heads_of_tasks() -> dict[str, tuple[str, str]]:
    """Task type -> the Auto class of its head and the label that it has besides, as each `Task` says them in a row."""
    texts = (file.read_text(encoding="utf-8") for file in sorted((_PACKAGE / "tasks").glob("*.py")))
    said = r'name="([\w-]+)",\s+auto_class="(\w+)",(?:\s+label="(\w+)",)?'
    return {name: (auto, label) for text in texts for name, auto, label in re.findall(said, text)}


def _auto_map(text: str) -> dict[str, str]:
    """Of a family's module, or of a part of it that it imports; to parse whole modules would take too long."""
    found = re.search(r"^    auto_map = (\{.*?^    \})", text, re.DOTALL | re.MULTILINE)
    if found is not None:
        return ast.literal_eval(found[1])
    parts = (_MODELS / f"{name}.py" for name in re.findall(r"^from \.(\w+) import", text, re.MULTILINE))
    texts = (part.read_text(encoding="utf-8") for part in parts)
    return next(_auto_map(text) for text in texts if "\n    auto_map = {" in text)


def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _assigned(tree: ast.Module, name: str) -> ast.expr:
    """The value given to `name`, at the top or in the body of a class."""
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            targets = [node.target]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
            return node.value
    raise KeyError(name)
