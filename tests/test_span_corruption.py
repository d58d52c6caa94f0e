"""T5's pretraining: what is hidden, how it is put together again, and a run of it."""

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import zoo.evaluation
import zoo.prediction
from tests.test_runs import read_metrics, write_jsonl
from tests.test_writing import T5, recipe, texts  # noqa: F401 (a fixture)
from zoo.errors import UserError
from zoo.samples import WithDraws
from zoo.sections import TaskSection
from zoo.tasks import task_of
from zoo.tasks.base import IGNORED
from zoo.tasks.span_corruption import corrupted, hidden_counts, piece_length
from zoo.train import run

NAMES = [f"<extra_id_{n}>" for n in range(4)]


def section(**keys) -> TaskSection:
    return TaskSection.model_validate({"type": "span-corruption", **keys})


def restored(inputs: list[int], targets: list[int], sentinels: range) -> list[int]:
    """The text again, by its sentinels."""
    spans: dict[int, list[int]] = {}
    for one in targets:
        if one in sentinels:
            spans[one] = []
        else:
            spans[list(spans)[-1]].append(one)
    return [token for one in inputs for token in (spans[one] if one in sentinels else [one])]


@pytest.mark.parametrize(
    "keys", [{}, {"mlm_probability": 0.5, "mean_noise_span_length": 1.0}, {"mlm_probability": 0.9}]
)
@pytest.mark.parametrize("length", [2, 3, 7, 100, 513])
def test_the_text_can_be_put_together_again(length, keys):
    chosen, sentinels = section(**keys), range(1000, 1600)
    ids = list(range(length))
    for row in range(20):
        inputs, targets = corrupted(ids, chosen, sentinels, [42, 0, row])
        used = [one for one in inputs if one in sentinels]
        assert restored(inputs, targets, sentinels) == ids
        assert used == [one for one in targets if one in sentinels] == list(sentinels[: len(used)])
        hidden, spans = hidden_counts(chosen, length)
        assert len(targets) == hidden + spans and len(inputs) == length - hidden + spans
        assert inputs[0] == 0, "it begins with what is left"


def test_how_much_is_hidden():
    """15 %, in spans of 3 tokens on average; every place is hidden about alike often."""
    hidden = np.zeros(400)
    lengths = []
    for row in range(2000):
        inputs, targets = corrupted(range(400), section(), range(1000, 1100), [7, 0, row])
        hidden[[one for one in targets if one < 1000]] += 1
        starts = np.flatnonzero(np.array(targets) >= 1000)
        lengths += np.diff([*starts, len(targets)] - np.arange(len(starts) + 1)).tolist()
    assert hidden.sum() == 2000 * 60 and np.mean(lengths) == 3.0 and min(lengths) == 1 < np.std(lengths)
    middle = hidden[50:350] / 2000
    assert abs(middle.mean() - 0.15) < 0.01 and middle.std() < 3 * (0.15 * 0.85 / 2000) ** 0.5


