"""The wheel holds what a user needs and nothing else, and works away from the checkout."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    copy = tmp_path_factory.mktemp("source") / "project"
    ignored = shutil.ignore_patterns(".*", "runs", "dist", "__pycache__")
    shutil.copytree(REPO, copy, ignore=ignored)
    shutil.copy(REPO / ".gitignore", copy)
    (copy / "README.md").touch()
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (copy / "dist").iterdir()
    return built


def test_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (scripts,) = (name for name in names if name.endswith("entry_points.txt"))
        assert archive.read(scripts).decode().split() == ["[console_scripts]", "zoo", "=", "cli:app"]
    recipes = {f"zoo/_recipes/{file.relative_to(REPO / 'recipes')}" for file in (REPO / "recipes").rglob("*.yaml")}
    code = {str(file.relative_to(REPO)) for file in (REPO / "zoo").rglob("*.py")}
    info = {name for name in names if ".dist-info/" in name}
    assert "zoo/_recipes/bert/finetune-topics.yaml" in recipes
    assert names - info == {"cli.py", "zoo/sizes.json"} | recipes | code
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_it_works_away_from_the_checkout(wheel, tmp_path):
    target, clean = tmp_path / "target", tmp_path / "clean"
    clean.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(target)}
    code = """
import sys, zoo, zoo.recipe_loading, cli
print(zoo.__file__, cli.__file__, zoo.recipe_loading.shipped_recipes()["bert/finetune-topics"], file=sys.stderr)
sys.argv = ["zoo", "train", "bert/finetune-topics", "--smoke", "--json", "data.limit=24", "train.max_steps=2"]
cli.app()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=clean, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    where = [Path(name) for name in done.stderr.splitlines()[0].split()]
    recipe = target / "zoo" / "_recipes" / "bert" / "finetune-topics.yaml"
    assert where == [target / "zoo" / "__init__.py", target / "cli.py", recipe]
    answer = json.loads(done.stdout)
    assert answer["directory"] == "runs/bert-finetune-topics-smoke" and 0 <= answer["test_accuracy"] <= 1
    assert (clean / "runs" / "bert-finetune-topics-smoke" / "model.safetensors").exists()
