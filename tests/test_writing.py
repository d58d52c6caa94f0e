"""Tasks whose answers are texts: the next words of a GPT, the summaries of a T5, both from random weights."""

import ast
import json
import math

import numpy as np
import pytest
import torch
from rouge_score import rouge_scorer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, EvalPrediction, pipeline

import zoo.evaluation
import zoo.prediction
from tests.conftest import read_r8
from tests.test_runs import read_lines, read_metrics, write_jsonl
from zoo.errors import UserError
from zoo.recipe import Recipe
from zoo.recipe_loading import load_recipe
from zoo.sections import TaskSection
from zoo.tasks import task_of
from zoo.tasks.base import IGNORED
from zoo.tasks.summarization import rouge
from zoo.train import run

GPT = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {"model_type": "t5", "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for split, count in (("train", 60), ("test", 12)):
        rows = [{"text": text, "summary": " ".join(text.split()[:5])} for text, _ in read_r8(split, count)]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def recipe(tokenizer, folder, config: dict, task: dict, generate: dict, **train) -> Recipe:
    arguments = {
        "max_steps": 6, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 4, "learning_rate": 3e-3,
        "eval_strategy": "steps", "eval_steps": 3, "save_steps": 3, "load_best_model_at_end": True,
        "disable_tqdm": True, "seed": 7,
    }  # fmt: skip
    files = {split: f"{split}.jsonl" for split in ("train", "test")}
    return Recipe.model_validate(
        {"name": "tiny", "model": {"config": config, "tokenizer": str(tokenizer)}, "task": task,
         "data": {"path": str(folder), "files": files}, "train": arguments | train, "generate": generate}
    )  # fmt: skip


@pytest.fixture(scope="module")
def gpt(tiny_bert, texts, tmp_path_factory):
    directory = tmp_path_factory.mktemp("gpt") / "run"
    task = {"type": "text-generation", "max_length": 24}
    run(recipe(tiny_bert, texts, GPT, task, {"max_new_tokens": 7}), directory)
    return directory


@pytest.fixture(scope="module")
def t5(tiny_bert, texts, tmp_path_factory):
    directory = tmp_path_factory.mktemp("t5") / "run"
    task = {"type": "summarization", "max_length": 40, "max_target_length": 9, "prefix": "in short: "}
    run(recipe(tiny_bert, texts, T5, task, {"num_beams": 2}, metric_for_best_model="rouge1"), directory)
    return directory


# GPT


def test_the_loss_of_a_token(gpt, texts):
    """By the official class, a text at a time, without padding: what the run says of the same texts."""
    tokenizer, model = AutoTokenizer.from_pretrained(gpt), AutoModelForCausalLM.from_pretrained(gpt)
    assert type(model).__name__ == "GPT2LMHeadModel"
    losses = []
    for line in read_lines(texts / "test.jsonl"):
        ids = tokenizer(line["text"])["input_ids"]
        assert ids[-1] == tokenizer.sep_token_id == model.config.eos_token_id
        for start in range(0, len(ids), 24):
            piece = torch.tensor([ids[start : start + 24]])
            if piece.shape[1] > 1:
                logits = model(piece).logits[0, :-1]
                losses += torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="none").tolist()
    metrics = read_metrics(gpt)
    assert metrics["test_token_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["test_perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert zoo.evaluation.run(gpt)["test_token_loss"] == pytest.approx(metrics["test_token_loss"], abs=1e-5)


def test_a_vocabulary_is_the_tokenizers(gpt, tiny_bert):
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_bert), AutoModelForCausalLM.from_pretrained(gpt)
    assert model.config.vocab_size == len(tokenizer) and model.config.pad_token_id == tokenizer.pad_token_id


def test_next_words_are_those_of_the_pipeline(gpt):
    asked = ["oil prices", "shares of the company rose"]
    ours = [answer["predicted"] for answer in zoo.prediction.run(gpt, asked)]
    stock = pipeline("text-generation", str(gpt), return_full_text=False)
    assert ours == [stock(text)[0]["generated_text"] for text in asked]
    settings = json.loads((gpt / "generation_config.json").read_text())
    assert settings["max_new_tokens"] == 7 and "max_length" not in settings


def test_a_prompt_that_leaves_no_room_is_refused_at_once(gpt):
    """Seven tokens are written, and the model has 64 positions; the tokenizer adds two of its own."""
    assert next(zoo.prediction.run(gpt, ["oil " * 56]))["predicted"] is not None
    with pytest.raises(UserError) as caught:
        zoo.prediction.run(gpt, ["oil", "oil " * 57])
    assert str(caught.value) == (
        "predict: text 1 has 59 tokens and 7 more are written (max_new_tokens), but the model has 64 positions; "
        "shorten it"
    )


# T5


def test_a_text_of_any_length_is_summarised(t5):
    assert len(list(zoo.prediction.run(t5, ["oil prices rose " * 200]))) == 1