def test_the_draw_decides_alone():
    first, again, other = (corrupted(range(90), section(), range(1000, 1100), [1, epoch, 5]) for epoch in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("max_length", [3, 4, 16, 128, 512])
def test_an_input_is_as_long_as_may_be(max_length):
    """For 512 tokens, of which one is the end, the paper's own pieces: 568 tokens, 114 of a target and its end."""
    length = piece_length(section(max_length=max_length), special=1)
    inputs, targets = corrupted(range(length), section(), range(1000, 1100), [0])
    assert len(inputs) + 1 == max_length
    if max_length == 512:
        assert (length, len(targets) + 1) == (568, 114)
    assert piece_length(section(max_length=max_length, mlm_probability=0.999999), special=1) >= length


def test_a_batch(tiny_bert):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.add_tokens(NAMES)
    chosen = section(max_length=20, mlm_probability=0.3, mean_noise_span_length=2.0)
    task = task_of(chosen)
    rows = task.encode(tokenizer, chosen)({"text": ["oil", "oil shares rose " * 15], "row": [0, 1]})
    assert set(rows["row"]) == {1}, "of a single token nothing can be hidden"
    columns = {name: rows[name] for name in ("input_ids", "row", "piece")}
    drawn = WithDraws(Dataset.from_dict(columns), seed=0)
    batch = task.collate(tokenizer, chosen)([drawn[n] for n in range(len(drawn))])
    places = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        ids, labels = ids[mask == 1].tolist(), labels[labels != IGNORED].tolist()
        assert ids[0] == tokenizer.cls_token_id and ids[-1] == labels[-1] == tokenizer.sep_token_id
        found = restored(ids[1:-1], labels[:-1], range(len(tokenizer) - 4, len(tokenizer)))
        assert found in rows["input_ids"]
        places.append([n for n, one in enumerate(ids) if one >= len(tokenizer) - 4])
    assert len(places) > 1 and places[0] != places[1], "each piece of a text has draws of its own"


def test_a_run(tiny_bert, texts, tmp_path):  # noqa: F811
    chosen = {"type": "span-corruption", "max_length": 24}
    made = recipe(tiny_bert, texts, T5, chosen, {"max_new_tokens": 12})
    made = made.model_copy(update={"model": made.model.model_copy(update={"added_tokens": NAMES})})
    run(made, tmp_path / "run")
    metrics = read_metrics(tmp_path / "run")
    again = zoo.evaluation.run(tmp_path / "run")
    assert again["test_loss"] == pytest.approx(metrics["test_loss"]) and metrics["test_perplexity"] > 1
    (answer,) = zoo.prediction.run(tmp_path / "run", ["oil <extra_id_0> rose"])
    tokenizer, model = (auto.from_pretrained(tmp_path / "run") for auto in (AutoTokenizer, AutoModelForSeq2SeqLM))
    written = model.generate(**tokenizer("oil <extra_id_0> rose", return_tensors="pt"))[0]
    kept = [one for one in written.tolist() if one not in (tokenizer.pad_token_id, tokenizer.sep_token_id)]
    assert answer["predicted"] == tokenizer.decode(kept)
    with pytest.raises(UserError, match="text 0 has no <extra_id_0>"):
        zoo.prediction.run(tmp_path / "run", ["oil rose"])
    card = (tmp_path / "run" / "README.md").read_text()
    assert "pipeline_tag: text2text-generation" in card
    # what comes next begins where this ends
    steps = {"max_steps": 2, "eval_steps": 1, "save_steps": 1}
    summary = recipe(tiny_bert, texts, T5, {"type": "summarization", "max_length": 40}, {}, **steps)
    start = summary.model.model_copy(update={"path": str(tmp_path / "run"), "tokenizer": None, "config": {}})
    run(summary.model_copy(update={"model": start}), tmp_path / "next")
    assert AutoTokenizer.from_pretrained(tmp_path / "next").get_vocab()["<extra_id_0>"]


def test_refused(tiny_bert, texts, tmp_path):  # noqa: F811
    def refused(folder, config=T5, **task) -> str:
        made = recipe(tiny_bert, folder, config, {"type": "span-corruption", **task}, {})
        added = made.model.model_copy(update={"added_tokens": NAMES[:1]})
        with pytest.raises(UserError) as caught:
            run(made.model_copy(update={"model": added}), tmp_path / "run")
        return str(caught.value)

    assert "has 1 of the 7 tokens that stand for hidden spans, <extra_id_0> to <extra_id_6>" in refused(texts)
    assert "task.max_length: 2; two tokens, of which one is hidden, take 4" in refused(texts, max_length=2)
    assert "no AutoModelForSeq2SeqLM" in refused(texts, {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2})
    (tmp_path / "one").mkdir()
    for split in ("train", "test"):
        write_jsonl(tmp_path / "one" / f"{split}.jsonl", [{"text": "oil"}] * 20)
    assert "no text has two tokens" in refused(tmp_path / "one", max_length=8)
