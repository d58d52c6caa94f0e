"""Data that are made: what they say is so, they are the same everywhere, and what is refused."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from statistics import median

import pytest

from zoo import generated, sources
from zoo.data import load_splits
from zoo.environment import data_of
from zoo.errors import UserError
from zoo.generated import directory, listops, smaller
from zoo.recipe_loading import load_recipe

SMALL = "generated://listops?max_depth=4&min_length=8&max_length=64&train=50&validation=10&test=20"


def value_of(tokens: list[str]) -> int:
    """What an expression comes to, read from its end."""
    stack: list = []
    for token in reversed(tokens):
        if not token.startswith("["):
            stack.append(token if token == "]" else int(token))
            continue
        values = []
        while (top := stack.pop()) != "]":
            values.append(top)
        found = {"[MIN": min, "[MAX": max, "[MED": lambda x: int(median(x)), "[SM": lambda x: sum(x) % 10}[token](
            values
        )
        stack.append(found)
    (value,) = stack
    return value


def depth_of(tokens: list[str]) -> int:
    """Of the deepest argument, the whole expression being at 1."""
    depth = deepest = 1
    for token in tokens:
        depth += token.startswith("[")
        depth -= token == "]"
        deepest = max(deepest, depth)
    return deepest


@pytest.mark.parametrize(("settings", "count"), [({}, 20), ({"max_depth": 4, "min_length": 8, "max_length": 128}, 400)])
def test_listops_are_right_and_within_their_bounds(settings, count):
    rows = list(islice(listops(**settings), count))
    low, high = settings.get("min_length", 500), settings.get("max_length", 2000)
    for row in rows:
        tokens = row["text"].split()
        assert str(value_of(tokens)) == row["label"]
        assert low < len(tokens) < high and depth_of(tokens) <= settings.get("max_depth", 10)
    assert len({row["text"] for row in rows}) == count
    if count > 100:
        words = Counter(token for row in rows for token in row["text"].split() if token.startswith("["))
        assert all(0.2 < number / words.total() < 0.3 for number in words.values()), words
        # "majority baseline about 17 %" of Long Range Arena
        assert 0.12 < Counter(row["label"] for row in rows).most_common(1)[0][1] / count < 0.22


def test_the_same_everywhere_and_others_with_another_seed():
    assert [row["text"] for row in islice(listops(3, 3, 3, 4, 30), 2)] == [
        row["text"] for row in islice(listops(3, 3, 3, 4, 30), 2)
    ]
    first = next(listops(0, 4, 10, 8, 64))
    assert first != next(listops(1, 4, 10, 8, 64))


def test_a_directory_is_made_once_and_whole(tmp_path, monkeypatch):
    made = directory(SMALL, tmp_path)
    rows = {file.stem: file.read_text().splitlines() for file in made.iterdir()}
    assert {name: len(lines) for name, lines in rows.items()} == {"train": 50, "validation": 10, "test": 20}
    assert len({line for lines in rows.values() for line in lines}) == 80, "no expression stands in two splits"
    monkeypatch.setattr(generated, "GENERATORS", {"listops": None})
    with monkeypatch.context() as patch:
        patch.setattr(generated, "_defaults", lambda generator: {"seed": 0, "max_depth": 10, "max_arguments": 10,
                                                                 "min_length": 500, "max_length": 2000})  # fmt: skip
        assert directory(SMALL, tmp_path) == made
    assert [path.name for path in tmp_path.iterdir()] == [made.name]


def test_fewer_rows_of_train_leave_the_others_as_they_are(tmp_path):
    whole, part = directory(SMALL, tmp_path), directory(SMALL.replace("train=50", "train=5"), tmp_path)
    for split in ("validation", "test"):
        assert (whole / f"{split}.jsonl").read_text() == (part / f"{split}.jsonl").read_text()
    assert (whole / "train.jsonl").read_text().startswith((part / "train.jsonl").read_text())


def test_what_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def breaks(**settings):
        yield {"text": "1", "label": "1"}
        raise RuntimeError

    monkeypatch.setattr(generated, "_defaults", lambda generator: {})
    monkeypatch.setitem(generated.GENERATORS, "listops", breaks)
    with pytest.raises(RuntimeError):
        directory("generated://listops", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_reads_them(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    recipe = load_recipe("bert/train-listops", [f"data.path={SMALL}"])
    splits = load_splits(recipe.data, ("text", "label"), 42)
    assert (len(splits.rows), len(splits.validation), len(splits.test)) == (50, 10, 20)
    said = data_of(recipe.data)
    assert said["path"] == SMALL and len(said["files"]) == 3
    assert sources.resolve(SMALL, kind="dataset").shown(SMALL) == SMALL
    small = recipe.smoke().data.path
    assert "train=50" in small and "max_depth=4" in small
    full = load_recipe("bert/train-listops-lra").smoke().data.path
    assert full.startswith("generated://listops?") and "train=512" in full and "test=512" in full


REFUSED = [
    ("generated://listop", "nothing of that name is generated; did you mean listops"),
    ("generated://listops/here", "nothing of that name is generated"),
    ("generated://listops?max_dept=4", "unknown key max_dept; did you mean max_depth"),
    ("generated://listops?train=0", "train=0: give a whole number of at least 1"),
    ("generated://listops?seed=-1", "seed=-1: give a whole number"),
    ("generated://listops?min_length=99&max_length=100", "is more than min_length, 99, and less than max_length, 100"),
    ("generated://listops?max_length=300", "no length is more than min_length, 500, and less than max_length, 300"),
    ("generated://listops?max_arguments=1", "max_arguments=1: an operator has at least 2"),
    ("generated://listops?max_depth=1&min_length=0&test=11", "only 10 different rows were found for test, not 11"),
]


@pytest.mark.parametrize(("path", "message"), REFUSED)
def test_refused_in_words(path, message, tmp_path, monkeypatch):
    monkeypatch.setattr(generated, "MOST_IN_VAIN", 1000)
    with pytest.raises(UserError, match=message):
        directory(path, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_not_generated():
    with pytest.raises(UserError, match="model 'generated://listops'"):
        sources.resolve("generated://listops", kind="model")


def test_smaller_keeps_the_rest():
    assert smaller(SMALL, 16) == SMALL.replace("train=50", "train=16").replace("test=20", "test=16")


def test_rows_are_json_lines(tmp_path):
    line = Path(directory(SMALL, tmp_path) / "test.jsonl").read_text().splitlines()[0]
    assert set(json.loads(line)) == {"text", "label"}
