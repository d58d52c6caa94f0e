"""Several seeds: their runs, their mean and its interval, and that nothing is trained twice."""

import json
import math

import pytest
from scipy import stats

import zoo.evaluation
from tests.tiny_run import make_recipe
from zoo.errors import UserError
from zoo.recipe_loading import load_recipe
from zoo.seeds import interval, run, summary
from zoo.train import run as run_one


@pytest.fixture
def recipe(tiny_bert, r8):
    short = make_recipe(tiny_bert, r8, {"max_steps": 4})
    return short.model_copy(update={"seeds": [3, 1], "train": short.train | {"seed": 99}})


def test_each_seed_is_a_run(recipe, tmp_path, capsys):
    metrics = run(recipe, tmp_path / "run")
    alone = [json.loads((tmp_path / "run" / f"seed-{seed}" / "metrics.json").read_text()) for seed in (3, 1)]
    assert metrics["seeds"] == 2
    accuracies = [one["test_accuracy"] for one in alone]
    assert metrics["test_accuracy_mean"] == pytest.approx(sum(accuracies) / 2)
    assert metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())
    single = recipe.model_copy(update={"seeds": [], "train": recipe.train | {"seed": 1}})
    assert run_one(single, tmp_path / "alone")["test_loss"] == alone[1]["test_loss"]
    assert "seed 3, 1 of 2" in capsys.readouterr().out
    assert "test_loss" in zoo.evaluation.run(tmp_path / "run" / "seed-1")
    with pytest.raises(UserError, match="a run of several seeds; name one of them: seed-1, seed-3"):
        zoo.evaluation.run(tmp_path / "run")


def test_finished_seeds_are_not_trained_again(recipe, tmp_path):
    run(recipe, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    before = (tmp_path / "run" / "seed-3" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match="holds an unfinished run; add --resume"):
        run(recipe, tmp_path / "run")
    assert "test_loss_mean" in run(recipe, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "seed-3" / "model.safetensors").stat().st_mtime_ns == before
    assert run(recipe, tmp_path / "run", resume=True) == json.loads((tmp_path / "run" / "metrics.json").read_text())


def test_a_refused_recipe_leaves_the_directory_free(recipe, tmp_path):
    wrong = recipe.model_copy(update={"data": recipe.data.model_copy(update={"columns": {"text": "txt"}})})
    with pytest.raises(UserError, match="did you mean text"):
        run(wrong, tmp_path / "run")
    assert "test_loss_mean" in run(recipe, tmp_path / "run")


def test_the_interval_is_that_of_student():
    values = [0.9758, 0.9758, 0.9781, 0.9694, 0.9744]
    low, high = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
    found = summary([{"test_accuracy": value, "peak_memory_bytes": 1} for value in values])
    assert (found["test_accuracy_low"], found["test_accuracy_high"]) == pytest.approx((low, high))
    assert interval(values) == pytest.approx((high - low) / 2) and "peak_memory_bytes_high" not in found


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ("seeds: [1]", "seeds: one seed has no interval"),
        ("seeds: [1, 2, 1]", "seeds: a seed stands there twice"),
        ("seeds: [1, -2]", "seeds.1: expected"),
        ("seeds: [1, 2]\nhub: {repo: me/x}", "hub.repo: several seeds make several models"),
    ],
)
def test_seeds_that_make_no_sense(tmp_path, keys, says):
    (tmp_path / "r.yaml").write_text(
        f"name: x\nmodel: {{path: m}}\ntask: {{type: text-classification}}\ndata: {{path: d}}\n{keys}\n"
    )
    with pytest.raises(UserError) as caught:
        load_recipe(str(tmp_path / "r.yaml"))
    assert says in str(caught.value)


def test_what_is_not_finite_and_what_one_run_lacks():
    found = summary([{"test_a": math.nan, "test_b": 1.0}, {"test_a": 1.0}])
    assert found.keys() == {"seeds", "test_a_mean", "test_a_low", "test_a_high"}
    assert all(math.isnan(found[name]) for name in ("test_a_mean", "test_a_low", "test_a_high"))
