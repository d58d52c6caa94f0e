"""The bench compares like with like: the same rows, the same start, the same mathematics."""

import pytest
import torch

import zoo.bench.training
from tests.conftest import read_r8, write_csv
from zoo.bench.settings import Setting, of_recipe
from zoo.bench.training import SIDES, Subject, _start, _trainer, profile, profile_table, run, table
from zoo.errors import UserError
from zoo.recipe import Recipe


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
    monkeypatch.setattr(zoo.bench.training, "matrix_product_rate", lambda: 1e11)
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
