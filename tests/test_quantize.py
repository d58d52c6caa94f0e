"""`zoo quantize`: a finished run in, one with fewer bits out, which measures and answers; and what is refused."""

import importlib.util
import inspect
import json
import multiprocessing
import resource
from typing import get_args

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

import cli
from tests.commands import zoo
from tests.test_adapter_runs import SHORT, as_before, bases, writing_recipe  # noqa: F401 (a fixture)
from tests.tiny_run import make_recipe
from zoo import merging, prediction, quantize
from zoo.errors import RunError, UserError
from zoo.model_directory import open_finished
from zoo.train import run

TEXTS = ["wheat shipments rose", "the bank cut its rate"]


@pytest.fixture(scope="module")
def wide(tiny_bert, tmp_path_factory):
    """Of widths that 4 bits can have."""
    folder, tokenizer = tmp_path_factory.mktemp("wide"), AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def topics(wide, r8, tmp_path_factory):
    directory = tmp_path_factory.mktemp("quantize") / "topics"
    run(make_recipe(wide, r8, SHORT), directory)
    return directory


@pytest.mark.parametrize("method", quantize.METHODS)
def test_every_method_is_near_and_opens(topics, method, tmp_path):
    if method.startswith("torchao"):
        pytest.importorskip("torchao", reason="the extra torchao is not installed")
    report = quantize.run(topics, method, tmp_path / "made", calibrate=8)
    assert report["after"]["bytes"] < report["before"]["bytes"] and report["unit"] == "samples"
    assert report["after"]["test_loss"] == pytest.approx(report["before"]["test_loss"], rel=0.05)
    as_before(tmp_path / "made")
    whole, made = (list(prediction.run(directory, TEXTS)) for directory in (topics, tmp_path / "made"))
    for before, after in zip(whole, made, strict=True):
        for label, probability in before["probabilities"].items():
            assert after["probabilities"][label] == pytest.approx(probability, abs=0.05)
    assert f"`zoo quantize --method {method}` of topics" in (tmp_path / "made" / "README.md").read_text()
    trust = method in quantize.INT8
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "made", trust_remote_code=trust)
    assert type(opened).__name__ == ("ZooBertForSequenceClassification" if trust else "BertForSequenceClassification")
    with pytest.raises(UserError, match="quantised already"):
        quantize.run(tmp_path / "made", "dynamic-int8", tmp_path / "again")


@pytest.mark.parametrize(
    ("base", "task"),
    [
        ("gpt", {"type": "text-generation", "max_length": 24}),
        ("t5", {"type": "summarization", "max_length": 32, "max_target_length": 8}),
    ],
)
def test_what_writes(base, task, bases, tmp_path):  # noqa: F811
    run(writing_recipe(bases / base, bases, task, {}), tmp_path / "run")
    for method in ("smooth-int8", "bnb-int8"):
        report = quantize.run(tmp_path / "run", method, tmp_path / method, calibrate=8)
        assert report["unit"] == "tokens" and report["ratio"] > 0
        as_before(tmp_path / method)
        assert list(prediction.run(tmp_path / method, TEXTS))[1]["predicted"] is not None


def test_the_command(topics, tmp_path):
    assert get_args(get_args(inspect.signature(cli.quantize).parameters["method"].annotation)[0]) == quantize.METHODS
    status, out, err = zoo("quantize", str(topics), "--output-dir", str(tmp_path / "made"), cwd=tmp_path)
    assert status == 0, err
    assert "| test_loss |" in out and "| weights, MiB |" in out and "| samples a second |" in out
    status, out, err = zoo("quantize", str(topics), "--json", "--output-dir", str(tmp_path / "other"), cwd=tmp_path)
    assert status == 0 and set(json.loads(out)) == {"directory", "method", "ratio", "unit", "before", "after"}


def test_a_backend_that_is_not_installed(topics, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: (name != "torchao" and find(name, *rest)) or None
    )
    with pytest.raises(UserError, match=r"torchao is not installed; pip install 'transformer-zoo\[torchao\]'"):
        quantize.run(topics, "torchao-int8", tmp_path / "made")


def test_what_is_not_quantised(topics, wide, r8, tmp_path):
    with pytest.raises(UserError, match="reads rows of train, and there are none"):
        quantize.run(topics, "smooth-int8", tmp_path / "made", calibrate=0)
    run(make_recipe(wide, r8, SHORT).model_copy(update={"lora": {"r": 2}}), tmp_path / "adapter")
    with pytest.raises(UserError, match="make a whole model of it first: zoo adapters merge"):
        quantize.run(tmp_path / "adapter", "dynamic-int8", tmp_path / "made")
    with pytest.raises(UserError, match="there is something already"):
        quantize.run(topics, "dynamic-int8", topics)
    assert not (tmp_path / "made").exists()
    quantize.run(topics, "dynamic-int8", tmp_path / "made")
    recipe = make_recipe(tmp_path / "made", r8, SHORT)
    with pytest.raises(UserError, match="of 8 bits, which do not learn"):
        run(recipe, tmp_path / "trained")
    changes = {"quantize": {"load_in_8bit": True}, "lora": {"r": 2}}
    with pytest.raises(UserError, match="quantised already; remove the section quantize"):
        run(recipe.model_copy(update=changes), tmp_path / "trained")


def _in_small_files(directory, target, largest: int, answer) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    try:
        quantize.run(directory, "dynamic-int8", target)
    except RunError as error:
        answer.put(str(error))


@pytest.mark.parametrize("largest", [50_000, 2_000])
def test_a_full_disk_leaves_nothing(topics, tmp_path, largest):
    server = multiprocessing.get_context("forkserver")
    answer = server.Queue()
    process = server.Process(target=_in_small_files, args=(topics, tmp_path / "made", largest, answer))
    process.start()
    said = answer.get(timeout=120)
    process.join()
    assert "cannot be written" in said and "make room there, and try again" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_what_learns_on_a_quantised_run(topics, r8, lora, tmp_path):
    quantize.run(topics, "bnb-nf4", tmp_path / "base")
    recipe = make_recipe(tmp_path / "base", r8, SHORT)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"implementation": "official"})})
    if lora is None:
        with pytest.raises(UserError, match="cannot perform fine-tuning on purely quantized models"):
            run(recipe, tmp_path / "run")
        return
    run(recipe.model_copy(update={"lora": lora}), tmp_path / "run")
    as_before(tmp_path / "run")
    with pytest.raises(UserError, match="is quantised; train on the run that it was made of"):
        merging.run(tmp_path / "run", tmp_path / "whole")


def test_a_variant_keeps_its_attention(wide, r8, tmp_path):
    recipe = make_recipe(wide, r8, SHORT)
    model = recipe.model.model_copy(update={"attention": "local", "attention_kwargs": {"local": {"window": 3}}})
    run(recipe.model_copy(update={"model": model}), tmp_path / "run")
    for method in ("dynamic-int8", "bnb-nf4"):
        quantize.run(tmp_path / "run", method, tmp_path / method)
        as_before(tmp_path / method)
        opened = open_finished(tmp_path / method).model
        assert opened.config.attention == "local" and isinstance(opened, torch.nn.Module)
    with pytest.raises(UserError, match="torchao"):
        quantize.run(tmp_path / "run", "torchao-int8", tmp_path / "torchao")
