"""Every shipped recipe in its smoke form: the real model and the real data, a few rows of them."""

import json
import math

import pytest

from tests.commands import zoo
from tests.web_data import NAMES
from zoo.recipe_loading import load_recipe, shipped_recipes
from zoo.tasks import task_of

# those on the web's data sets run in test_base_recipes.py, where a hub serves them
HERE = [name for name in shipped_recipes() if not any(load_recipe(name).data.path == web for web in NAMES)]
HERE = [name for name in HERE if not load_recipe(name).data.mixture]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Runs a recipe once, after the one that it goes on from; returns its answer and what it has said."""
    folder, done = tmp_path_factory.mktemp("shipped"), {}
    directories = {f"runs/{load_recipe(name).name}": name for name in HERE}

    def run(name: str) -> tuple[dict, str]:
        if name not in done:
            recipe = load_recipe(name)
            for start in map(str, (recipe.model.path, recipe.model.tokenizer)):
                if start in directories:
                    run(directories[start])
            # a context is read in several windows; of a small share some texts must be left to compare
            rows = 8 if recipe.task.type == "question-answering" else max(24, math.ceil(2.5 / recipe.data.validation))
            where = ("--output-dir", f"runs/{recipe.name}")
            code, out, err = zoo("train", name, "--smoke", "--json", f"data.limit={rows}", *where, cwd=folder)
            assert code == 0, err
            done[name] = json.loads(out), err
        return done[name]

    return run


@pytest.mark.parametrize("name", HERE)
def test_it_runs(smoke, name):
    text, recipe = shipped_recipes()[name].read_text(), load_recipe(name)
    assert text.startswith("# ") and f"zoo train recipes/{name}.yaml" in text and "# Expected: " in text
    answer, said = smoke(name)
    split = "test" if any(key.startswith("test_") for key in answer) else "eval"
    # of words it begins near ln 30,522, of two answers a batch has near ln 2
    assert 0 < answer[f"{split}_loss"] < 12
    for metric in task_of(recipe.task).metric_names:
        assert math.isfinite(answer[f"{split}_{metric}"])
    assert "4/4 [" in said, "a bar shows the steps"
