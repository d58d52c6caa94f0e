"""Translation: its metrics by hand, columns within columns, and a run of a T5 from random weights on real pairs."""

import gettext
from pathlib import Path

import pytest
import sacrebleu
from datasets import Dataset, Features, Translation
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import zoo.baselines
import zoo.evaluation
import zoo.prediction
from tests.test_runs import read_lines, read_metrics, write_jsonl
from tests.test_writing import T5
from tests.test_writing import recipe as written
from zoo.building import training_arguments
from zoo.data import load_splits
from zoo.data_sections import DataSection
from zoo.encoding import encoded
from zoo.errors import UserError
from zoo.recipe import Recipe
from zoo.sources import resolve
from zoo.task_types import TASK_TYPES
from zoo.tasks import task_of
from zoo.tasks.translation import TRANSLATED, translated
from zoo.train import run

WTFORMS = "pypi://wtforms@3.3.2/wtforms/locale/de/LC_MESSAGES"
NESTED = {"text": "translation.en", "translation": "translation.de"}
TASK = {"type": "translation", "max_length": 32, "max_target_length": 14, "prefix": "to German: "}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """What WTForms says in English and in German: 24 pairs to train on and the other 9, as hub sets have them."""
    with (Path(resolve(WTFORMS, kind="dataset").location) / "wtforms.mo").open("rb") as file:
        catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    said = [(key if isinstance(key, str) else key[0], words) for key, words in catalogue.items() if key]
    rows = [{"id": str(n), "translation": {"en": en, "de": de}} for n, (en, de) in enumerate(said)]
    assert len(rows) == 33 and "Keine gültige Auswahl." in [row["translation"]["de"] for row in rows]
    folder = tmp_path_factory.mktemp("pairs")
    write_jsonl(folder / "train.jsonl", rows[:24])
    write_jsonl(folder / "test.jsonl", rows[24:])
    return folder


def recipe(tokenizer, folder, **train) -> Recipe:
    made = written(tokenizer, folder, T5, TASK, {}, **train)
    return made.model_copy(update={"data": made.data.model_copy(update={"columns": NESTED})})


@pytest.fixture(scope="module")
def directory(tiny_bert, pairs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("translation") / "run"
    run(recipe(tiny_bert, pairs, metric_for_best_model="chrf"), folder)
    return folder


# Metrics


def test_metrics_by_hand():
    # of words, and of two, three and four of them in a row: 5 of 6, 3 of 5, 2 of 4 and 1 of 3 are there
    found = translated(["the cat sat on the mat"], ["the cat sat on a mat"])
    assert found["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4))
    # of letters one of two, of pairs of them none: precision and recall 1/4
    assert translated(["ab"], ["ac"])["chrf"] == pytest.approx(25)
    assert translated(["a b c d", "e"], ["a b c d", "E"])["exact_match"] == 0.5
    assert translated(["a b c d"] * 2, ["a b c d"] * 2) == pytest.approx({"bleu": 100, "chrf": 100, "exact_match": 1})
    assert translated(["x"], [""]) == {"bleu": 0.0, "chrf": 0.0, "exact_match": 0.0}


def test_bleu_is_that_of_the_docs():
    bleu, docs = sacrebleu.BLEU(), (Path(__file__).parents[1] / "docs" / "tasks.md").read_text()
    bleu.corpus_score(["a"], [["a"]])
    chrf = sacrebleu.CHRF()
    chrf.corpus_score(["a"], [["a"]])
    for metric in (bleu, chrf):
        assert str(metric.get_signature()).partition("|version")[0] in docs


# Columns within columns


def load(path: Path, columns: dict):
    section = DataSection.model_validate({"path": str(path), "columns": columns})
    return load_splits(section, TASK_TYPES["translation"].roles, 0)


def test_columns_within_columns(pairs, tmp_path):
    rows = {
        row["row"]: row
        for part in ("train", "validation")
        for row in getattr(load(pairs / "train.jsonl", NESTED), part)
    }
    for number, line in enumerate(read_lines(pairs / "train.jsonl")):
        assert rows[number] == {
            "text": line["translation"]["en"], "translation": line["translation"]["de"], "row": number,
        }  # fmt: skip
    typed = Features({"translation": Translation(["de", "en"])})
    Dataset.from_dict({"translation": [{"de": "eins", "en": "one"}] * 8}, features=typed).to_parquet(
        tmp_path / "t.parquet"
    )
    assert load(tmp_path / "t.parquet", NESTED).train[0]["translation"] == "eins"


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({}, "data.columns.text: the train split of {} has no column 'text'; it has {names}"),
        ({**NESTED, "text": "translation.eng"}, "no column 'translation.eng'; it has {names}; did you mean"),
        ({"text": "translation.en"}, "data.columns.translation: the train split of {} has no column 'translation'; it"),
        ({"text": "id"}, "column 'translation' holds {'en': 'CSRF failed.', 'de': 'CSRF fehlgeschlagen.'}, not a text"),
    ],
)  # fmt: skip
def test_columns_that_are_not_there(pairs, columns, says):
    with pytest.raises(UserError) as caught:
        load(pairs / "train.jsonl", columns)
    says = says.replace("{}", str(pairs / "train.jsonl")).replace("{names}", "id, translation.en, translation.de")
    assert says in str(caught.value)


