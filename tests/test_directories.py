"""Model directories and data that somebody else has made, or damaged: nothing is run, guessed or overwritten."""

import json
import math
import os
import shutil
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import zoo.evaluation
import zoo.prediction
from tests.test_runs import RUNS, files, recipe, write_jsonl
from zoo.building import training_arguments
from zoo.data import load_splits
from zoo.data_sections import DataSection
from zoo.errors import RunError, UserError
from zoo.train import run

TEXT = "wheat shipments rose"


@pytest.fixture
def copy(topics_run, tmp_path) -> Path:
    return shutil.copytree(topics_run, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))


def change(directory: Path, action) -> None:
    tensors = load_file(directory / "model.safetensors")
    action(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(directory: Path, error=UserError) -> str:
    with pytest.raises(error) as caught:
        zoo.prediction.run(directory, [TEXT])
    with pytest.raises(error):
        zoo.evaluation.run(directory)
    return str(caught.value)


# A finished model is whole


@pytest.mark.parametrize("part", ["classifier", "bert.pooler"])
def test_a_head_that_is_missing_is_not_made_up(copy, part):
    change(copy, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(part)])
    assert f"weights are missing: {part}" in refused(copy)


def test_a_head_for_other_labels_is_not_made_up(copy):
    edit(copy / "config.json", id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    assert "weights are of another shape: classifier" in refused(copy)


def test_weights_that_are_no_numbers(copy):
    change(copy, lambda tensors: tensors["classifier.weight"].fill_(math.nan))
    assert "classifier.weight holds values that are not finite" in refused(copy, RunError)


def test_an_answer_that_is_no_number(copy):
    edit(copy / "config.json", layer_norm_eps=math.nan)
    with pytest.raises(RunError, match="the model's answer is not finite"):
        list(zoo.prediction.run(copy, [TEXT]))


@pytest.mark.parametrize("content", ["", "{", "[1]", '"x"', '{"peak_memory_bytes": "x"}', "[" * 100_000])
def test_metrics_that_are_damaged(topics_run, copy, content):
    (copy / "metrics.json").write_text(content)
    topics = recipe(Path("x"), RUNS["one label"][0], files(topics_run.parent, "topics"), max_steps=3)
    (copy / "recipe.yaml").write_text(topics.to_yaml())
    with pytest.raises(UserError, match=r"metrics.json: .*the run's result is damaged"):
        run(topics, copy, resume=True)


@pytest.mark.parametrize("changes", [
    {"hidden_size": 0}, {"num_attention_heads": 0}, {"num_hidden_layers": 0}, {"id2label": "x"}, {"id2label": [1]},
    {"pad_token_id": 100_000}, {"dtype": "bogus"}, {"quantization_config": 5},
], ids=str)  # fmt: skip
def test_configs_that_are_damaged(copy, changes):
    edit(copy / "config.json", **changes)
    assert f"model {copy}" in refused(copy) or str(copy) in refused(copy)


@pytest.mark.parametrize("content", ["[1]", '"x"', "{", ""])
def test_configs_that_are_none(copy, content):
    (copy / "config.json").write_text(content)
    assert "no readable config.json" in refused(copy)


@pytest.mark.parametrize(("file", "content"), [
    ("tokenizer.json", "null"), ("tokenizer.json", '{"model": {"type": "x"}}'), ("tokenizer_config.json", "[]"),
    ("tokenizer_config.json", '{"tokenizer_class": 5}'),
])  # fmt: skip
def test_tokenizers_that_are_damaged(copy, file, content):
    (copy / file).write_text(content)
    assert "its tokenizer cannot be read" in refused(copy)


# Code


def test_code_of_a_directory_runs_only_where_that_is_said(copy, tmp_path):
    """Whatever its own recipe says."""
    (copy / "evil.py").write_text(f"""
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification

Path({str(tmp_path / "was run")!r}).touch()

class EvilConfig(BertConfig):
    model_type = "evil"

class EvilModel(BertForSequenceClassification):
    config_class = EvilConfig
""")
    autos = {"AutoConfig": "evil.EvilConfig", "AutoModelForSequenceClassification": "evil.EvilModel"}
    edit(copy / "config.json", model_type="evil", auto_map=autos)
    text = (copy / "recipe.yaml").read_text()
    text = text.replace("implementation: native", "implementation: official")
    (copy / "recipe.yaml").write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"))
    assert "trust_remote_code: true" in (copy / "recipe.yaml").read_text()
    assert "it opens with code of its own only; read that code" in refused(copy)
    assert not (tmp_path / "was run").exists()
    answers = list(zoo.prediction.run(copy, [TEXT], trust_remote_code=True))
    assert (tmp_path / "was run").exists() and len(answers) == 1


def test_metrics_of_a_directory_are_code_too(copy):
    mine = copy / "mine.py"
    mine.write_text("raise SystemExit('was run')")
    with pytest.raises(UserError, match=r"metrics that are code of their own, .*--trust-remote-code"):
        zoo.evaluation.run(copy, overrides=[f"task.metrics={{{json.dumps(str(mine))}: {{}}}}"])


# What is written, and where


def test_answers_go_where_a_link_leads_and_into_pipes(topics_run, tmp_path):
    (tmp_path / "target.jsonl").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target.jsonl")
    assert zoo.prediction.write(zoo.prediction.run(topics_run, [TEXT]), tmp_path / "link") == 1
    assert (tmp_path / "link").is_symlink() and TEXT in (tmp_path / "target.jsonl").read_text()
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    zoo.prediction.write(zoo.prediction.run(topics_run, [TEXT]), tmp_path / "pipe")
    reader.join(20)
    assert (tmp_path / "pipe").is_fifo() and TEXT in read[0]
    with pytest.raises(UserError, match="a directory; name a file"):
        zoo.prediction.write(iter(()), tmp_path)


def test_links_in_a_run_are_somebody_elses(tiny_bert, topics_run, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "precious").write_text("x")
    small = recipe(tiny_bert, RUNS["one label"][0], files(topics_run.parent, "topics"), max_steps=3)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(small.to_yaml())
    for name in (".model", ".model-x"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "theirs")
    run(small, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["precious"]


# Runs


def test_an_official_class_is_trained_and_saved(tiny_bert, topics_run, tmp_path):
    small = recipe(tiny_bert, RUNS["one label"][0], files(topics_run.parent, "topics"), max_steps=3)
    official = small.model_copy(update={"model": small.model.model_copy(update={"implementation": "official"})})
    metrics = run(official, tmp_path / "run")
    assert zoo.evaluation.run(tmp_path / "run")["test_loss"] == pytest.approx(metrics["test_loss"], abs=1e-5)


def test_labels_between_dollars(tiny_bert, tmp_path):
    names = ["$a_0^^$", "y$%$", "accuracy"]
    rows = [{"text": f"{TEXT} {n}", "label": names[n % 3]} for n in range(36)]
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"odd-{split}.jsonl", rows)
    run(recipe(tiny_bert, RUNS["one label"][0], files(tmp_path, "odd"), max_steps=3), tmp_path / "run")
    assert set(json.loads((tmp_path / "run" / "per_class.json").read_text())) == set(names)
    assert (tmp_path / "run" / "confusion_matrix.png").stat().st_size > 1000


@pytest.mark.parametrize(("kind", "metric", "greater"), [
    ("one label", "accuracy", True), ("one label", "calibration_error", False), ("a number", "mse", False),
    ("a number", "pearsonr", True), ("masked", "perplexity", False), ("one label", "loss", False),
])  # fmt: skip
def test_the_best_is_the_best(tmp_path, kind, metric, greater):
    asked = recipe(Path("x"), RUNS[kind][0], {"path": "x"}, metric_for_best_model=metric)
    assert training_arguments(asked, tmp_path).greater_is_better is greater


# Data


@pytest.mark.parametrize(("content", "says"), [
    ("", "is empty"), ("\n \n", "is empty"), ("null\n", "begins with b'n'"), ("3\n4\n", "begins with b'3'"),
])  # fmt: skip
def test_json_lines_without_rows(tmp_path, content, says):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(UserError, match=says):
        load_splits(DataSection(path=str(tmp_path / "rows.jsonl")), ["text"], 1)


def test_nothing_within_a_list(tmp_path):
    from zoo.labels import LABEL_KINDS

    write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": ["x", None]}, {"text": "b", "label": ["y"]}] * 6)
    with pytest.raises(UserError, match="train row 0: the label is missing"):
        load_splits(DataSection(path=str(tmp_path / "rows.jsonl")), ["text", "label"], 1, kind=LABEL_KINDS["classes"])


def test_texts_longer_than_the_model_has_positions(topics_run):
    with pytest.raises(UserError, match=r"task.max_length: 256, but the model has 64 positions"):
        zoo.evaluation.run(topics_run, overrides=["task.max_length=256"])
