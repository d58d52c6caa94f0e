"""Several sources by weight, and what comes twice."""

from collections import Counter

import pytest
from PIL import Image

from tests.conftest import read_r8, write_csv
from tests.test_runs import write_jsonl
from zoo.data import load_splits
from zoo.data_sections import DataSection
from zoo.errors import UserError
from zoo.labels import LABEL_KINDS
from zoo.recipe_loading import load_recipe

ROLES = ("text", "label")


def load(seed=0, roles=ROLES, kind="class", **section):
    made = DataSection.model_validate(section)
    return load_splits(made, roles, seed, kind=LABEL_KINDS[kind] if kind else None)


@pytest.fixture
def parts(tmp_path):
    """60 rows of wheat with a test split, and 40 of oil."""
    (tmp_path / "wheat").mkdir()
    write_csv(tmp_path / "wheat" / "train.csv", [(f"wheat {n}", "ab"[n % 2]) for n in range(60)])
    write_csv(tmp_path / "wheat" / "test.csv", [(f"wheat test {n}", "a") for n in range(5)])
    write_jsonl(tmp_path / "oil.jsonl", [{"body": f"oil {n}", "label": "bc"[n % 2]} for n in range(40)])
    wheat = {"path": str(tmp_path / "wheat"), "files": {"train": "train.csv", "test": "test.csv"}, "weight": 0.25}
    return [wheat, {"path": str(tmp_path / "oil.jsonl"), "columns": {"text": "body"}, "weight": 0.75}]


def test_rows_come_by_weight(parts):
    splits = load(mixture=parts, validation=10)
    assert splits.labels == ["a", "b", "c"] and splits.test.num_rows == 5
    validation, train = list(splits.validation["text"]), list(splits.train["text"])
    assert Counter(text.split()[0] for text in validation) == {"wheat": 10, "oil": 10}
    assert not {*validation} & {*train}, "no row that is held out is drawn"
    counts = Counter(text.split()[0] for text in train)
    assert counts["oil"] / len(train) == pytest.approx(0.75, abs=0.07)
    everything = {f"wheat {n}" for n in range(60)} | {f"oil {n}" for n in range(40)}
    assert {*train} == everything - {*validation}
    assert list(splits.train["row"]) == list(range(len(train)))
    note = next(note for note in splits.notes if note.startswith("mixture"))
    assert (
        note == f"mixture: {counts['wheat']} rows ({counts['wheat'] / len(train):.1%}) of the 50 of {parts[0]['path']}"
    )
    assert train == list(load(mixture=parts, validation=10).train["text"]) != list(load(1, mixture=parts).train["text"])
    short = load(mixture=parts, validation=10, stopping_strategy="first_exhausted").train
    assert len(short) < len(train) and max(Counter(short["text"]).values()) == 1


def test_parts_that_do_not_go_together(parts, tmp_path):
    write_jsonl(tmp_path / "numbers.jsonl", [{"body": f"oil {n}", "label": n % 2} for n in range(40)])
    with pytest.raises(UserError, match=r"data\.mixture\.1: its train has label as .*int64.* same columns of the same"):
        load(mixture=[parts[0], parts[1] | {"path": str(tmp_path / "numbers.jsonl")}])
    pairs = [{"text": "a", "text_pair": "b", "label": "a"}] * 20
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    with pytest.raises(
        UserError, match=r"data\.mixture\.1: its train has text_pair as .* where the first source has none"
    ):
        load(
            roles=("text", "text_pair", "label"),
            mixture=[parts[0], {"path": str(tmp_path / "pairs.jsonl"), "weight": 0.75}],
        )