@pytest.mark.parametrize(("target", "says"), [(None, "holds nothing"), (" ", "is empty; remove the row")])
def test_a_translation_that_is_missing(tmp_path, target, says):
    rows = [{"text": "one", "translation": "eins"}] * 5 + [{"text": "two", "translation": target}]
    with pytest.raises(UserError, match=f"train row 5: .*{says}"):
        load(write_jsonl(tmp_path / "rows.jsonl", rows), {})


# A run


def test_a_run(directory, pairs):
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForSeq2SeqLM.from_pretrained(directory)
    assert type(model).__name__ == "T5ForConditionalGeneration"
    lines, rows = read_lines(directory / "predictions.jsonl"), read_lines(pairs / "test.jsonl")
    for line, row in zip(lines, rows, strict=True):
        inputs = tokenizer(
            f"to German: {row['translation']['en']}", truncation=True, max_length=32, return_tensors="pt"
        )
        assert line["predicted"] == tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True)
        gold = tokenizer(row["translation"]["de"], truncation=True, max_length=14)["input_ids"]
        assert line["gold"] == tokenizer.decode(gold, skip_special_tokens=True)
    metrics = read_metrics(directory)
    sides = [[line[side] for line in lines] for side in ("predicted", "gold")]
    assert metrics["test_bleu"] == pytest.approx(sacrebleu.corpus_bleu(sides[0], [sides[1]]).score)
    assert metrics["test_chrf"] == pytest.approx(sacrebleu.corpus_chrf(sides[0], [sides[1]]).score)
    again = zoo.evaluation.run(directory)
    assert [again[name] for name in ("test_chrf", "test_loss", "test_exact_match")] == pytest.approx(
        [metrics[name] for name in ("test_chrf", "test_loss", "test_exact_match")]
    )
    # the run's own data, with its columns within a column
    answers = list(zoo.prediction.run(directory, file=pairs / "test.jsonl"))
    assert [answer["predicted"] for answer in answers] == sides[0]
    assert [answer["text"] for answer in answers] == [row["translation"]["en"] for row in rows]


@pytest.mark.parametrize("metric", TRANSLATED)
def test_more_is_better(pairs, tmp_path, metric):
    assert training_arguments(recipe("none", pairs, metric_for_best_model=metric), tmp_path).greater_is_better


def test_the_card_of_a_translator(directory, monkeypatch, capsys):
    monkeypatch.chdir(directory)
    card = (directory / "README.md").read_text()
    assert "pipeline_tag: translation" in card
    capsys.readouterr()
    exec(card.partition("```python\n")[2].partition("```")[0], {})
    (answer,) = zoo.prediction.run(directory, ["Wheat shipments rose"])
    assert "tokenizer('to German: Wheat shipments rose'," in card
    assert capsys.readouterr().out == answer["predicted"] + "\n"


def test_targets_that_are_cut_are_counted(tiny_bert, pairs):
    tokenizer, made = AutoTokenizer.from_pretrained(tiny_bert), recipe(tiny_bert, pairs)
    rows = load(pairs / "test.jsonl", NESTED).train
    _, words = encoded(rows, made, task_of(made.task), tokenizer, 0)
    longer = sum(len(ids) > 14 for ids in tokenizer(list(rows["translation"]))["input_ids"])
    assert 0 < longer < len(rows) and words.endswith(f"; {longer} targets cut at 14")


def test_the_baseline_is_the_text_itself(pairs):
    rows = [row["translation"] for row in read_lines(pairs / "test.jsonl")]
    sides = [row["en"] for row in rows], [[row["de"] for row in rows]]
    bleu, chrf = sacrebleu.corpus_bleu(*sides).score, sacrebleu.corpus_chrf(*sides).score
    expected = {"bleu": pytest.approx(bleu), "chrf": pytest.approx(chrf), "exact_match": 0.0}
    assert chrf > 10 and zoo.baselines.run(recipe("none", pairs)) == {"the text itself": expected}
