"""Who may know whom, read from the imports."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
FILES = sorted((REPO / "zoo").rglob("*.py"))
OUTSIDE = {"torch", "transformers", "huggingface_hub"}  # of a model that is shipped with its code

# a module may import those of the layers before its own, and its neighbours only where NEIGHBOURS says so
LAYERS = [
    {"chats", "errors", "files", "memory", "quiet", "metrics", "report", "sizes"},
    {"service", "hub_errors", "console", "weights"},
    {"task_types", "adapter_types", "derived", "variants", "generated"},
    {"sections"},
    {"data_sections"},
    {"sources", "library_schema", "recipe_yaml", "recipe", "recipe_loading"},
    {"models", "labels", "interrupts", "images", "checkpoints", "reading", "duplicates", "samples", "finetuning"}
    | {"packed_rows"},
    {"fresh", "roles", "quantized", "fitting"},
    {"streaming"},
    {"loading", "data", "tasks"},
    {"step_loss", "distillation", "adapters"},
    {"trainer", "tokenizer", "encoding", "event_log"},
    {"model_directory", "results", "environment", "card"},
    {"run_directory", "hub"},
    {"building"},
    {
        "seeds",
        "train",
        "evaluation",
        "prediction",
        "bench",
        "catalogue",
        "size_counts",
        "doctor",
        "baselines",
        "preview",
        "transplant",
        "merging",
        "stages",
        "quantize",
        "adapter_names",
        "adapter_list",
        "adapter_commands",
        "pictures",
        "recipe_table",
    },
    {"cli"},
]
# what makes or opens a model knows its classes; everything else, the Auto classes
OPENERS = {
    "loading",
    "fresh",
    "fitting",
    "size_counts",
    "model_directory",
    "bench",
    "pictures",
    "transplant",
    "adapters",
    "quantize",
    "quantized",
}
NEIGHBOURS = {
    "library_schema": {"sources"},
    "recipe_loading": {"library_schema", "recipe_yaml", "recipe"},
    "transplant": {"train", "stages"},
    "quantize": {"stages"},
    "seeds": {"train"},
    "bench": {"size_counts"},
    "merging": {"stages"},
    "adapter_commands": {"merging", "adapter_names", "adapter_list"},
}


def module(file: Path) -> str:
    return ".".join(file.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


def imports(file: Path) -> set[str]:
    """Every module that a file imports, at the top or within a function; relative ones as they are written."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def parts(names: set[str]) -> set[str]:
    """The parts of zoo among imported names: zoo.tasks.base -> tasks."""
    return {name.split(".")[1] for name in names if name.startswith("zoo.")}


def layer(part: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if part in names)


def test_every_module_has_its_layer():
    assert {module(file).split(".")[1] for file in FILES if module(file) != "zoo"} == set().union(*LAYERS) - {"cli"}


@pytest.mark.parametrize("file", [*FILES, REPO / "cli.py"], ids=module)
def test_imports_go_down(file):
    name = module(file)
    own = name.split(".")[1] if "." in name else "cli"
    if name == "zoo":
        assert imports(file) == set()
        return
    for part in parts(imports(file)) - {own}:
        assert layer(part) < layer(own) or part in NEIGHBOURS.get(own, ()), f"{name} imports zoo.{part}"
        assert part != "models" or own in OPENERS, f"{name} imports zoo.models"


@pytest.mark.parametrize("file", [file for file in FILES if file.parent.name == "models"], ids=module)
def test_models_stand_alone(file):
    siblings = {other.stem for other in file.parent.glob("*.py")}
    for name in imports(file):
        if name.startswith("."):
            # a subpackage, or `from . import x`, fails where the code is loaded from a model's directory
            assert name[1:] in siblings or (name == "." and file.name == "__init__.py"), name
        else:
            assert name.split(".")[0] in OUTSIDE | sys.stdlib_module_names, name
            assert not (name.startswith("transformers.models.") and ".modeling_" in name), name


def test_no_circles():
    graph = {module(file): set() for file in FILES}
    for file in FILES:
        package = module(file) if file.name == "__init__.py" else module(file).rpartition(".")[0]
        for name in imports(file):
            target = f"{package}.{name[1:]}" if name.startswith(".") else name
            if target in graph and target != module(file):
                graph[module(file)].add(target)
    while graph:
        free = {name for name, needs in graph.items() if not needs & graph.keys()}
        assert free, f"a circle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in free}


@pytest.mark.parametrize(
    "code",
    [
        "import zoo",
        "import cli",
        "import zoo.recipe_loading, zoo.sources; zoo.recipe_loading.load_recipe('bert/finetune-topics')",
    ],
)
def test_what_starts_fast_brings_in_no_framework(code):
    code += "\nimport sys; print(sorted({'torch', 'transformers', 'datasets', 'numpy', 'peft'} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
