"""BERT's and ALBERT's pretraining: pairs of pieces, what is said of them, and a run of each."""

from collections import Counter

import numpy as np
import pytest
from transformers import AlbertConfig, AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer, pipeline

import zoo.evaluation
import zoo.prediction
from tests.conftest import read_r8
from tests.test_runs import read_metrics, recipe, write_jsonl
from zoo.data import load_splits
from zoo.data_sections import DataSection
from zoo.encoding import encoded
from zoo.errors import UserError
from zoo.samples import WithDraws
from zoo.sections import TaskSection
from zoo.tasks import task_of
from zoo.tasks.base import IGNORED
from zoo.tasks.sentence_pairs import cut_pair, next_sentence, sentence_order
from zoo.train import run

NEXT, ORDER = "next-sentence-prediction", "sentence-order-prediction"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for split, count in (("train", 60), ("test", 24)):
        # R8 has no full stops left: its sentences are made of ten words here
        words = [text.split() for text, _ in read_r8(split, count)]
        rows = [{"text": " ".join(f"{' '.join(w[n : n + 10])}." for n in range(0, len(w), 10))} for w in words]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def data(folder) -> dict:
    return {"path": str(folder), "files": {split: f"{split}.jsonl" for split in ("train", "test")}}


def section(kind: str = NEXT, **keys) -> TaskSection:
    return TaskSection.model_validate({"type": kind, **keys})


def test_pairs_follow_or_do_not_and_half_of_each():
    row = {"sentences": [[1, 2], [3], [4, 5, 6], [7]], "other": {"sentences": [[11], [12, 13], [14]]}}
    of, places = Counter(), Counter()
    for number in range(2000):
        first, second, label = next_sentence(row, np.random.default_rng(number))
        of[label] += 1
        places[len(first)] += 1
        assert first == [1, 2, 3, 4, 5, 6, 7][: len(first)]
        assert second == ([1, 2, 3, 4, 5, 6, 7][len(first) :] if label == 0 else [11, 12, 13, 14][-len(second) :])
        first, second, label = sentence_order(row, np.random.default_rng(number))
        assert (second + first if label else first + second) == [1, 2, 3, 4, 5, 6, 7]
    assert abs(of[1] - 1000) < 3 * (2000 / 4) ** 0.5 and set(places) == {2, 3, 6}
    assert all(abs(count - 2000 / 3) < 4 * (2000 * 2 / 9) ** 0.5 for count in places.values())


@pytest.mark.parametrize("sizes", [(3, 4), (30, 2), (2, 30), (30, 40), (10, 10), (11, 10)])
def test_the_longer_one_is_cut(sizes):
    first, second = (list(range(start, start + size)) for start, size in zip((0, 100), sizes, strict=True))
    cuts = {tuple(map(tuple, cut_pair(first, second, 20, np.random.default_rng(n)))) for n in range(50)}
    for one, other in cuts:
        assert len(one) + len(other) == min(sum(sizes), 20)
        for part, whole in ((one, first), (other, second)):
            assert list(part) == list(range(part[0], part[0] + len(part))) and set(part) <= set(whole)
            assert len(part) == len(whole) or len(part) >= 10
    assert (len(cuts) > 1) == (sum(sizes) > 20), "at its beginning and its end"


@pytest.mark.parametrize("kind, label", [(NEXT, "next_sentence_label"), (ORDER, "sentence_order_label")])
def test_a_batch(kind, label, tiny_bert, texts):
    tokenizer, chosen = AutoTokenizer.from_pretrained(tiny_bert), section(kind, max_length=32)
    task = task_of(chosen)
    splits = load_splits(DataSection.model_validate(data(texts)), task.roles, 0)
    made = recipe(tiny_bert, {"type": kind}, data(texts))
    rows, words = encoded(splits.train, made, task, tokenizer, 0)
    assert isinstance(rows, WithDraws) and "texts, " in words and "left out that have one sentence" in words
    samples = [rows[n] for n in range(16)]
    batch = task.collate(tokenizer, chosen)(samples)
    again = task.collate(tokenizer, chosen)([rows[n] for n in range(16)])
    rows.set_epoch(1)
    other = task.collate(tokenizer, chosen)([rows[n] for n in range(16)])
    assert all((batch[name] == again[name]).all() for name in batch)
    assert batch["input_ids"].shape != other["input_ids"].shape or (batch["input_ids"] != other["input_ids"]).any()
    assert set(batch[label].tolist()) == {0, 1}
    for number, (ids, mask, segments, labels) in enumerate(
        zip(*(batch[name] for name in ("input_ids", "attention_mask", "token_type_ids", "labels")), strict=True)
    ):
        length = int(mask.sum())
        assert length <= 32 and ids[0] == tokenizer.cls_token_id and ids[length - 1] == tokenizer.sep_token_id
        whole = np.where(labels[:length] == IGNORED, ids[:length], labels[:length])
        ends = np.flatnonzero(whole == tokenizer.sep_token_id)
        assert len(ends) == 2 and segments[:length].tolist() == [0] * (ends[0] + 1) + [1] * (length - ends[0] - 1)
        assert (labels[[0, *ends]] == IGNORED).all() and (labels[:length] != IGNORED).any()
        first, second = whole[1 : ends[0]].tolist(), whole[ends[0] + 1 : -1].tolist()
        own = [token for sentence in samples[number]["sentences"] for token in sentence]
        drawn = [token for sentence in samples[number].get("other", {}).get("sentences", []) for token in sentence]

        def within(part, tokens):
            return any(tokens[n : n + len(part)] == part for n in range(len(tokens)))

        assert within(first, own) and within(second, drawn if kind == NEXT and batch[label][number] else own)
        assert kind == ORDER or samples[number]["other"]["row"] != samples[number]["row"]


