"""Recipes of base models on the web's data sets, as they are, with a hub's address alone."""

import json

import pytest
from safetensors.torch import load_file

from tests.hub_server import TOKEN

# in one process, since to start one takes as long as to train
RUN = """
import json, sys
from pathlib import Path
from zoo.quiet import quiet_libraries
quiet_libraries()
from zoo.recipe_loading import load_recipe
from zoo.train import run
few = ["data.limit=8"]  # articles are many pieces each
print(json.dumps({name: run(load_recipe(name, few).smoke(), Path(name)) for name in json.loads(sys.argv[1])}))
"""
RECIPES = ("bert/pretrain-base", "roberta/pretrain-base", "gpt2/pretrain-base", "t5/pretrain-base", "vit/pretrain-base")
MEASURED = {
    "bert/pretrain-base": "eval_next_sentence_accuracy",
    "roberta/pretrain-base": "eval_perplexity",
    "gpt2/pretrain-base": "eval_token_loss",
    "t5/pretrain-base": "eval_perplexity",
    "vit/pretrain-base": "test_accuracy",
}


@pytest.fixture(scope="module")
def runs(web, tmp_path_factory):

    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("base")
    environment = web.environment(folder / "cache", TOKEN) | {"TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", RUN, json.dumps(RECIPES)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


@pytest.mark.parametrize("name", RECIPES)
def test_a_base_recipe_runs_on_a_hub_of_ones_own(runs, name):
    folder, said = runs
    metrics = json.loads(said.splitlines()[-1])[name]
    assert metrics["train_loss"] > 0 and MEASURED[name] in metrics
    made = json.loads((folder / name / "environment.json").read_text())
    sources = made["data"].get("mixture", [made["data"]])
    assert all(len(source["commit"]) == 40 for source in sources), "which data it was"
    weights = load_file(folder / name / "model.safetensors")
    width = {tensor.shape[-1] for tensor in weights.values() if tensor.ndim == 2}
    assert 768 in width, "the published width"
    assert "a stream of" in said


def test_images_are_told_apart_by_the_labels_of_the_card(runs):
    folder, _ = runs
    config = json.loads((folder / "vit/pretrain-base" / "config.json").read_text())
    assert list(config["id2label"].values()) == ["palace", "daisy"] and config["image_size"] == 224
