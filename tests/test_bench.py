"""The bench compares like with like: the same rows, the same start, the same mathematics."""

from dataclasses import replace

import pytest
import torch

import zoo.bench.training
from tests.conftest import read_r8, write_csv
from zoo.bench import generation, settings
from zoo.bench.settings import Setting, of_recipe
from zoo.bench.training import SIDES, Subject, _start, _trainer, profile, profile_table, run, table
from zoo.errors import UserError
from zoo.fresh import fresh_config, recipe_config
from zoo.models import ZooGPT2LMHeadModel
from zoo.recipe import Recipe
from zoo.recipe_loading import load_recipe
from zoo.tasks import TASKS


@pytest.fixture(scope="module")
def recipe(tiny_bert, r8) -> Recipe:
    fields = {
        "name": "tiny",
        "model": {"path": str(tiny_bert)},
        "task": {"type": "text-classification", "max_length": 48},
        "data": {"path": str(r8), "files": {"train": "train.csv", "test": "test.csv"}},
        "train": {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 16, "learning_rate": 1e-3},
    }
    return Recipe.model_validate(fields)


def test_a_whole_bench(recipe, monkeypatch):
    monkeypatch.setattr(zoo.bench.training, "matrix_product_rate", lambda dtype: 1e11)
    result = run(of_recipe(recipe), [32], rounds=1, steps=2)
    (entry,) = result["results"]
    assert (result["recipe"], result["rounds"], entry["max_length"]) == ("tiny", 1, 32)
    assert result["environment"]["torch"] == torch.__version__.partition("+")[0] or result["environment"]["torch"]
    assert entry["loss_difference_without_dropout"] <= 1e-4
    assert all(64 << 20 < size < 8 << 30 for size in entry["peak_memory_bytes"].values())
    lines = table(result)
    assert list(entry["kinds"]) == ["shuffled", "grouped by length", "evaluation"]
    for kind, summary in entry["kinds"].items():
        speeds = {side: summary[side]["samples_per_second"] for side in SIDES}
        assert summary["ratio"] == pytest.approx(speeds["native"] / speeds["official"])
        assert summary["ratio_range"] == [summary["ratio"]] * 2, "of one round"
        # what both sides have computed is the same: their fractions are as their speeds
        fractions = {side: summary[side]["fraction_of_matrix_products"] for side in SIDES}
        assert fractions["native"] / fractions["official"] == pytest.approx(summary["ratio"])
        row = next(line for line in lines.splitlines() if line.startswith(f"| 32 | {kind} |"))
        for figure in (f"{speeds['native']:.1f}", f"{speeds['official']:.1f}", f"**{summary['ratio']:.2f}**"):
            assert f" {figure} " in row
        assert f"{fractions['native']:.2f} / {fractions['official']:.2f}" in row and "100 GFLOP/s" in row
    for side in SIDES:
        assert f"{side} {entry['peak_memory_bytes'][side] / 2**20:,.0f} MiB" in lines
    assert f"{entry['loss_difference_without_dropout']:.1e}" in lines and "median of 1 rounds" in lines


def test_a_profile_says_where_the_time_goes(recipe):
    (entry,) = profile(of_recipe(recipe), [32], steps=2)
    shares = entry["shares"]
    assert entry["max_length"] == 32 and entry["milliseconds_per_step"] > 0
    assert 0.5 < sum(shares.values()) <= 1 and list(shares.values()) == sorted(shares.values(), reverse=True)
    # the products of attention over packed rows
    assert any("bmm" in name for name in shares)
    with_all = profile_table([entry]).splitlines()
    assert with_all[0].startswith("32 tokens, ")
    assert [line.split(" | ")[0].removeprefix("| ") for line in with_all[4:] if line] == list(shares)


def test_both_sides_start_equal_and_see_the_same_rows(recipe, tmp_path):
    start = _start(recipe, str(tmp_path))
    subject = Subject(Setting(start))
    heads, orders, rows, lengths = {}, {}, {}, {}
    for grouped in (False, True):
        for side in SIDES:
            with _trainer(subject, side, 1, 3, grouped=grouped) as trainer:
                heads[side] = trainer.model.classifier.weight.detach().clone()
                first = next(iter(trainer.get_train_dataloader()))
                lengths[side] = first["attention_mask"].sum(-1).tolist()
                trainer.train()
                orders[side], rows[side] = trainer.seen_rows, sum(map(len, trainer.seen_rows))
        assert orders["native"] == orders["official"] and rows["native"] == 4 * 8
        assert lengths["native"] == lengths["official"]
        assert torch.equal(heads["native"], heads["official"]) and heads["native"].std() > 0.01