def test_a_run_of_bert(tiny_bert, texts, tmp_path):
    run(recipe(tiny_bert, {"type": NEXT}, data(texts)), tmp_path / "run")
    metrics = read_metrics(tmp_path / "run")
    assert 0 <= metrics["test_next_sentence_accuracy"] <= 1 and 0 <= metrics["test_accuracy"] <= 1
    again = zoo.evaluation.run(tmp_path / "run")
    names = ("test_loss", "test_accuracy", "test_next_sentence_accuracy")
    assert [again[name] for name in names] == pytest.approx([metrics[name] for name in names])
    pairs = [{"text": "oil prices rose", "text_pair": "they rose again"}, {"text": "oil", "text_pair": "shares"}]
    answers = list(zoo.prediction.run(tmp_path / "run", file=write_jsonl(tmp_path / "pairs.jsonl", pairs)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    model = AutoModelForPreTraining.from_pretrained(tmp_path / "run")
    assert type(model).__name__ == "BertForPreTraining"
    for pair, answer in zip(pairs, answers, strict=True):
        logits = model(**tokenizer(pair["text"], pair["text_pair"], return_tensors="pt")).seq_relationship_logits
        assert list(answer["probabilities"].values()) == pytest.approx(logits.softmax(-1)[0].tolist(), abs=1e-5)
        assert answer["predicted"] == ("next", "random")[int(logits.argmax())]
    with pytest.raises(UserError, match="text 0 stands alone"):
        zoo.prediction.run(tmp_path / "run", ["oil"])
    # the hub's pipeline for it, and the task that comes next
    assert len(pipeline("fill-mask", str(tmp_path / "run"))("oil [MASK] rose")) == 5
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "run") is not None
    labelled = [{"text": text, "label": label} for text, label in read_r8("train", 48)]
    topics = {"path": str(write_jsonl(tmp_path / "topics.jsonl", labelled))}
    run(recipe(tmp_path / "run", {"type": "text-classification"}, topics), tmp_path / "next")


def test_the_card_runs(tiny_bert, texts, tmp_path, monkeypatch, capsys):
    run(recipe(tiny_bert, {"type": NEXT}, data(texts), max_steps=1, eval_steps=1, save_steps=1), tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    code = (tmp_path / "run" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    capsys.readouterr()
    exec(code, {})
    assert "tensor([[" in capsys.readouterr().out


def test_a_run_of_albert(tiny_bert, texts, tmp_path):
    config = AlbertConfig(embedding_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                          intermediate_size=48, max_position_embeddings=64).to_diff_dict()  # fmt: skip
    start = {"config": {**config, "model_type": "albert"}, "tokenizer": str(tiny_bert)}
    made = recipe(tiny_bert, {"type": ORDER}, data(texts))
    model = type(made.model).model_validate(start)
    run(made.model_copy(update={"model": model}), tmp_path / "run")
    assert 0 <= read_metrics(tmp_path / "run")["test_sentence_order_accuracy"] <= 1
    (answer,) = zoo.prediction.run(
        tmp_path / "run", file=write_jsonl(tmp_path / "p.jsonl", [{"text": "oil", "text_pair": "rose"}])
    )
    assert answer["predicted"] in ("in order", "swapped")


def test_refused(tiny_bert, texts, tmp_path):
    def refused(folder, kind=NEXT, **task) -> str:
        with pytest.raises(UserError) as caught:
            run(recipe(tiny_bert, {"type": kind, **task}, data(folder)), tmp_path / "run")
        return str(caught.value)

    assert "BertForPreTraining does not learn it; use next-sentence-prediction" in refused(texts, ORDER)
    assert "task.max_length: 4, but 3 tokens are special" in refused(texts, max_length=4)
    assert "task.max_length: 65, but the model has 64 positions" in refused(texts, max_length=65)
    (tmp_path / "short").mkdir()
    for split in ("train", "test"):
        write_jsonl(tmp_path / "short" / f"{split}.jsonl", [{"text": "One sentence only."}] * 20)
    assert "0 of 18 texts have two sentences; next-sentence-prediction wants two texts" in refused(tmp_path / "short")