def test_mixtures_that_a_recipe_cannot_mean(tmp_path):
    file = tmp_path / "r.yaml"
    base = "name: r\nmodel: {path: m}\ntask: {type: text-classification}\ndata:\n"
    file.write_text(
        f"{base}  mixture: [{{path: a, weight: 0.5}}, {{path: b, weight: 0.4}}]\n  columns: {{text: body}}\n"
    )
    with pytest.raises(UserError) as caught:
        load_recipe(str(file))
    assert "data.mixture: the weights of its parts add up to 0.9; make it 1" in str(caught.value)
    assert "data.columns: a mixture has one in each of its parts" in str(caught.value)
    file.write_text(f"{base}  stopping_strategy: all_exhausted\n")
    with pytest.raises(UserError) as caught:
        load_recipe(str(file))
    assert "data.path: required, and not there" in str(caught.value)
    assert "data.stopping_strategy: there is no data.mixture that could end" in str(caught.value)
    file.write_text(f"{base}  mixture: [{{path: a, weight: 1.0, columns: {{image: x}}}}]\n")
    with pytest.raises(UserError, match=r"data\.mixture\.0\.columns\.image: text-classification does not read it"):
        load_recipe(str(file))
    file.write_text(f"{base}  mixture: [{{path: a, weight: 0.5, drop_empty: true}}, {{path: b, weight: 0.5}}]\n")
    recipe = load_recipe(str(file))
    file.write_text(recipe.to_yaml())
    assert load_recipe(str(file)) == recipe


def test_duplicates_are_left_out(tmp_path):
    articles = [(text, label) for text, label in read_r8("train", 60)]
    longest = max(articles, key=lambda row: len(row[0]))
    words = longest[0].split()
    changed = " ".join([*words[:-1], "otherwise"])
    copies = [(articles[3][0].upper(), "other"), (f"  {articles[4][0]}\n", articles[4][1]), (changed, longest[1])]
    test = [(articles[7][0], articles[7][1]), ("nothing like it at all", "acq")]
    write_csv(tmp_path / "train.csv", [*articles, *copies])
    write_csv(tmp_path / "test.csv", test)
    files = {"files": {"train": "train.csv", "test": "test.csv"}, "path": str(tmp_path)}
    assert "overlap: 1 of 2 test rows are in train too (data.deduplicate takes them out)" in load(**files).notes
    for kind, left in (("exact", 60), ("near", 59)):
        splits = load(**files, deduplicate=kind)
        rows = [*splits.train["row"], *splits.validation["row"]]
        assert len(rows) == left and 7 not in rows and 60 not in rows and (62 in rows) == (kind == "exact")
        assert f"data.deduplicate: {63 - left} of 63 train rows left out ({kind} duplicates)" in splits.notes
        assert not any(note.startswith("overlap") for note in splits.notes)
    assert load(**files, deduplicate="near", similarity=0.5).notes[0] != load(**files, deduplicate="near").notes[0]


def test_images_alike(tmp_path):
    for name, colour in (("a", 0), ("b", 0), ("c", 200)):
        Image.new("L", (8, 8), colour).save(tmp_path / f"{name}.png")
    rows = [{"image": f"{name}.png", "label": name} for name in "abcbc"]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    splits = load(roles=("image", "label"), path=str(tmp_path / "rows.jsonl"), deduplicate="exact", validation=1)
    assert "data.deduplicate: 3 of 5 train rows left out (exact duplicates)" in splits.notes


def test_nothing_left_is_refused_and_test_rows_are_the_same_for_each_seed(tmp_path):
    rows = [(f"text {n}", "ab"[n % 2]) for n in range(60)]
    write_csv(tmp_path / "train.csv", rows)
    files = {"train": "train.csv", "validation": "train.csv"}
    with pytest.raises(UserError, match="nothing is left to train on"):
        load(path=str(tmp_path), files=files, deduplicate="exact")
    first, second = (load(seed, path=str(tmp_path / "train.csv"), limit=30, test=6, validation=4) for seed in (1, 2))
    assert list(first.test["row"]) == list(second.test["row"])
    assert {*first.validation["row"]} != {*second.validation["row"]}
    assert first.train.num_rows == 20