def test_what_is_refused(recipe, tiny_bert):
    def refused(recipe, length=32, **model) -> str:
        with pytest.raises(UserError) as caught:
            run(of_recipe(recipe.model_copy(update={"model": recipe.model.model_copy(update=model)})), [length], 1, 2)
        return str(caught.value)

    assert "model.implementation must be native" in refused(recipe, implementation="official")
    assert "a variant has no official class" in refused(recipe, attention="local")
    assert "task.max_length: 65, but the model has 64 positions" in refused(recipe, length=65)


def test_few_rows_are_enough(recipe, tmp_path):
    write_csv(tmp_path / "train.csv", read_r8("train", 18))
    data = recipe.data.model_copy(update={"path": str(tmp_path / "train.csv"), "files": {}})
    few = recipe.model_copy(update={"data": data})
    subject = Subject(Setting(_start(few, str(tmp_path / "start"))))
    with _trainer(subject, "native", 0, 2):
        pass
    assert zoo.bench.training._turn(subject, "native", "evaluation", 0, 2)["samples_per_second"] > 0


# By name


@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "distilbert", "gpt2", "t5"])
def test_settings_of_each_family(family):
    """In six layers of width 384, on the data and the objective that they name."""
    tuned, trained = settings.finetuning(family, ["train.seed=7"]), settings.pretraining(family)
    assert tuned.recipe.task.type == "text-classification" and tuned.recipe.train["seed"] == 7
    expected = {"gpt2": "text-generation", "t5": "summarization"}.get(family, "fill-mask")
    assert trained.recipe.task.type == expected and trained.full_rows == (family == "gpt2")
    for recipe in (tuned.recipe, trained.recipe):
        config = recipe_config(recipe.model, recipe.model.config, None)
        assert config.model_type == f"zoo_{family}" and (config.num_hidden_layers, config.hidden_size) == (6, 384)


def test_a_bench_of_full_rows_and_of_images(tiny_bert, r8, monkeypatch):
    monkeypatch.setattr(zoo.bench.training, "matrix_product_rate", lambda dtype: 1e11)
    # two processes take long; `test_a_whole_bench` has them
    monkeypatch.setattr(zoo.bench.training, "_in_own_process", lambda function, *arguments: function(*arguments))
    fields = {
        "name": "gpt",
        "model": {"config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
                  "tokenizer": str(tiny_bert)},
        "task": {"type": "text-generation", "max_length": 64},
        "data": {"path": str(r8), "files": {"train": "train.csv"}},
        "train": {"per_device_train_batch_size": 2},
    }  # fmt: skip
    setting = Setting(Recipe.model_validate(fields), ("shuffled",), full_rows=True, probe_steps=2)
    (entry,) = run(setting, [], rounds=1, steps=2)["results"]
    assert entry["max_length"] == 64 and entry["loss_difference_without_dropout"] < 1e-4
    digits = load_recipe("vit/train-digits", ["model.config.num_hidden_layers=1", "data.limit=400"])
    result = run(replace(of_recipe(digits), probe_steps=2), [], rounds=1, steps=2)
    (entry,) = result["results"]
    assert list(entry["kinds"]) == ["shuffled", "evaluation"] and "| images | shuffled |" in table(result)


def test_what_a_row_costs(tiny_bert, r8):
    """GPT-2's published count of training operations, by the reference: 6 N + 12 L d s a token."""
    config = fresh_config("gpt2")
    subject = Subject.__new__(Subject)
    subject.lengths, subject.targets, subject.task = [1024], None, TASKS["text-generation"][0]
    with torch.device("meta"):
        model = ZooGPT2LMHeadModel(config)
    weights = 12 * 12 * 768 * 768 + 50257 * 768
    per_token = 2 * weights + 4 * 12 * 768 * 1024
    assert subject.operations(0, model) == 1024 * per_token


def test_generation_is_timed_beside_its_floor(monkeypatch):
    monkeypatch.setitem(generation.SHAPES, "gpt2", {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 99})
    monkeypatch.setitem(generation.SHAPES, "t5", {"num_layers": 2, "d_model": 32, "num_heads": 4, "vocab_size": 99})
    monkeypatch.setattr(
        generation, "CASES", {name: [generation.Case(name.upper(), (3, 5, 9))] for name in ("gpt2", "t5")}
    )
    for family in ("gpt2", "t5"):
        result = generation.run(family, rounds=1, new_tokens=4)
        (entry,) = result["results"]
        times = entry["milliseconds_a_step"]
        assert (
            entry["ratio"] == pytest.approx(times["official"] / times["native"])
            and 0 < times["floor"] < times["native"]
        )
        assert "3 prompts of 3 to 9 tokens" in generation.table(result)
    with pytest.raises(UserError, match="--family bert: generates nothing"):
        generation.run("bert", 1, 4)
