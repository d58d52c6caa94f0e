"""The table of what recipes reach: which are run, in which order, and what stands in a line."""

import json

from zoo import recipe_table
from zoo.recipe_loading import shipped_recipes


def test_each_behind_the_one_that_it_goes_on_from():
    order = list(recipe_table._in_order(list(shipped_recipes())))
    assert len(order) == len(set(order)) and not any(name.endswith("pretrain-base") for name in order)
    assert {*shipped_recipes()} - {*order} == {name for name in shipped_recipes() if name.endswith("pretrain-base")}
    for first, then in (
        ("bert/pretrain-newsgroups", "bert/finetune-pretrained"),
        ("bert/pretrain-newsgroups", "bert/train-entities"),
        ("t5/pretrain-news", "t5/finetune-headlines"),
        ("gpt2/pretrain-news", "gpt2/instruct-news"),
        ("vit/pretrain-mnist", "vit/finetune-mnist"),
    ):
        assert order.index(first) < order.index(then)
    assert list(recipe_table._in_order(["t5/finetune-headlines"])) == ["t5/pretrain-news", "t5/finetune-headlines"]


def test_lines_of_what_was_not_run_stay(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    old = "| `bert/finetune-topics` | accuracy 0.9 | - | 1.0 | 1 MiB | 2020-01-01, a machine | 1 |"
    (tmp_path / "docs").mkdir()
    page = f"before\n{recipe_table.BEGIN}| recipe |\n{old}\n{recipe_table.END}after\n"
    (tmp_path / "docs" / "recipes.md").write_text(page)
    run = tmp_path / "runs" / "bert-finetune-entities"
    run.mkdir(parents=True)
    metrics = {"test_accuracy": 0.96, "test_f1": 0.5, "train_runtime": 90.0, "peak_memory_bytes": 3 * 2**20}
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "baseline.json").write_text(json.dumps({"the usual tag of each word": {"accuracy": 0.9, "f1": 0.3}}))
    hardware = {"cpu": "a processor", "machine": "x86_64", "threads": 2}
    (run / "environment.json").write_text(json.dumps({"hardware": hardware}))
    monkeypatch.setattr(recipe_table, "_in_order", lambda names: ())
    recipe_table.main()
    text = (tmp_path / "docs" / "recipes.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and old in text
    line = next(line for line in text.splitlines() if "finetune-entities" in line)
    assert "| f1 0.5000, accuracy 0.9600 | the usual tag of each word 0.3000 | 1.5 | 3 MiB | 20" in line
    assert line.endswith(", a processor | 2 |") and "2 recipes in docs/recipes.md" in capsys.readouterr().out
