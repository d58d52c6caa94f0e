"""Answers as spans of a context: SQuAD's metrics by hand, windows, spans, runs from end to end, data made of ACLSum."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

import zoo.evaluation
import zoo.prediction
from tests.conftest import read_r8
from tests.test_runs import read_lines, read_metrics, recipe, write_jsonl
from zoo.card import card
from zoo.data import load_splits
from zoo.data_sections import DataSection
from zoo.derived import DERIVED
from zoo.encoding import encoded
from zoo.errors import UserError
from zoo.recipe import Recipe
from zoo.recipe_loading import load_recipe
from zoo.sections import TaskSection
from zoo.tasks import task_of
from zoo.tasks.answer_spans import OUTSIDE, best_answers, candidates, no_answer, positions, windows
from zoo.tasks.squad import exact, f1, normalised, squad
from zoo.train import run

QA = {"type": "question-answering", "max_length": 48, "stride": 12, "version_2_with_negative": True}
QUESTION = "Who says what?"


def section(**keys) -> TaskSection:
    return TaskSection.model_validate({**QA, **keys})


def questions(split: str, count: int) -> list[dict]:
    """Where somebody says something at the beginning of a text: "said", or with the next word. Half have no answer."""
    rows = []
    for text, _ in read_r8(split, count):
        context = " ".join(text.split()[:30])
        found = re.search(r"\bsaid( \S+|$)", context)
        answers = [] if found is None else ["said", found[0]]
        gold = {"text": answers, "answer_start": [found.start() for _ in answers]}
        rows.append({"question": QUESTION, "context": context, "answers": gold})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    for split, count in (("train", 60), ("test", 15)):
        write_jsonl(folder / f"{split}.jsonl", questions(split, count))
    return {"path": str(folder), "files": {split: f"{split}.jsonl" for split in ("train", "test")}}


@pytest.fixture(scope="module")
def tokenizer(tiny_bert):
    return AutoTokenizer.from_pretrained(tiny_bert)


@pytest.fixture(scope="module")
def directory(tiny_bert, data, tmp_path_factory):
    made = tmp_path_factory.mktemp("qa") / "run"
    steps = {"max_steps": 60, "eval_steps": 30, "save_steps": 30, "metric_for_best_model": "f1"}
    run(recipe(tiny_bert, QA, data, **steps), made)
    return made


# Metrics


def test_answers_are_compared_without_case_articles_and_punctuation():
    assert normalised("The  U.S.\tdollar, an\nitem -- a (Bank)'s") == "us dollar item banks"
    # an article within a word is none
    assert normalised("theatre") == "theatre" and normalised("the a an .") == ""
    assert (exact("the dollar", "Dollar!"), exact("dollar", "dollars")) == (1.0, 0.0)
    # 2 words shared of 3 and of 4: precision 2/3, recall 2/4
    assert f1("in May the wheat rose", "wheat rose again") == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    # a word counts as often as it stands on both sides: 1 of 1, 1 of 2
    assert f1("oil oil", "oil") == pytest.approx(2 / 3)
    assert (f1("", ""), f1("", "oil"), f1("oil", ""), f1("oil", "wheat")) == (1.0, 0.0, 0.0, 0.0)


def test_the_best_of_several_answers_counts_and_none_is_an_answer():
    gold = [["in May", "May 1987"], [], [], ["oil"], ["the"]]
    found = squad(gold, ["May", "", "oil", "", ""])
    # F1 of "may": 2/3 with "in may", 2/3 with "may 1987"; right; wrong; wrong; an article is nothing
    assert found == pytest.approx({"exact_match": 2 / 5, "f1": (2 / 3 + 1 + 0 + 0 + 1) / 5})


# Windows


@pytest.mark.parametrize("stride", [0, 12, None])
def test_windows_hold_the_question_and_all_of_the_context(tokenizer, stride):
    context, question = "  ".join(text for text, _ in read_r8("train", 6)), "What  rose?"
    whole = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
    asked = tokenizer(question, add_special_tokens=False)["input_ids"]
    read = windows(tokenizer, section(stride=stride), question, context)
    joined: list = []
    for window in read:
        ids, offsets = window["input_ids"], window["offsets"]
        assert ids[: len(asked) + 2] == [tokenizer.cls_token_id, *asked, tokenizer.sep_token_id]
        assert len(ids) == len(offsets) <= 48 and ids[-1] == tokenizer.sep_token_id
        own = [tuple(pair) for pair in offsets if pair != OUTSIDE]
        assert [pair for pair in offsets if pair == OUTSIDE] == [OUTSIDE] * (len(asked) + 3)
        overlap = 0 if not joined else 16 if stride is None else stride
        assert own[:overlap] == joined[len(joined) - overlap :]
        joined += own[overlap:]
    assert joined == whole["offset_mapping"] and len(read) > 5


def test_a_long_question_leaves_less_overlap_and_a_longer_one_is_refused(tokenizer):
    question = "oil " * 41
    read = windows(tokenizer, section(), question, " ".join(["wheat"] * 20))
    # 4 tokens are left, of which half may overlap
    assert [sum(pair != OUTSIDE for pair in window["offsets"]) for window in read][:3] == [4, 4, 4] and len(read) < 60
    with pytest.raises(UserError, match=r"has 45 tokens and 3 are special, which leaves no room for a context in 48"):
        windows(tokenizer, section(), "oil " * 45, "wheat")


def test_an_answer_is_labelled_in_each_window_that_holds_it_whole(tokenizer):
    words = " ".join(text for text, _ in read_r8("train", 3)).split()
    context = " ".join(words)
    places = np.cumsum([0, *(len(word) + 1 for word in words)])
    task, rows = task_of(section()), []
    for first in range(0, 80, 7):
        text = " ".join(words[first : first + 3])
        answers = {"text": [text], "answer_start": [int(places[first])]}
        rows.append({"row": first, "question": "What?", "context": context, "answers": answers})
    made = task.encode(tokenizer, section())({name: [row[name] for row in rows] for name in rows[0]})
    by_row: dict[int, list] = {row["row"]: [] for row in rows}
    for row, ids, offsets, first, last in zip(
        *(made[name] for name in ("row", "input_ids", "offsets", "start_positions", "end_positions")), strict=True
    ):
        begin = int(places[row])
        end = begin + len(" ".join(words[row : row + 3]))
        own = [pair for pair in offsets if pair != OUTSIDE]
        holds = own[0][0] <= begin and end <= own[-1][1]
        if holds:
            assert (offsets[first][0], offsets[last][1]) == (begin, end)
            assert ids[first : last + 1] == tokenizer(context[begin:end])["input_ids"][1:-1]
        else:
            assert first == last == 0 and ids[0] == tokenizer.cls_token_id
        by_row[row].append(holds)
    assert all(any(held) for held in by_row.values()) and any(held.count(True) > 1 for held in by_row.values())
    assert not all(all(held) for held in by_row.values())


def test_answers_within_tokens_with_spaces_and_the_first_that_is_whole():
    offsets = [OUTSIDE, OUTSIDE, [4, 9], [10, 12], [12, 15], OUTSIDE]
    assert positions(offsets, {"text": ["heat i"], "answer_start": [5]}) == (2, 3)
    assert positions(offsets, {"text": [" in "], "answer_start": [9]}) == (3, 3)
    assert positions(offsets, {"text": ["the wheat", "ing"], "answer_start": [0, 12]}) == (4, 4)
    assert positions(offsets, {"text": [], "answer_start": []}) is None
    assert positions([OUTSIDE] * 3, {"text": ["a"], "answer_start": [0]}) is None


def test_without_a_class_token_the_first_stands_for_no_answer(tokenizer):
    assert no_answer(tokenizer, [7, tokenizer.cls_token_id]) == 1
    other = copy.deepcopy(tokenizer)
    other.cls_token = None
    assert no_answer(other, [7, tokenizer.cls_token_id]) == 0


def test_padding_stands_behind_whatever_the_tokenizer_likes(tokenizer):
    left = copy.deepcopy(tokenizer)
    left.padding_side = "left"
    rows = [{"input_ids": [2, 5, 3], "attention_mask": [1, 1, 1], "start_positions": 1, "end_positions": 2, "row": 4,
             "offsets": [], "none": 0, "context": "x", "answers": None},
            {"input_ids": [2, 3], "attention_mask": [1, 1], "start_positions": 0, "end_positions": 0, "row": 5,
             "offsets": [], "none": 0, "context": "x", "answers": None}]  # fmt: skip
    batch = task_of(section()).collate(left, section())(rows)
    assert set(batch) == {"input_ids", "attention_mask", "start_positions", "end_positions", "row"}
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


# Spans


def test_the_best_spans_are_those_of_all_spans():
    rng = np.random.default_rng(0)
    for count, longest, length in ((5, 4, 20), (20, 30, 12), (3, 1, 9), (500, 7, 15)):
        start, end = rng.normal(size=(2, length))
        offsets = np.array([OUTSIDE] * 3 + [[5 * n, 5 * n + 4] for n in range(length - 4)] + [OUTSIDE])
        spans = [
            (start[i] + end[j], 5 * (i - 3), 5 * (j - 3) + 4)
            for i in range(3, length - 1)
            for j in range(i, min(i + longest, length - 1))
        ]
        found = candidates(start, end, offsets, count, longest)
        assert [span[1:] for span in found] == [span[1:] for span in sorted(spans, reverse=True)[:count]]
        assert [span[0] for span in found] == pytest.approx(sorted((span[0] for span in spans), reverse=True)[:count])


def test_windows_are_searched_together():
    context = "oil rose in May"
    offsets = np.array([OUTSIDE, [0, 3], [3, 8], [9, 11]])
    later = np.array([OUTSIDE, [9, 11], [12, 15]])
    first = (np.array([4.0, 1, 0, 0]), np.array([3.0, 0, 2, 0]), offsets, 0)
    second = (np.array([1.5, -2, 3]), np.array([1.0, 0, 3]), later, 0)
    said = best_answers(section(n_best_size=3), context, [first, second])
    # null is 7 in one window and 2.5 in the other: the less sure one counts
    assert [one["text"] for one in said["n_best"]] == ["May", "oil rose", ""]
    assert [one["score"] for one in said["n_best"]] == pytest.approx(softmax([6.0, 3.0, 2.5]))
    assert (said["predicted"], said["start"], said["end"]) == ("May", 12, 15)
    alone = best_answers(section(), context, [first])
    assert (alone["predicted"], alone["start"], alone["end"]) == ("", None, None)
    # a token's own space is no part of an answer
    assert ("rose", 4, 8) in [(one["text"], one["start"], one["end"]) for one in alone["n_best"]]
    forced = best_answers(section(version_2_with_negative=False, max_answer_length=1), context, [first])
    assert forced["predicted"] == "rose" and "" not in [one["text"] for one in forced["n_best"]]
    assert all(context[one["start"] : one["end"]] == one["text"] for one in forced["n_best"])


# Runs


def test_it_learns_and_its_metrics_are_those_of_its_predictions(directory, data):
    metrics, lines = read_metrics(directory), read_lines(directory / "predictions.jsonl")
    assert {"test_exact_match", "test_f1", "eval_f1"} <= set(metrics)
    test = questions("test", 15)
    assert [line["gold"] for line in lines] == [row["answers"]["text"] for row in test]
    predicted = [line["predicted"] for line in lines]
    assert squad([line["gold"] for line in lines], predicted) == pytest.approx(
        {"exact_match": metrics["test_exact_match"], "f1": metrics["test_f1"]}
    )
    # no answer at all has 7 of 15
    assert metrics["test_f1"] > 0.6 and "" in predicted
    for line, row in zip(lines, test, strict=True):
        assert set(line) == {"id", "gold", "predicted", "start", "end", "score", "n_best"}
        assert line["predicted"] == line["n_best"][0]["text"] and 1 < len(line["n_best"]) <= 20
        there = [one for one in line["n_best"] if one["start"] is not None]
        assert all(row["context"][one["start"] : one["end"]] == one["text"] for one in there)
        assert sum(one["score"] for one in line["n_best"]) == pytest.approx(1)


def test_the_loss_is_the_official_one_of_windows_without_padding(directory, data):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForQuestionAnswering.from_pretrained(directory)
    assert type(model).__name__ == "BertForQuestionAnswering" and model.config.id2label == {0: "start", 1: "end"}
    task = task_of(section())
    splits = load_splits(DataSection.model_validate(data), task.roles, 7, kind=task.labels)
    rows, words = encoded(splits.test, load_recipe(str(directory / "recipe.yaml")), task, tokenizer, 7)
    assert words.startswith(f"15 questions, 7 of them without an answer; {len(rows):,} windows of 48 tokens; ")
    assert len(rows) > 20
    collate, losses = task.collate(tokenizer, section()), []
    for row in rows:
        batch = collate([row])
        batch.pop("row")
        losses.append(model(**batch).loss.item())
    assert read_metrics(directory)["test_loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_evaluated_again_and_on_other_data(directory, data, tmp_path):
    metrics = read_metrics(directory)
    names = ("test_loss", "test_exact_match", "test_f1")
    again = zoo.evaluation.run(directory)
    assert [again[name] for name in names] == pytest.approx([metrics[name] for name in names])
    lines, rows = read_lines(directory / "predictions.jsonl"), questions("test", 15)
    order = [*(number for number, line in enumerate(lines) if not line["gold"]), 0, 1]
    file = write_jsonl(tmp_path / "other.jsonl", [rows[number] for number in order])
    found = zoo.evaluation.run(directory, data=str(file))
    chosen = [lines[number] for number in order]
    expected = squad([line["gold"] for line in chosen], [line["predicted"] for line in chosen])
    assert found["test_f1"] == pytest.approx(expected["f1"]) != metrics["test_f1"]
    first = next(number for number, line in enumerate(lines) if not line["gold"])
    with pytest.raises(
        UserError, match=f"row {first}: 'Who says what\\?' has no answer; set task.version_2_with_negative"
    ):
        zoo.evaluation.run(directory, overrides=["task.version_2_with_negative=false"])


def test_predictions_of_the_test_file(directory, data):
    file = Path(data["path"], "test.jsonl")
    lines = read_lines(directory / "predictions.jsonl")
    for line, answer in zip(lines, zoo.prediction.run(directory, file=file), strict=True):
        assert (answer["id"], answer["predicted"]) == (line["id"], line["predicted"])
        assert (answer["start"], answer["end"]) == (line["start"], line["end"])
        assert answer["score"] == pytest.approx(line["score"], rel=1e-3)
        assert answer["question"] == QUESTION and answer["n_best"][0]["text"] == line["predicted"]
    shown = list(zoo.prediction.in_lines([answer]))
    assert shown == [f"{answer['predicted'] or 'no answer'} {answer['score']:.3f}  {answer['question']}"]


def test_what_cannot_be_answered(directory, tmp_path):
    def refused(*rows: dict) -> str:
        with pytest.raises(UserError) as caught:
            zoo.prediction.run(directory, file=write_jsonl(tmp_path / "rows.jsonl", list(rows)))
        return str(caught.value)

    with pytest.raises(UserError, match="question 0 stands alone; give a --file with the columns question and context"):
        zoo.prediction.run(directory, ["What rose?"])
    good = {"question": "What?", "context": "oil rose"}
    assert "context 1 is empty" in refused(good, {"question": "What?", "context": ""})
    assert "question 0 is '  '" in refused({"question": "  ", "context": "oil"})
    assert "question 0 stands alone" in refused({"question": "What?"})
    assert "no column 'question'" in refused({"context": "oil"})
    assert "question 1: 'oil oil" in refused(good, {"question": "oil " * 45, "context": "oil"})


def test_the_card_runs(directory, monkeypatch, capsys):
    monkeypatch.chdir(directory)
    text = (directory / "README.md").read_text()
    assert "pipeline_tag: question-answering" in text and "pipeline reads the first window" not in text
    exec(text.partition("```python\n")[2].partition("```")[0], {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "t5", "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48},
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ],
    ids=["t5", "gpt2"],
)
def test_other_heads(config, tiny_bert, data, tmp_path):
    """One that says more than two logits, and one whose tokens do not see what follows."""
    made = recipe(tiny_bert, QA, {**data, "limit": 8}, max_steps=1, eval_steps=1, save_steps=1)
    start = type(made.model).model_validate({"config": config, "tokenizer": str(tiny_bert)})
    run(made.model_copy(update={"model": start}), tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "predictions.jsonl")
    rows = [{"question": row["question"], "context": row["context"]} for row in questions("test", 15)]
    answers = zoo.prediction.run(tmp_path / "run", file=write_jsonl(tmp_path / "rows.jsonl", rows))
    predicted = {answer["id"]: answer["predicted"] for answer in answers}
    assert [line["predicted"] for line in lines] == [predicted[line["id"]] for line in lines] and len(lines) == 8


# What is refused


GOOD = {"question": "What rose?", "context": "Wheat rose in May.", "answers": {"text": ["Wheat"], "answer_start": [0]}}


def spans(*pairs: tuple) -> dict:
    return {"answers": {"text": [text for text, _ in pairs], "answer_start": [start for _, start in pairs]}}


@pytest.mark.parametrize(
    "change, says",
    [
        (spans(("Wheat", 6)), "train row 1: the answer 'Wheat' starts at 6, but 'rose ' stands there; it stands at 0"),
        (spans(("Wheat", 0), ("oil", 0)), "row 1: the answer 'oil' starts at 0, but 'Whe' stands there; its context"),
        (spans(("May", 18)), "train row 1: the answer 'May' starts at 18; its context has 18 letters"),
        (spans(("May", -4)), "train row 1: the answer 'May' starts at -4"),
        (spans(("  ", 5)), "train row 1: the answer '  ' is no text; empty lists"),
        ({"answers": {"text": ["Wheat"], "answer_start": []}}, "train row 1: text and answer_start are"),
        ({"answers": None}, "train row 1: the answers are missing"),
        ({"answers": spans()["answers"], "question": "Who?"}, "row 1: 'Who?' has no answer; set task.version_2_with"),
        ({"question": " "}, "train row 1: the text in column 'question' is empty"),
        ({"context": ""}, "train row 1: the text in column 'context' is empty"),
        ({"question": "oil " * 60}, "data: row 1: the question 'oil oil"),
    ],
)  # fmt: skip
def test_rows_that_are_wrong(change, says, tiny_bert, tmp_path):
    rows = [GOOD, {**GOOD, **change}, *[GOOD] * 20]
    file = write_jsonl(tmp_path / "train.jsonl", rows)
    task = {"type": "question-answering", "max_length": 48}
    with pytest.raises(UserError) as caught:
        run(recipe(tiny_bert, task, {"path": str(file)}), tmp_path / "run")
    assert says in str(caught.value)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_data_that_is_wrong(tiny_bert, tmp_path):
    def refused(rows: list[dict], **task) -> str:
        file = write_jsonl(tmp_path / "train.jsonl", rows)
        with pytest.raises(UserError) as caught:
            run(recipe(tiny_bert, {**QA, **task}, {"path": str(file)}), tmp_path / "run")
        return str(caught.value)

    assert "the answers of train are" in refused([{**GOOD, "answers": "Wheat"}] * 9)
    pairs = [{"text": "Wheat", "answer_start": 0}]
    assert "this task wants what SQuAD has" in refused([{**GOOD, "answers": pairs}] * 9)
    assert "no question of train has an answer; there is nothing to learn" in refused([{**GOOD, **spans()}] * 9)
    assert "task.max_length: 15, but 3 tokens are special and 12 overlap" in refused([GOOD] * 9, max_length=15)
    assert "task.max_length: 65, but the model has 64 positions" in refused([GOOD] * 9, max_length=65)


# Data made of other data


def test_the_sentences_that_are_marked_are_the_answers():
    data = load_recipe("bert/finetune-questions").data
    task = task_of(section())
    splits = load_splits(data, task.roles, 0, kind=task.labels)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [600, 300, 600]
    counts = [sum(not row["answers"]["text"] for row in part) for part in (splits.train, splits.test)]
    # of train: 39, 0 and 4 abstracts, and 82, 9 and 10 conclusions, have nothing marked
    assert counts == [144, 157]
    row = splits.train[5]
    assert row["question"] == "What is the outcome?" and row["context"].startswith("In this paper , we propose a rel")
    assert [text[:11] for text in row["answers"]["text"]] == ["The experim", "Furthermore"]


def test_what_cannot_be_derived(tmp_path):
    task = task_of(section())

    def refused(rows: list[dict]) -> str:
        path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
        with pytest.raises(UserError) as caught:
            load_splits(DataSection.model_validate({"path": path, "derive": "aclsum-questions"}), task.roles, 0)
        return str(caught.value)

    assert "aclsum-questions wants a column 'sentences'; the train split of" in refused([GOOD])
    row = {"sentences": {"abstract": ["Oil rose ."]}, "highlights": {"challenge": {"abstract": [0, 1]}}}
    assert "aclsum-questions cannot read train row 0: ValueError" in refused([row])
    with pytest.raises(UserError, match="unknown name aclsum-question; did you mean aclsum-questions"):
        load_recipe("bert/finetune-questions", ["data.derive=aclsum-question"])


def test_the_card_says_that_data_are_derived():
    made: Recipe = load_recipe("bert/finetune-questions")
    environment = {"versions": {"transformers": "5"}, "git_commit": None}
    text = card(made, task_of(made.task), {"test_f1": 0.5}, None, environment, [], None, False)
    assert f"Its data are derived: {DERIVED['aclsum-questions'].summary}" in text
    assert "aclsum/dataset (aclsum-questions)" in text
    plain = made.model_copy(update={"data": made.data.model_copy(update={"derive": None})})
    assert "derived" not in card(plain, task_of(made.task), {"test_f1": 0.5}, None, environment, [], None, False)
