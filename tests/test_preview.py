"""`zoo preview`: the samples of a recipe as a model sees them."""

import io

import pytest
from rich.console import Console

from tests.conftest import read_r8, write_csv
from tests.test_runs import recipe, write_jsonl
from zoo.errors import UserError
from zoo.preview import in_colour, run


@pytest.fixture
def texts(tmp_path):
    return write_csv(tmp_path / "train.csv", read_r8("train", 24))


def shown(sample) -> str:
    stream = io.StringIO()
    Console(file=stream, width=400).print(in_colour(sample))
    return stream.getvalue()


def test_hidden_words_stand_beside_what_they_were(tiny_bert, texts):
    made = recipe(tiny_bert, {"type": "fill-mask", "mlm_probability": 0.4}, {"path": str(texts)})
    samples = run(made, rows=4)
    assert len(samples) == 4 and all(len(sample["tokens"]) == len(sample["labels"]) <= 32 for sample in samples)
    hidden = [pair for sample in samples for pair in zip(sample["tokens"], sample["labels"], strict=True) if pair[1]]
    assert {"[MASK]"} < {token for token, _ in hidden}, "some are shown as they are, or as another word"
    assert all(sample["labels"][0] is None and sample["tokens"][0] == "[CLS]" for sample in samples)
    text = shown(samples[0])
    assert text.startswith(f"row {samples[0]['row']}\n") and "[MASK]=" in text
    coloured = in_colour(samples[0])
    red = [coloured.plain[span.start : span.end] for span in coloured.spans if span.style == "red"]
    assert "[MASK]" in red and {"green", "dim"} <= {span.style for span in coloured.spans}
    assert samples == run(made, rows=4), "the draws of the first epoch, each time"


def test_classes_tags_and_targets(tiny_bert, texts, tmp_path):
    made = recipe(tiny_bert, {"type": "text-classification"}, {"path": str(texts), "validation": 4})
    sample = run(made, "validation", rows=1)[0]
    assert sample["label"] in ("earn", "acq", "crude") and "labels" not in sample
    assert "label: " in shown(sample)
    rows = [{"tokens": ["Rice", "rose", "unbelievably"], "tags": ["B-GOOD", "O", "O"]}] * 12
    made = recipe(tiny_bert, {"type": "token-classification"}, {"path": str(write_jsonl(tmp_path / "t.jsonl", rows))})
    sample = run(made, rows=1)[0]
    tags = [tag for tag in sample["labels"] if tag is not None]
    assert tags == ["B-GOOD", "O", "O"] and len(sample["tokens"]) == len(sample["labels"]) > 3
    with pytest.raises(UserError, match="--split test: the data has no such split"):
        run(made, "test")


def test_the_beginning_of_a_stream(tiny_bert, texts):
    data = {"path": str(texts), "streaming": True, "validation": 4}
    samples = run(recipe(tiny_bert, {"type": "fill-mask"}, data), rows=30)
    assert len(samples) == 20, "without those that are held out"
