"""Multiple choice: rows with different numbers of choices, held to the stock class a row at a time."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import AutoModelForMultipleChoice, AutoTokenizer, EvalPrediction

import zoo.baselines
import zoo.evaluation
import zoo.model_directory
import zoo.prediction
import zoo.preview
from tests.conftest import read_r8
from tests.test_runs import read_lines, read_metrics, recipe, write_jsonl
from zoo.data import load_splits
from zoo.data_sections import DataSection
from zoo.encoding import encoded
from zoo.errors import UserError
from zoo.prediction import in_lines
from zoo.sections import TaskSection
from zoo.tasks import task_of
from zoo.train import run

CHOICE = {"type": "multiple-choice"}
SECTION = TaskSection.model_validate({**CHOICE, "max_length": 24})
TASK = task_of(SECTION)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Beginnings of news, and among two to five pieces of news the one that goes on from each."""
    folder = tmp_path_factory.mktemp("choices")
    for split, count in (("train", 48), ("test", 21)):
        words = [text.split() for text, _ in read_r8(split, count)]
        pieces = [" ".join(one[8 : 12 + n % 7]) or one[-1] for n, one in enumerate(words)]
        rows = []
        for n, one in enumerate(words):
            of = 2 + n % 4
            choices = [pieces[(n + 1 + other) % count] for other in range(of)]
            choices[n % of] = pieces[n]
            rows.append({"text": " ".join(one[:8]), "choices": choices, "label": n % of})
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def data(folder) -> dict:
    return {"path": str(folder), "files": {split: f"{split}.jsonl" for split in ("train", "test")}}


