"""Tokenizers that are learned: what each kind makes of text, in a run and as a stage."""

import json

import pytest
from transformers import AutoTokenizer

from tests.conftest import read_r8, write_csv
from tests.test_runs import recipe
from zoo import tokenizer as stage
from zoo import train
from zoo.data import load_splits
from zoo.data_sections import DataSection
from zoo.errors import UserError
from zoo.recipe import Recipe
from zoo.recipe_loading import load_recipe
from zoo.sections import TokenizerSection

FOREIGN = "na\xefve \u6f22\u5b57 \U0001f40e"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("texts") / "train.csv", read_r8("train", 200))


@pytest.fixture(scope="module")
def rows(texts):
    data = DataSection.model_validate({"path": str(texts), "columns": {"text": "text"}, "validation": 20})
    return load_splits(data, ["text"], 1)


@pytest.mark.parametrize(
    ("kind", "keys", "algorithm", "around", "lossless"),
    [
        ("bert", {}, "WordPiece", ("[CLS]", "[SEP]"), False),
        ("bert", {"options": {"do_lower_case": False}}, "WordPiece", ("[CLS]", "[SEP]"), False),
        ("gpt2", {}, "BPE", (None, None), True),
        ("roberta", {}, "BPE", ("<s>", "</s>"), True),
        ("t5", {}, "Unigram", (None, "</s>"), False),
        ("t5", {"byte_fallback": True}, "Unigram", (None, "</s>"), True),
        ("albert", {"byte_fallback": True}, "Unigram", ("[CLS]", "[SEP]"), False),
    ],
)
def test_each_kind(rows, tmp_path, kind, keys, algorithm, around, lossless):
    section = TokenizerSection.model_validate({"type": kind, "vocab_size": 900, **keys})
    made = stage.learned(section, rows.train)
    stage.save(made, tmp_path / "learned")
    opened = AutoTokenizer.from_pretrained(tmp_path / "learned")
    assert type(opened.backend_tokenizer.model).__name__ == algorithm and len(opened) <= 900
    text = rows.validation["text"][0]
    for one in (text, FOREIGN):
        assert opened(one)["input_ids"] == made(one)["input_ids"]
    tokens = opened.convert_ids_to_tokens(opened(text)["input_ids"])
    assert around[0] in (None, tokens[0]) and around[1] in (None, tokens[-1])
    found = stage.measured(opened, rows.validation["text"])
    assert 1 < found["tokens_per_word"] < 3 and 2 < found["bytes_per_token"] < 5, "words of the corpus are in it"
    if lossless:
        assert found["lossless"] == 1 and stage.measured(opened, [FOREIGN])["lossless"] == 1
        assert stage.measured(opened, [FOREIGN])["unknown"] == 0
    elif kind == "albert":
        assert stage.measured(opened, ["\u6f22"])["unknown"] == 0, "it has no case, and no accents, but bytes"
    else:
        assert stage.measured(opened, [FOREIGN])["unknown"] > 0
    again = stage.learned(section, rows.train)
    assert again.get_vocab() == made.get_vocab(), "the same texts give the same vocabulary"
    if kind == "bert":
        assert ("[UNK]" in made.tokenize("WHEAT")) == bool(keys), "the corpus has small letters only"


def test_what_cannot_be_learned(rows, tmp_path):
    def refused(**keys) -> str:
        with pytest.raises(UserError) as caught:
            stage.learned(TokenizerSection.model_validate({"type": "bert", "vocab_size": 900, **keys}), rows.train)
        return str(caught.value)

    assert "model.tokenizer.vocab_size: 5; special tokens and bytes alone are more" in refused(vocab_size=5)
    assert "vocab_size: 300; special tokens" in refused(type="t5", byte_fallback=True, vocab_size=300)
    assert "options.do_lowercase: BertTokenizer has no such option; did you mean do_lower_case?" in refused(
        options={"do_lowercase": True}
    )
    (tmp_path / "r.yaml").write_text(
        "name: r\nmodel: {size: bert-tiny, tokenizer: {type: bert, vocab_size: 9, byte_fallback: true}}\n"
        "task: {type: fill-mask}\ndata: {path: x}\n"
    )
    with pytest.raises(UserError, match=r"tokenizer\.byte_fallback: bert: WordPiece has no bytes"):
        load_recipe(str(tmp_path / "r.yaml"))


def test_a_run_learns_its_own_and_keeps_it(texts, tmp_path, capsys):
    model = {
        "config": {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "tokenizer": {"type": "bert", "vocab_size": 600},
    }
    data = {"path": str(texts), "columns": {"text": "text"}, "validation": 20}
    made = Recipe.model_validate(recipe("x", {"type": "fill-mask"}, data).model_dump() | {"model": model})
    with pytest.raises(UserError, match=r"task\.max_length: 4000, but the model has 512 positions"):
        too_long = made.model_copy(update={"task": made.task.model_copy(update={"max_length": 4000})})
        train.run(too_long, tmp_path / "run")
    train.run(made, tmp_path / "run")  # what was refused has left nothing behind
    kept = AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoints" / "tokenizer")
    finished = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert finished.get_vocab() == kept.get_vocab() and 300 < len(finished) <= 600
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["vocab_size"], config["pad_token_id"]) == (len(finished), finished.pad_token_id)
    (tmp_path / "run" / "metrics.json").unlink()
    capsys.readouterr()
    train.run(made, tmp_path / "run", resume=True)
    assert "tokenizer: bert, at most" not in capsys.readouterr().out, "that of the run goes on"

    metrics = stage.run(made, tmp_path / "alone")
    assert metrics["vocab_size"] == len(finished) and json.loads((tmp_path / "alone" / "metrics.json").read_text())
    assert AutoTokenizer.from_pretrained(tmp_path / "alone").get_vocab() == finished.get_vocab()
    with pytest.raises(UserError, match="is there already"):
        stage.run(made, tmp_path / "alone")
