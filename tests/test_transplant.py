"""Another attention in a finished model: what is measured, what is healed, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch

from tests.commands import zoo
from tests.models.tiny import make_inputs, make_pair
from tests.tiny_run import differing, make_recipe, weights
from zoo import evaluation, transplant
from zoo.errors import UserError
from zoo.model_directory import open_finished
from zoo.train import run

FULL_WINDOW = {"local": {"window": 64}}


@pytest.fixture(scope="module")
def finished(tiny_bert, r8, tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished") / "run"
    run(make_recipe(tiny_bert, r8), directory)
    return directory


def test_a_window_as_long_as_the_texts_changes_nothing(finished, tmp_path):
    steps = ["train.max_steps=2", "train.eval_steps=2", "train.save_steps=2"]
    report = transplant.run(finished, "local", FULL_WINDOW, tmp_path / "to", overrides=steps, texts=5)
    assert len(report["layers"]) == 2 and all(layer["error"] < 1e-5 for layer in report["layers"])
    assert report["after_swap"]["test_accuracy"] == report["before"]["test_accuracy"]
    assert report["after_swap"]["test_loss"] == pytest.approx(report["before"]["test_loss"], rel=1e-5)


def test_errors_are_those_of_each_head(finished):
    """Each layer against softmax by hand, on the states that enter it in the old model."""
    opened = open_finished(finished)
    recipe = transplant.healing_recipe(finished, "local", {"local": {"window": 2}}, None, [])
    swapped = transplant.load_model(recipe.model, opened.task.auto_class, opened.labels, opened.task.problem_type)
    found = list(transplant.errors(opened, swapped, 6))
    (_, rows), model = transplant.tested_rows(opened), opened.model
    heads = model.config.num_attention_heads
    for number, distance in enumerate(found):
        sums, highest = torch.zeros(2, heads), torch.zeros(heads)
        for row in range(6):
            ids = torch.tensor(rows[row]["input_ids"])[None]
            with torch.no_grad():
                states = model.bert(input_ids=ids, output_hidden_states=True).hidden_states[number]
                attention = model.bert.layers[number].self_attn
                q, k, v = (
                    layer(states)[0].unflatten(-1, (heads, -1)).transpose(0, 1)
                    for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
                )
            scores = q @ k.transpose(1, 2) * attention.scaling
            places = torch.arange(ids.shape[1])
            far = (places[:, None] - places[None, :]).abs() > 2
            full, near = scores.softmax(-1) @ v, scores.masked_fill(far, float("-inf")).softmax(-1) @ v
            apart = [2 * max((x - own.mean(0)).norm() for x in own) for own in v]
            mass = (scores.softmax(-1) * far).sum(-1)
            highest += torch.stack([sum((m * d) ** 2 for m in own) for own, d in zip(mass, apart, strict=True)])
            sums += torch.stack([(near - full).square().sum((1, 2)), full.square().sum((1, 2))])
        assert distance.heads == pytest.approx((sums[0] / sums[1]).sqrt().tolist(), rel=1e-4)
        assert distance.error == pytest.approx(float((sums[0].sum() / sums[1].sum()).sqrt()), rel=1e-4)
        assert 0.01 < distance.error <= distance.bound
        assert distance.head_bounds == pytest.approx((highest / sums[1]).sqrt().tolist(), rel=1e-4)
        assert all(error <= bound for error, bound in zip(distance.heads, distance.head_bounds, strict=True))


def test_the_bound_is_reached():
    """One hidden key with all the weight but a trifle, and values at two places: nothing smaller would hold."""
    weights = torch.tensor([[[1e-4, 1 - 1e-4]]])
    values = torch.tensor([[[1.0], [-1.0]]])
    found = transplant.bound(weights, values, torch.tensor([[[True, False]]]))
    full, pattern = weights[0] @ values[0], values[0, :1]
    assert float((full - pattern).square()) == pytest.approx(float(found), rel=1e-6)


@pytest.mark.parametrize(
    ("attention", "kwargs"),
    [("linformer", {"linformer": {"rank": 6}}), (["full", "performer"], {"performer": {"features": 64}})],
)
def test_it_is_healed_saved_and_resumed(attention, kwargs, finished, tmp_path):
    report = transplant.run(finished, attention, kwargs, tmp_path / "to", overrides=["train.max_steps=24"])
    assert json.loads((tmp_path / "to" / "transplant.json").read_text()) == json.loads(json.dumps(report))
    config = json.loads((tmp_path / "to" / "config.json").read_text())
    assert (config["model_type"], config["attention"]) == ("zoo_bert", attention)
    said = evaluation.run(tmp_path / "to")
    assert said["test_loss"] == pytest.approx(report["after_healing"]["test_loss"], rel=1e-5)
    again = transplant.run(finished, attention, kwargs, tmp_path / "to", overrides=["train.max_steps=24"], resume=True)
    assert again["after_healing"]["test_loss"] == pytest.approx(report["after_healing"]["test_loss"])
    first = report["layers"][0]["error"]
    assert first < 1e-5 if attention[0] == "full" else first > 0.01
    assert [layer["bound"] for layer in report["layers"]] == [0.0 if attention[0] == "full" else None, None]
    assert report["layers"][1]["error"] > 0.001 and "| after the swap |" in transplant.table(report)
    assert differing(weights(finished), weights(finished)) == []


def test_healing_takes_another_recipes_training(finished, tmp_path):
    file = tmp_path / "heal.yaml"
    recipe = (finished / "recipe.yaml").read_text()
    file.write_text(recipe.replace("max_steps: 40", "max_steps: 6") + "\n")
    made = transplant.healing_recipe(finished, "linear", {}, str(file), ["train.learning_rate=0.5"])
    assert (made.train["max_steps"], made.train["learning_rate"]) == (6, 0.5)
    assert made.model.path == made.distill.teacher == str(finished) and made.distill.hidden == 1.0
    own = transplant.healing_recipe(finished, ["full", "linear"], {}, None, [])
    assert (own.train["num_train_epochs"], own.train["max_steps"]) == (1, -1)
    assert own.name == "tiny-full-linear"
    keys = ["distill.logits=0.0", "distill.hidden=2.0"]
    said = transplant.healing_recipe(finished, "linear", {}, None, keys).distill
    assert (said.labels, said.logits, said.hidden) == (1.0, 0.0, 2.0) and said.teacher == str(finished)
    with pytest.raises(UserError, match=r"data\.limit: healing does not read it"):
        transplant.healing_recipe(finished, "linear", {}, None, ["data.limit=3"])


def test_what_a_head_cannot_teach_is_not_asked_of_it(finished, tmp_path):
    """Nor is a trial pushed where the run was."""
    own = (finished / "recipe.yaml").read_text()
    for number, (said, logits) in enumerate((("", 1.0), ("  problem_type: regression\n", 0.0))):
        directory = tmp_path / str(number)
        directory.mkdir()
        changed = own.replace("task:\n", f"task:\n{said}").replace("hub:\n", "hub:\n  repo: me/mine\n")
        (directory / "recipe.yaml").write_text(changed)
        made = transplant.healing_recipe(directory, "linear", {}, None, ["distill.labels=0.5"])
        assert (made.distill.labels, made.distill.logits, made.distill.hidden) == (0.5, logits, 1.0)
        assert made.hub.repo is None and made.model.block is None


def test_a_layer_that_runs_again_has_the_bound_of_its_own_turn(tmp_path):
    """An ALBERT whose layers are full and local in turn: the full turns hide nothing, the others something."""
    official, model = make_pair("albert", "AlbertForSequenceClassification", tmp_path)
    swapped = type(model)(model.config.from_dict(model.config.to_dict())).eval()
    swapped.load_state_dict(model.state_dict())
    swapped.config.attention, swapped.config.attention_kwargs = ["full", "local"], {"local": {"window": 1}}
    names = [name for name, module in model.named_modules() if hasattr(module, "self_attn")]
    ids = make_inputs("albert", "AlbertForSequenceClassification", "none")["input_ids"][:1]
    with torch.no_grad(), transplant._weighing(model), transplant._padded(swapped):
        before, after, bounds = transplant._outputs(model, swapped, names, {"input_ids": ids})
    turns = official.config.num_hidden_layers * official.config.inner_group_num
    assert len(bounds) == turns and [bool(bound.any()) for bound in bounds] == [turn % 2 == 1 for turn in range(turns)]
    for (_, old), (_, new), highest in zip(before, after, bounds, strict=True):
        assert ((new - old).square().sum((0, 2)) <= highest + 1e-8).all()


def test_without_a_test_split_it_is_measured_on_the_other(finished):
    opened = open_finished(finished)
    data = opened.recipe.data.model_copy(update={"files": {"train": "train.csv"}})
    without = replace(opened, recipe=opened.recipe.model_copy(update={"data": data}))
    assert [transplant.tested_rows(one)[0] for one in (opened, without)] == ["test", "eval"]


def test_models_that_are_not_swapped(finished, tmp_path):
    opened = open_finished(finished)
    official = replace(opened, model=make_pair("bert", "BertForSequenceClassification", tmp_path / "bert")[0])
    text = replace(opened, model=make_pair("t5", "T5ForConditionalGeneration", tmp_path / "t5")[1])
    for one, says in ((official, "has an official class"), (text, "an encoder and a decoder learns from no teacher")):
        with pytest.raises(UserError, match=says):
            transplant._check(one, finished)
    block = make_pair("bert", "BertForSequenceClassification", tmp_path / "block")[1]
    block.config.block = {"positions": "rotary"}
    transplant._check(replace(opened, model=block), finished)


def test_refusals_in_words(finished, tmp_path):
    wrong = [
        (("locle", {}), "attention: no variant is called locle; did you mean local"),
        (("local", {}), "local needs model.attention_kwargs.local.window"),
        (("linformer", {"linformer": {"rank": 9999}}), "more than its length"),
    ]
    for (attention, kwargs), message in wrong:
        with pytest.raises(UserError, match=message):
            transplant.run(finished, attention, kwargs, tmp_path / "to")
    with pytest.raises(UserError, match="no such directory"):
        transplant.run(tmp_path / "nowhere", "linear", {}, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_the_command(finished, tmp_path):
    arguments = (str(finished), "--attention", "linear", "--output-dir", str(tmp_path / "to"), "--texts", "3")
    status, output, errors = zoo("transplant", *arguments, "train.max_steps=4", cwd=tmp_path)
    assert status == 0 and "| test_accuracy |" in output and "the model is in" in output, errors
    status, _, errors = zoo("transplant", str(tmp_path / "to"), "--attention", "linear", cwd=tmp_path)
    assert status == 2 and "has 'linear' attention already" in errors
    status, _, errors = zoo("transplant", str(finished), cwd=tmp_path)
    assert status == 2 and "give --attention" in errors