@pytest.fixture(scope="module")
def directory(tiny_bert, folder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("choice") / "run"
    run(recipe(tiny_bert, {**CHOICE, "max_length": 24}, data(folder), metric_for_best_model="accuracy"), directory)
    return directory


def stock(directory):
    """tokenizer, official model"""
    model = AutoModelForMultipleChoice.from_pretrained(directory)
    assert type(model).__module__.startswith("transformers.models.")
    return AutoTokenizer.from_pretrained(directory), model


def logits_of(directory, rows) -> list[torch.Tensor]:
    """By the stock class, a row at a time."""
    tokenizer, model = stock(directory)
    found = []
    for row in rows:
        pairs = tokenizer([row["text"]] * len(row["choices"]), row["choices"], padding=True, truncation=True,
                          max_length=24, return_tensors="pt")  # fmt: skip
        with torch.no_grad():
            found.append(model(**{name: values[None] for name, values in pairs.items()}).logits[0])
    return found


def batch_of(tokenizer, folder, numbers) -> dict:
    made = recipe(folder, {**CHOICE, "max_length": 24}, data(folder))
    rows, _ = encoded(splits_of(**data(folder)).test, made, TASK, tokenizer, 0)
    return TASK.collate(tokenizer, SECTION)([rows[number] for number in numbers])


def splits_of(**section):
    return load_splits(DataSection.model_validate(section), TASK.roles, 0, kind=TASK.labels)


# What a model is given, and the loss


def test_a_batch(tiny_bert, folder):
    tokenizer, lines = AutoTokenizer.from_pretrained(tiny_bert), read_lines(folder / "test.jsonl")
    batch = batch_of(tokenizer, folder, [1, 2, 4])
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels", "row"}
    assert batch["labels"].tolist() == [[1, 3], [2, 4], [0, 2]] and batch["row"].tolist() == [1, 2, 4]
    assert batch["input_ids"].shape[:2] == (3, 4) and batch["input_ids"].shape[2] <= 24
    for sample, number in enumerate((1, 2, 4)):
        row = lines[number]
        for choice in range(4):
            ids = batch["input_ids"][sample, choice][batch["attention_mask"][sample, choice] == 1].tolist()
            there = choice < len(row["choices"])
            whole = tokenizer(row["text"], row["choices"][choice], truncation=True, max_length=24) if there else None
            assert ids == (whole["input_ids"] if whole else [tokenizer.cls_token_id])


def test_preview(tiny_bert, folder):
    made = recipe(tiny_bert, {**CHOICE, "max_length": 24}, data(folder))
    lines = read_lines(folder / "test.jsonl")
    for seen, line in zip(zoo.preview.run(made, "test", 2), lines, strict=False):
        assert seen["label"] == line["label"] and len(seen["tokens"]) == len(line["choices"]) and "targets" not in seen


def test_what_is_counted(tiny_bert, folder):
    tokenizer, lines = AutoTokenizer.from_pretrained(tiny_bert), read_lines(folder / "test.jsonl")
    made = recipe(folder, {**CHOICE, "max_length": 24}, data(folder))
    rows = splits_of(**data(folder)).test
    _, words = encoded(rows, made, TASK, tokenizer, 0)
    pairs = [(line["text"], choice) for line in lines for choice in line["choices"]]
    cut = sum(len(ids) > 24 for ids in tokenizer(*map(list, zip(*pairs, strict=True)))["input_ids"])
    assert cut and words.startswith(f"21 texts of 2 to 5 choices; with them {len(pairs)} texts; {cut} (")


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_knows_no_choice_that_is_not_there(smoothing):
    logits = torch.tensor([[1.0, 2.0, 90.0], [0.5, -1.0, 3.0]], requires_grad=True)
    labels = torch.tensor([[0, 2], [2, 3]])
    loss = TASK.loss(SECTION, [], 0, smoothing)({"logits": logits}, labels)
    rows = (logits[:1, :2], torch.tensor([0])), (logits[1:], torch.tensor([2]))
    alone = [F.cross_entropy(row, right, label_smoothing=smoothing).item() for row, right in rows]
    assert loss.item() == pytest.approx(np.mean(alone))
    loss.backward()
    assert logits.grad[0, 2] == 0 and (logits.grad[0, :2] != 0).all()
    # what the library counts in two batches of two rows: eight labels
    assert TASK.loss(SECTION, [], 0, smoothing)({"logits": logits}, labels, 8).item() == pytest.approx(sum(alone) / 4)


def test_a_choice_that_is_not_there_never_wins():
    """-100 is what the library puts where a batch had fewer choices."""
    logits = np.array([[-300.0, -301.0, -100.0], [0.0, 1.0, 2.0]])
    prediction = EvalPrediction(logits, np.array([[0, 2], [1, 3]]))
    assert TASK.metrics(SECTION, [], None)(prediction) == {"accuracy": 0.5}
    first, second = TASK.records(SECTION, [], None)(prediction)
    assert first == {
        "gold": 0,
        "predicted": 0,
        "probabilities": pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e)]),
    }
    assert second["predicted"] == 2 and len(second["probabilities"]) == 3


def test_a_batch_is_each_row_alone(directory, folder):
    """Of 2 to 5 choices: the native class, padded and packed, has the stock one's logits, loss and gradient."""
    lines = read_lines(folder / "test.jsonl")[:8]
    tokenizer, official = stock(directory)
    native = zoo.model_directory.open_finished(directory).model
    batch = batch_of(tokenizer, folder, range(8))
    batch.pop("row")
    labels = batch.pop("labels")
    expected = logits_of(directory, lines)
    for row, line in zip(expected, lines, strict=True):
        assert len(row) == len(line["choices"])
    losses = [F.cross_entropy(row, torch.tensor(line["label"])) for row, line in zip(expected, lines, strict=True)]
    gradients = []
    for model, ragged in ((official, None), (native, "on"), (native, "off")):
        if ragged is not None:
            model.set_ragged(ragged)
        model.zero_grad()
        output = model.eval()(**batch)
        for logits, row in zip(output.logits, expected, strict=True):
            torch.testing.assert_close(logits[: len(row)], row, atol=1e-5, rtol=1e-5)
        loss = TASK.loss(SECTION, [], 0)(output, labels)
        assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-6)
        loss.backward()
        gradients.append(model.classifier.weight.grad.clone())
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], atol=1e-6, rtol=1e-4)


# A run