def test_summaries_are_measured_as_they_are_written(t5, texts):
    tokenizer, model = AutoTokenizer.from_pretrained(t5), AutoModelForSeq2SeqLM.from_pretrained(t5)
    assert type(model).__name__ == "T5ForConditionalGeneration"
    lines, rows = read_lines(t5 / "predictions.jsonl"), read_lines(texts / "test.jsonl")
    for line, row in zip(lines, rows, strict=True):
        inputs = tokenizer(f"in short: {row['text']}", truncation=True, max_length=40, return_tensors="pt")
        assert "token_type_ids" not in inputs, "T5 has no segments"
        written = tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True)
        assert line["predicted"] == written and len(tokenizer(line["gold"])["input_ids"]) <= 9
    scorer = rouge_scorer.RougeScorer(["rouge1"], use_stemmer=True)
    mean = np.mean([scorer.score(line["gold"], line["predicted"])["rouge1"].fmeasure for line in lines])
    metrics = read_metrics(t5)
    assert metrics["test_rouge1"] == pytest.approx(mean) and "eval_rougeL" in metrics
    again = zoo.evaluation.run(t5)
    assert again["test_rouge1"] == pytest.approx(mean) and again["test_loss"] == pytest.approx(metrics["test_loss"])
    (answer,) = zoo.prediction.run(t5, [rows[0]["text"]])
    assert answer["predicted"] == lines[0]["predicted"]


def test_the_card_of_a_writer_runs(t5, monkeypatch, capsys):
    monkeypatch.chdir(t5)
    code = (t5 / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    exec(code, {})
    printed = capsys.readouterr().out.strip()
    # what so little training writes may be nothing at all; zoo predict writes the same
    shown = ast.literal_eval(code.partition("**tokenizer(")[2].partition(", return_tensors")[0])
    assert shown.startswith("in short: ")
    (answer,) = zoo.prediction.run(t5, [shown.removeprefix("in short: ")])
    assert printed == answer["predicted"].strip()


def test_while_training_it_writes_only_to_choose(tiny_bert, texts, tmp_path):
    task = {"type": "summarization", "max_length": 40, "max_target_length": 9}
    run(recipe(tiny_bert, texts, T5, task, {}), tmp_path / "run")
    evaluations = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    values = [event["values"] for event in evaluations if event["phase"] == "evaluate"]
    assert len(values) > 2 and not any("eval_rouge1" in one for one in values[:-1]) and "eval_rouge1" in values[-1]


def test_rouge_by_hand():
    # 2 of 3 and 2 of 4 words shared: F1 4/7; one pair of words of 2 and of 3: F1 2/5
    assert rouge(["the cat sat"], ["a cat sat down"]) == pytest.approx(
        {"rouge1": 4 / 7, "rouge2": 2 / 5, "rougeL": 4 / 7}
    )
    assert rouge(["x"], [""]) == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}


def test_labels_end_with_their_text_even_where_padding_is_its_end(tiny_bert):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.sep_token
    section = TaskSection.model_validate({"type": "text-generation", "max_length": 16})
    task = task_of(section)
    rows = task.encode(tokenizer, section)({"text": ["oil", "oil shares rose"], "row": [0, 1]})
    batch = task.collate(tokenizer, section)(
        [{name: rows[name][n] for name in ("input_ids", "attention_mask", "labels", "row")} for n in (0, 1)]
    )
    short = len(rows["input_ids"][0])
    assert batch["labels"][0, short - 1] == tokenizer.pad_token_id, "the end of a text is learned"
    assert (batch["labels"][0, short:] == IGNORED).all() and (
        batch["input_ids"][0, short:] == tokenizer.pad_token_id
    ).all()
    losses = task.metrics(section, [], tokenizer)(
        EvalPrediction(np.array([[1.0, 3.0, 9.0]]), np.array([[5, 6, IGNORED]]))
    )
    assert losses == {"token_loss": 1.0, "perplexity": math.e}


# Refused


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("generate.num_beam=4", "generate.num_beam=4: unknown key; did you mean num_beams?"),
        ("generate.num_beams=many", "num_beams=many: expected a whole number or null, got the string 'many'"),
        ("generate.output_scores=true", "generate.output_scores=true: not for a recipe"),
        ("task={type: fill-mask}", "fill-mask generates nothing; remove the section"),
        ("model.path=x", "a model has one beginning, path, size or config.model_type"),
        ("model.revision=x", ""),
    ],
)
def test_what_is_refused_at_once(tmp_path, change, says):
    (tmp_path / "r.yaml").write_text(
        "name: x\nmodel: {config: {model_type: gpt2}, tokenizer: t}\ntask: {type: text-generation}\n"
        "data: {path: d}\ngenerate: {num_beams: 2}\n"
    )
    if not says:
        assert load_recipe(str(tmp_path / "r.yaml"), [change]).model.revision == "x"
        return
    with pytest.raises(UserError) as caught:
        load_recipe(str(tmp_path / "r.yaml"), [change])
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("config", "tokenizer", "generate", "says"),
    [
        ({"model_type": "gpt3"}, True, {}, "model gpt3: no size or native family; did you mean"),
        ({**GPT, "n_embed": 3}, True, {}, "model.config.n_embed: ZooGPT2Config has no such field; did you mean"),
        ({**GPT, "n_head": 5}, True, {}, "n_embd 32 is not a multiple of n_head 5"),
        (GPT, False, {}, "model.tokenizer: required, and not there"),
        (GPT, True, {"cache_implementation": "none"}, "generate: "),
    ],
)  # fmt: skip
def test_models_that_cannot_be_made(tiny_bert, texts, tmp_path, config, tokenizer, generate, says):
    made = recipe(tiny_bert, texts, config, {"type": "text-generation", "max_length": 16}, generate)
    if not tokenizer:
        made = made.model_copy(update={"model": made.model.model_copy(update={"tokenizer": None})})
    with pytest.raises(UserError) as caught:
        run(made, tmp_path / "run")
    assert says in str(caught.value)
