"""Encoded rows are found again by what they were made of, and by nothing else."""

import pytest

from tests.conftest import read_r8, write_csv
from tests.test_runs import recipe
from zoo.data import load_splits
from zoo.encoding import encoded
from zoo.loading import load_processor
from zoo.tasks import task_of


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "zoo" / "encoded"


def encode(model, file, seed=1, **task):
    made = recipe(model, {"type": "text-classification", **task}, {"path": str(file), "test": 10})
    chosen = task_of(made.task)
    tokenizer = load_processor(made.model, "tokenizer")
    splits = load_splits(made.data, chosen.roles, seed, kind=chosen.labels)
    tokenizer("what a call leaves behind", truncation=True, max_length=5, padding="max_length")
    return encoded(splits.test, made, chosen, tokenizer, seed)[0]


def test_the_same_rows_are_found_wherever_they_lie(tiny_bert, tmp_path, home):
    rows = read_r8("train", 40)
    first = encode(tiny_bert, write_csv(tmp_path / "here.csv", rows))
    [kept] = home.iterdir()
    written = kept.stat().st_mtime_ns
    (tmp_path / "there").mkdir()
    again = encode(tiny_bert, write_csv(tmp_path / "there" / "other.csv", rows), seed=2)
    assert list(home.iterdir()) == [kept] and kept.stat().st_mtime_ns == written
    assert again.to_dict() == first.to_dict() and len(first) == 10


def test_what_differs_is_made_anew(tiny_bert, tmp_path, home):
    rows = read_r8("train", 40)
    before = encode(tiny_bert, write_csv(tmp_path / "a.csv", rows))
    held = before["row"][0]
    rows[held] = (f"x {rows[held][0]}", rows[held][1])
    after = encode(tiny_bert, write_csv(tmp_path / "a.csv", rows))
    assert after["input_ids"][0] != before["input_ids"][0] and after["input_ids"][1:] == before["input_ids"][1:]
    short = encode(tiny_bert, tmp_path / "a.csv", max_length=8)
    assert max(map(len, short["input_ids"])) == 8
    assert len(list(home.iterdir())) == 3