def test_a_run(directory, folder):
    lines, rows = read_lines(directory / "predictions.jsonl"), read_lines(folder / "test.jsonl")
    metrics = read_metrics(directory)
    losses = []
    for line, row, logits in zip(lines, rows, logits_of(directory, rows), strict=True):
        assert line["gold"] == row["label"] and line["predicted"] == int(logits.argmax())
        assert line["probabilities"] == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)
        losses.append(-math.log(line["probabilities"][row["label"]]))
    assert metrics["test_accuracy"] == pytest.approx(np.mean([line["gold"] == line["predicted"] for line in lines]))
    again = zoo.evaluation.run(directory)
    for found in (metrics, again):
        # of batches of 16 and 5 rows, as the Trainer weighs them
        assert found["test_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
        assert found["test_accuracy"] == metrics["test_accuracy"]


def test_predict(directory, folder, tmp_path):
    rows, lines = read_lines(folder / "test.jsonl"), read_lines(directory / "predictions.jsonl")
    answers = list(zoo.prediction.run(directory, file=folder / "test.jsonl"))
    for answer, line, row in zip(answers, lines, rows, strict=True):
        assert list(answer) == ["id", "text", "choices", "predicted", "probabilities"]
        assert (answer["text"], answer["choices"]) == (row["text"], row["choices"])
        assert answer["predicted"] == line["predicted"]
        assert answer["probabilities"] == pytest.approx(line["probabilities"], abs=1e-5)
    first, predicted = answers[0], answers[0]["predicted"]
    said = next(in_lines(answers))
    assert said.startswith(
        f"{first['choices'][predicted]} {first['probabilities'][predicted]:.3f}  {first['text'][:50]}"
    )
    with pytest.raises(UserError, match="text 0 stands alone; give a --file with the columns text and choices"):
        zoo.prediction.run(directory, ["oil"])
    (tmp_path / "flat.csv").write_text("text,choices\noil,a or b\n")
    with pytest.raises(UserError, match="predict: choices 0: holds 'a or b', not a list of texts"):
        zoo.prediction.run(directory, file=tmp_path / "flat.csv")


def test_the_card_runs(directory, monkeypatch, capsys):
    monkeypatch.chdir(directory)
    exec((directory / "README.md").read_text().partition("```python\n")[2].partition("```")[0], {})
    assert capsys.readouterr().out.startswith("tensor([[0.")


def test_an_official_class(tiny_bert, folder, tmp_path):
    """Of two batches a step: the loss of random weights is that of a uniform choice, and not half or twice that."""
    steps = {"max_steps": 2, "eval_steps": 2, "save_steps": 2, "gradient_accumulation_steps": 2}
    made = recipe(tiny_bert, {**CHOICE, "max_length": 24}, data(folder), **steps, label_smoothing_factor=0.1)
    official = made.model.model_copy(update={"implementation": "official"})
    run(made.model_copy(update={"model": official}), tmp_path / "run")
    for split in ("train", "test"):
        uniform = np.mean([math.log(len(row["choices"])) for row in read_lines(folder / f"{split}.jsonl")])
        assert read_metrics(tmp_path / "run")[f"{split}_loss"] == pytest.approx(uniform, abs=0.15)


def test_baselines(tmp_path):
    rows = [
        {"text": "oil prices rose", "choices": ["oil prices fell", "she sang"], "label": 0},
        {"text": "the king", "choices": ["x", "y", "z", "the king"], "label": 3},
        {"text": "nothing here", "choices": ["x", "y", "z", "the king"], "label": 1},
    ]
    write_jsonl(tmp_path / "train.jsonl", rows * 4)
    write_jsonl(tmp_path / "test.jsonl", rows)
    found = zoo.baselines.run(recipe("none", CHOICE, data(tmp_path)))
    # where all are alike, any of them
    assert found["any choice"]["accuracy"] == pytest.approx((1 / 2 + 1 / 4 + 1 / 4) / 3)
    assert found["the choice most like the text by TF-IDF"]["accuracy"] == pytest.approx((1 + 1 + 1 / 4) / 3)


# Labels


@pytest.mark.parametrize(
    ("choices", "labels", "numbers"),
    [
        ([["a", "b"], ["c", "d", "e"]], [1, 2], [1, 2]),
        ([["a", "b"], ["c", "d", "e"]], ["b", "e"], [1, 2]),
        ([["a", "b"], ["c", "d", "e"]], ["B", "C"], [1, 2]),
        # not all are texts of choices, so they are letters, also where one is such a text
        ([["B", "A"], ["c", "d", "e"]], ["B", "C"], [1, 2]),
        ([["B", "A"], ["c", "d", "e"]], ["B", "e"], [0, 2]),
    ],
)
def test_labels(tmp_path, choices, labels, numbers):
    rows = [{"text": "x", "choices": given, "label": label} for given, label in zip(choices, labels, strict=True)] * 3
    splits = splits_of(path=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    for row in splits.train:
        assert row["label"] == numbers[row["row"] % 2]
    assert len(splits.train) == 5 and splits.labels == []


def test_labels_of_a_hub_set(tmp_path):
    """Choices within a column, as ARC has them, and a ClassLabel, as SWAG has it."""
    features = Features(
        {"question": Value("string"), "choices": {"text": List(Value("string")), "label": List(Value("string"))},
         "answer": ClassLabel(names=["A", "B", "C"])}
    )  # fmt: skip
    row = {"question": "q", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, "answer": 2}
    Dataset.from_list([row] * 5, features=features).to_parquet(tmp_path / "rows.parquet")
    columns = {"text": "question", "choices": "choices.text", "label": "answer"}
    assert splits_of(path=str(tmp_path / "rows.parquet"), columns=columns).train[0]["label"] == 2
    Dataset.from_list([row, {**row, "answer": -1}] * 5, features=features).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="train row 1: the label is missing"):
        splits_of(path=str(tmp_path / "rows.parquet"), columns=columns)


@pytest.mark.parametrize(
    ("choices", "label", "says"),
    [
        (["a"], 0, "train row 0: column 'choices': holds fewer than two choices, ['a']; mend the row"),
        (["a", " "], 0, "train row 0: column 'choices': choice 1 is ' ', and not a text"),
        (["a", None], 0, "train row 0: column 'choices': choice 1 is None, and not a text"),
        ([1, 2], 0, "train row 0: column 'choices': choice 0 is 1, and not a text"),
        ("a b", 0, "train row 0: column 'choices': holds 'a b', not a list of texts"),
        (["a", "b"], 2, "train row 0: the label 2 is none of its choices, 0, 1; give a choice's number from 0"),
        (["a", "b"], -1, "train row 0: the label -1 is none of its choices"),
        (["a", "b"], 0.5, "train row 0: the label 0.5 is none of its choices"),
        (["a", "b"], True, "train row 0: the label True is none of its choices"),
        (["a", "b"], "c", "train row 0: the label 'c' is none of its choices, 'a', 'b'"),
        (["a", "b"], "C", "train row 0: the label 'C' is none of its choices, 'A', 'B'"),
        (["a", "a"], "a", "train row 0: the label 'a' is more than one of its choices, 'a', 'a'"),
        (["a", "b"], None, "train row 0: the label is missing"),
    ],
)
def test_refused(tmp_path, choices, label, says):
    rows = [{"text": "x", "choices": choices, "label": label}] * 4
    with pytest.raises(UserError) as caught:
        splits_of(path=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert says in str(caught.value)


def test_a_stream(tiny_bert, folder, tmp_path):
    keys = {"streaming": True, "validation": 5, "test": 9, "buffer_size": 10}
    steps = {"max_steps": 2, "eval_steps": 2, "save_steps": 2}
    run(recipe(tiny_bert, {**CHOICE, "max_length": 24}, data(folder) | keys, **steps), tmp_path / "run")
    lines, rows = read_lines(tmp_path / "run" / "predictions.jsonl"), read_lines(folder / "test.jsonl")
    assert [line["gold"] for line in lines] == [row["label"] for row in rows[:9]]
    assert read_metrics(tmp_path / "run")["train_loss"] == pytest.approx(math.log(3.5), abs=0.3)
