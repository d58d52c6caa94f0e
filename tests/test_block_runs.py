"""Whole runs of models with blocks of the recipe's own: longer texts than a table has, saved, opened, refused."""

import json

import pytest

from tests.tiny_run import SAVE, differing, make_recipe, weights
from zoo import evaluation
from zoo.errors import UserError
from zoo.recipe import Recipe
from zoo.recipe_loading import load_recipe
from zoo.sections import BlockSection
from zoo.train import run

BLOCK = {
    "norm": "rmsnorm", "norm_place": "pre", "feed_forward": "swiglu", "positions": "rotary", "num_key_value_heads": 2,
    "qk_norm": True,
}  # fmt: skip


def from_nothing(tiny_bert, r8, block, **config) -> Recipe:
    recipe = make_recipe(tiny_bert, r8, {"max_steps": 2 * SAVE}).model_dump(exclude_unset=True)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    recipe["model"] = {"config": {"model_type": "bert", **sizes, **config}, "tokenizer": str(tiny_bert), "block": block}
    return Recipe.model_validate(recipe)


def test_a_run_with_a_block_of_its_own_is_evaluated_and_resumed(tiny_bert, r8, tmp_path):
    # 32 tokens a text, which rotary positions reach and 16 learned ones do not
    recipe = from_nothing(tiny_bert, r8, BLOCK, max_position_embeddings=16)
    run(recipe, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["model_type"], config["block"]) == ("zoo_bert", BLOCK)
    said = json.loads((tmp_path / "run" / "metrics.json").read_text())["test_accuracy"]
    assert evaluation.run(tmp_path / "run")["test_accuracy"] == pytest.approx(said)
    # goes on from the finished model, whose blocks it keeps
    second = make_recipe(tmp_path / "run", r8, {"max_steps": SAVE, "learning_rate": 0.0})
    run(second, tmp_path / "second")
    assert differing(weights(tmp_path / "run"), weights(tmp_path / "second")) == []


def test_learned_positions_have_an_end(tiny_bert, r8, tmp_path):
    recipe = from_nothing(tiny_bert, r8, {**BLOCK, "positions": "learned"}, max_position_embeddings=16)
    with pytest.raises(UserError, match=r"task\.max_length: 32, but the model has 16 positions"):
        run(recipe, tmp_path / "run")


def test_what_a_block_cannot_be_is_said_before_training(tiny_bert, r8, tmp_path):
    with pytest.raises(UserError, match=r"block\.parallel: True: both branches read the norm of one input"):
        run(from_nothing(tiny_bert, r8, {"parallel": True}), tmp_path / "run")
    assert not any((tmp_path / "run").iterdir())


RECIPE = """\
name: x
model:
  config: {model_type: bert}
  tokenizer: {type: bert, vocab_size: 500}
  block: {norm: rmsnorm}
task: {type: fill-mask}
data: {path: d, files: {train: a.csv, test: b.csv}, columns: {text: text}}
train: {max_steps: 3}
"""
WRONG = {
    "key": ("{norm:", "{nrom:", "r.yaml:5: model.block.nrom: unknown key; did you mean norm?"),
    "value": ("rmsnorm", "rmsnrom", "r.yaml:5: model.block.norm: expected 'layernorm' or 'rmsnorm', got the string "
              "'rmsnrom'; did you mean rmsnorm?"),
    "checkpoint": ("config: {model_type: bert}\n  tokenizer: {type: bert, vocab_size: 500}", "path: p",
                   "r.yaml:4: model.block: a checkpoint keeps the blocks that its weights are of"),
    "official": ("  block", "  implementation: official\n  block", "r.yaml:6: model.block: official classes have "),
    "in config": ("bert}", "bert, block: {norm: rmsnorm}}", "r.yaml:3: model.config.block: write it as model.block"),
    "theta": ("norm: rmsnorm", "rope_theta: 0", "r.yaml:5: model.block.rope_theta: "),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_block_is_told_with_its_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old, new, message = WRONG[case]
    assert old in RECIPE
    (tmp_path / "r.yaml").write_text(RECIPE.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        load_recipe("r.yaml")
    assert message in str(caught.value)


def test_the_recipe_and_the_model_know_the_same_options():
    from typing import Literal, get_args, get_origin

    from zoo.models.spec import OPTIONS

    fields = {name: get_args(field.annotation)[0] for name, field in BlockSection.model_fields.items()}
    assert {name: get_args(own) if get_origin(own) is Literal else own for name, own in fields.items()} == OPTIONS
