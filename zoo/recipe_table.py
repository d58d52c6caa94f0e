"""`make recipes`: runs the shipped recipes whole, and writes what they reach into docs/recipes.md.

A run that is finished is not made again, so that it goes on where it was stopped; a recipe that has not been run keeps
the line it has. Recipes on the web's data sets are left out: they name a hub and take days; so is ListOps at its
published settings, unless it is asked for.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

from zoo.files import write_text
from zoo.recipe import Recipe
from zoo.recipe_loading import load_recipe, shipped_recipes
from zoo.sources import resolve
from zoo.tasks import task_of

PAGE = Path("docs/recipes.md")
# where these are not the first two metrics of a task
SHOWN = {"token-classification": ("f1", "accuracy"), "question-answering": ("f1", "exact_match")}
LONG = ("bert/train-listops-lra",)
BEGIN, END = "<!-- made by make recipes -->\n", "<!-- end -->\n"
HEAD = ("recipe", "test", "beside it", "minutes", "peak memory", "on", "threads")


def main(names: Sequence[str] = ()) -> None:
    """Runs what is asked for, or all, each after the one that it goes on from; the table has all that are finished."""
    for name in _in_order(names or [name for name in shipped_recipes() if name not in LONG]):
        print(f"== {name}", flush=True)
        _zoo("train", name, "--resume", "--output-dir", str(_directory(name)))
        if not (_directory(name) / "baseline.json").exists():
            said = _zoo("baseline", name, "--json", check=False)
            if said:
                write_text(_directory(name) / "baseline.json", said)
    page = PAGE.read_text(encoding="utf-8")
    before, table, after = page.partition(BEGIN)[0], page.partition(BEGIN)[2].partition(END)[0], page.partition(END)[2]
    lines = {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `")}
    lines |= {name: _line(_row(name)) for name in shipped_recipes() if (_directory(name) / "metrics.json").exists()}
    kept = [lines[name] for name in shipped_recipes() if name in lines]
    write_text(PAGE, before + BEGIN + "\n".join([_line(HEAD), _line(["---"] * len(HEAD)), *kept]) + "\n" + END + after)
    print(f"{len(kept)} recipes in {PAGE}")


def _zoo(*arguments: str, check: bool = True) -> str:
    done = subprocess.run([sys.executable, "-m", "cli", *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if check and done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout if done.returncode == 0 else ""


def _directory(name: str) -> Path:
    return Path("runs") / load_recipe(name).name


def _in_order(names: Sequence[str]) -> Iterator[str]:
    """Each once, behind the recipe whose run it begins with."""
    directories, done = {str(_directory(name)): name for name in shipped_recipes()}, set()

    def needed(name: str) -> Iterator[str]:
        model = load_recipe(name).model
        for start in (model.path, model.tokenizer):
            if isinstance(start, str) and start in directories:
                yield from needed(directories[start])
        if name not in done:
            done.add(name)
            yield name

    for name in names:
        if not _of_the_web(load_recipe(name)):
            yield from needed(name)


def _of_the_web(recipe: Recipe) -> bool:
    paths = [part.path for part in recipe.data.parts if "://" not in part.path]
    return any(resolve(path, kind="dataset").kind == "hub" for path in paths)


def _row(name: str) -> list[str]:
    metrics = json.loads((_directory(name) / "metrics.json").read_text(encoding="utf-8"))
    task = task_of(load_recipe(name).task)
    measured = SHOWN.get(task.name, task.metric_names[:2])
    split = "test" if f"test_{measured[0]}" in metrics else "eval"
    reached = ", ".join(f"{metric} {metrics[f'{split}_{metric}']:.4f}" for metric in measured)
    file, beside = _directory(name) / "baseline.json", []
    for method, values in (json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}).items():
        beside.append(f"{method} {values.get(measured[0], next(iter(values.values()))):.4f}")
    minutes, memory = metrics["train_runtime"] / 60, metrics["peak_memory_bytes"] / 2**20
    made = json.loads((_directory(name) / "environment.json").read_text(encoding="utf-8"))["hardware"]
    on = date.fromtimestamp((_directory(name) / "metrics.json").stat().st_mtime)
    where = [f"{on}, {made['cpu'] or made['machine']}", str(made["threads"])]
    return [f"`{name}`", reached, "; ".join(beside) or "-", f"{minutes:.1f}", f"{memory:,.0f} MiB", *where]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(sys.argv[1:])
