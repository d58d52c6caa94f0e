"""Baselines: what they must come to, by hand or by the library itself."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from sklearn.datasets import load_digits
from transformers import AutoTokenizer

from tests.commands import zoo
from tests.conftest import read_r8
from tests.test_runs import write_jsonl
from zoo.baselines import run
from zoo.errors import UserError
from zoo.recipe import Recipe
from zoo.recipe_loading import load_recipe


def recipe(folder, task: dict, **model) -> Recipe:
    files = {split: f"{split}.jsonl" for split in ("train", "test")}
    return Recipe.model_validate(
        {"name": "x", "model": model or {"path": "none"}, "task": task, "data": {"path": str(folder), "files": files}}
    )


def test_classes_of_texts(tmp_path):
    rows = {split: read_r8(split, count) for split, count in (("train", 300), ("test", 100))}
    for split, pairs in rows.items():
        write_jsonl(tmp_path / f"{split}.jsonl", [{"text": text, "label": label} for text, label in pairs])
    found = run(recipe(tmp_path, {"type": "text-classification"}))
    counts = Counter(label for _, label in rows["train"])
    largest = max(counts, key=lambda label: counts[label])
    share = sum(label == largest for _, label in rows["test"]) / 100
    assert found["the largest class"]["accuracy"] == pytest.approx(share)
    assert found["logistic regression of TF-IDF"]["accuracy"] > max(0.8, share)


def test_classes_of_images():
    found = run(load_recipe("vit/train-digits"))
    assert len(load_digits().target) == 1797
    assert found["the largest class"]["accuracy"] < 0.12
    assert 0.9 < found["logistic regression of pixels"]["accuracy"] < 1


def test_the_lead_sentence(tmp_path):
    train = [{"text": "Prices rose. Oil fell.", "summary": "a b c"}] * 12
    write_jsonl(tmp_path / "train.jsonl", train)
    test = [{"text": "The price of oil rose! Nobody knows why.", "summary": "The price of oil rose"}]
    write_jsonl(tmp_path / "test.jsonl", test)
    found = run(recipe(tmp_path, {"type": "summarization"}))
    assert found["the lead sentence"] == pytest.approx({"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0})
    # "The price of": precision 1, recall 3/5 and 2/4
    assert found["its first 3 words"] == pytest.approx({"rouge1": 0.75, "rouge2": 2 / 3, "rougeL": 0.75})


def test_the_nearest_sentence(tmp_path):
    def row(question: str, *answers: str) -> dict:
        context = "Oil rose in May. The price of wheat fell! The oil is dear."
        starts = [context.index(answer) for answer in answers]
        return {
            "question": question,
            "context": context,
            "answers": {"text": list(answers), "answer_start": starts},
        }

    write_jsonl(tmp_path / "train.jsonl", [row("What?", "Oil")] * 12)
    # rare words weigh more: "the" and "oil" stand in two sentences, "price" in one
    test = [row("the price oil", "The price of wheat fell!"), row("Whose?"), row("oil in May", "May")]
    write_jsonl(tmp_path / "test.jsonl", test)
    found = run(recipe(tmp_path, {"type": "question-answering", "version_2_with_negative": True}))
    assert found["no answer"] == {"exact_match": pytest.approx(1 / 3), "f1": pytest.approx(1 / 3)}
    # "oil rose in may" for "may": precision 1/4, recall 1
    assert found["the first sentence"] == {"exact_match": 0.0, "f1": pytest.approx(0.4 / 3)}
    nearest = {"exact_match": pytest.approx(1 / 3), "f1": pytest.approx((1 + 0.4) / 3)}
    assert found["the sentence nearest to the question"] == nearest


def test_tokens_of_answers(tiny_bert, tmp_path):
    """Of chats the answers alone count: "c c" behind "a" and "b", and what ends them."""
    for split in ("train", "test"):
        write_jsonl(
            tmp_path / f"{split}.jsonl", [{"prompt": word, "completion": "c c"} for word in "ab" for _ in range(4)]
        )
    config = {"model_type": "gpt2"}
    found = run(
        recipe(tmp_path, {"type": "instruction-tuning", "max_length": 32}, config=config, tokenizer=str(tiny_bert))
    )
    counts = np.array([2, 1])
    entropy = -(counts / 3 * np.log(counts / 3)).sum()
    assert found["unigram entropy of the text itself"]["token_loss"] == pytest.approx(entropy)
    assert found["bigram of train"]["token_loss"] < found["unigram of train"]["token_loss"]


def test_next_tokens(tiny_bert, tmp_path):
    texts = {split: [text for text, _ in read_r8(split, count)] for split, count in (("train", 200), ("test", 40))}
    for split, part in texts.items():
        write_jsonl(tmp_path / f"{split}.jsonl", [{"text": text} for text in part])
    task = {"type": "text-generation", "max_length": 32}
    found = run(recipe(tmp_path, task, config={"model_type": "gpt2"}, tokenizer=str(tiny_bert)))
    losses = {name: values["token_loss"] for name, values in found.items()}
    assert (
        losses["bigram of train"] < losses["unigram of train"] < math.log(len(AutoTokenizer.from_pretrained(tiny_bert)))
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    pieces = [
        ids[n : n + 32]
        for text in texts["test"]
        for ids in [tokenizer(text)["input_ids"]]
        for n in range(0, len(ids), 32)
    ]
    counts = np.array(list(Counter(token for piece in pieces for token in piece[1:]).values()))
    entropy = -(counts / counts.sum() * np.log(counts / counts.sum())).sum()
    assert losses["unigram entropy of the text itself"] == pytest.approx(entropy)
    # no unigram model can do better on the text than its own counts (Gibbs' inequality)
    assert losses["unigram of train"] >= entropy > losses["bigram entropy of the text itself"] > 0


def test_the_command(tmp_path):
    status, out, _ = zoo("baseline", "vit/train-digits", "--json", cwd=tmp_path)
    assert status == 0 and set(json.loads(out)) == {"the largest class", "logistic regression of pixels"}
    status, out, err = zoo(
        "baseline", "bert/finetune-topics", "task.problem_type=multi_label_classification", cwd=tmp_path
    )
    assert status == 2 and "text-classification has none" in err
    status, out, err = zoo("baseline", "vit/train-digits", "--split", "tset", cwd=tmp_path)
    assert status == 2 and "--split tset: it is one of train, validation, test" in err
    with pytest.raises(UserError, match="the data has no such split"):
        run(load_recipe("vit/train-digits", ["data.test=null"]))


def test_the_usual_tag(tiny_bert, tmp_path):
    train = [{"tokens": ["Rome", "fell", "again"], "tags": ["B-place", "O", "O"]}] * 3
    train += [{"tokens": ["Rome"], "tags": ["O"]}]
    test = [
        {"tokens": ["Rome", "rose"], "tags": ["B-place", "O"]},
        {"tokens": ["Bonn", "fell"], "tags": ["B-place", "O"]},
    ]
    for name, rows in (("train", train), ("validation", test), ("test", test)):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    files = {name: f"{name}.jsonl" for name in ("train", "validation", "test")}
    fields = {"name": "r", "model": {"path": str(tiny_bert)}, "task": {"type": "token-classification"}}
    found = run(Recipe.model_validate(fields | {"data": {"path": str(tmp_path), "files": files}}))
    # Rome is a place more often than not; Bonn is unknown, and most words are none
    assert found == {
        "the usual tag of each word": {"accuracy": 0.75, "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3)}
    }


def test_the_most_frequent_token(tiny_bert, tmp_path):
    texts = [text for text, _ in read_r8("train", 30)]
    write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in texts])
    write_jsonl(tmp_path / "test.jsonl", [{"text": text} for text in texts[:5]])
    files = {"train": "train.jsonl", "test": "test.jsonl"}
    fields = {"name": "r", "model": {"path": str(tiny_bert)}, "data": {"path": str(tmp_path), "files": files}}
    found = run(Recipe.model_validate(fields | {"task": {"type": "fill-mask"}}))["the most frequent token"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    asked = [one for text in texts[:5] for one in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert found["accuracy"] == pytest.approx(max(Counter(asked).values()) / len(asked), abs=0.03)
    assert 20 < found["perplexity"] < len(tokenizer)
