"""Each task: what a model is given, and its metrics against those of another source."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.special import expit, softmax
from seqeval.metrics import classification_report
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import AutoTokenizer, BartConfig, EvalPrediction, GPT2Tokenizer, RobertaTokenizer

from tests.conftest import NER, read_r8, write_csv
from zoo.data import load_splits
from zoo.data_sections import DataSection
from zoo.errors import UserError
from zoo.recipe_loading import load_recipe
from zoo.samples import WithDraws
from zoo.sections import TaskSection
from zoo.task_types import TASK_TYPES
from zoo.tasks import TASKS, task_of
from zoo.tasks.base import cut
from zoo.tasks.classification import calibration_error, weighted_loss
from zoo.tasks.fill_mask import masked
from zoo.tasks.metrics import all_right, own_metrics
from zoo.tasks.spans import scores, spans
from zoo.tasks.text_classification import pooled


def section(kind: str = "text-classification", **keys) -> TaskSection:
    return TaskSection.model_validate({"type": kind, "max_length": 32, **keys})


@pytest.fixture(scope="module")
def tokenizer(tiny_bert):
    return AutoTokenizer.from_pretrained(tiny_bert)


TEXTS = [text for text, _ in read_r8("train", 24)]


# What a model is given


def test_texts_are_cut_as_the_tokenizer_cuts_them(tokenizer):
    rows = cut(tokenizer, section(), [TEXTS])
    plain = tokenizer(TEXTS, truncation=True, max_length=32)
    assert rows["input_ids"] == plain["input_ids"] and rows["text"] == list(range(len(TEXTS)))
    whole = tokenizer(TEXTS)["input_ids"]
    assert rows["truncated"] == [len(ids) > 32 for ids in whole] and True in rows["truncated"]
    unknown = cut(tokenizer, section(), [["\u4e2d\u6587 shares", "shares"]])
    assert unknown["unknown"] == [2, 0] and unknown["tokens"] == [len(ids) for ids in unknown["input_ids"]]


def test_pairs_are_cut_at_the_longer_text(tokenizer):
    rows = cut(tokenizer, section(), [TEXTS, ["a short one"] * len(TEXTS)])
    plain = tokenizer(TEXTS, ["a short one"] * len(TEXTS), truncation=True, max_length=32)
    assert (rows["input_ids"], rows["token_type_ids"]) == (plain["input_ids"], plain["token_type_ids"])


def test_windows_hold_the_whole_text(tokenizer):
    rows = cut(tokenizer, section(stride=8), [TEXTS])
    assert not any(rows["truncated"]) and max(rows["tokens"]) <= 32
    for text, ids in enumerate(tokenizer(TEXTS, add_special_tokens=False)["input_ids"]):
        windows = [window[1:-1] for window, of in zip(rows["input_ids"], rows["text"], strict=True) if of == text]
        joined = windows[0]
        for window in windows[1:]:
            assert joined[-8:] == window[:8], "they overlap by the stride"
            joined = joined + window[8:]
        assert joined == ids


@pytest.mark.parametrize(("keys", "says"), [({"max_length": 2}, "2 tokens are special"),
                                            ({"stride": 30}, "2 tokens are special and 30 overlap")])  # fmt: skip
def test_no_room_for_a_token(tokenizer, keys, says):
    with pytest.raises(UserError, match=says):
        cut(tokenizer, section(**keys), [TEXTS])


def test_tags_stand_at_the_first_piece_of_their_token(tokenizer):
    task = task_of(section("token-classification"))
    tokens = [["Shares", "of", "Pennzoil", "rose"], ["oil"] * 60]
    rows = {"tokens": tokens, "tags": [[0, 1, 2, 3], [1] * 60], "row": [5, 6]}
    encoded = task.encode(tokenizer, section("token-classification"))(rows)
    assert encoded["row"] == [5, 6] and encoded["truncated"] == [False, True]
    for ids, labels, words in zip(encoded["input_ids"], encoded["labels"], tokens, strict=True):
        assert len(ids) == len(labels) <= 32
        seen = [position for position, label in enumerate(labels) if label != -100]
        pieces = [tokenizer.convert_ids_to_tokens(ids[position]) for position in seen]
        assert all(not piece.startswith("##") for piece in pieces)
        assert pieces == [tokenizer.tokenize(word)[0] for word in words[: len(pieces)]]
        assert labels[0] == labels[-1] == -100
    assert [label for label in encoded["labels"][0] if label != -100] == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [RobertaTokenizer, GPT2Tokenizer])
def test_words_have_the_pieces_that_they_have_in_a_text(kind, tmp_path):
    """Byte-level BPE has others behind a space; kept with the tokenizer, so that a pipeline reads the same."""
    letters = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"NewYork", "\u0120", "\u0120N", "\u0120Y"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(letters))}
    made = kind(vocab=vocabulary, merges=[("\u0120", "N"), ("\u0120", "Y")], unk_token="<unk>")
    prepare = task_of(section("token-classification")).prepare
    assert "\u0120Y" not in made.convert_ids_to_tokens(made(["New", "York"], is_split_into_words=True)["input_ids"])
    prepare(made)
    made.save_pretrained(tmp_path)
    for one in (made, AutoTokenizer.from_pretrained(tmp_path)):
        words = one(["New", "York"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
        assert words == one("New York", add_special_tokens=False)["input_ids"]
        assert one.convert_ids_to_tokens(words)[0] == "\u0120N"


def test_what_is_longer_than_the_positions_of_an_official_writer():
    model = SimpleNamespace(config=BartConfig(max_position_embeddings=64))
    check = task_of(section("summarization")).check
    check(section("summarization", max_length=64, max_target_length=64), model)
    for key in ("max_length", "max_target_length"):
        long = section("summarization", **{"max_length": 64, key: 65})
        with pytest.raises(UserError, match=rf"task\.{key}: 65, but the model has 64 positions"):
            check(long, model)


def test_hidden_tokens_are_a_function_of_seed_epoch_and_row(tokenizer):
    ids = tokenizer(" ".join(TEXTS[:4]))["input_ids"]
    special = tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
    first = masked(ids, special, tokenizer, 0.15, [1, 2, 3])
    assert first == masked(ids, special, tokenizer, 0.15, [1, 2, 3])
    assert all(first != masked(ids, special, tokenizer, 0.15, draw) for draw in ([0, 2, 3], [1, 0, 3], [1, 2, 0]))
    counts = np.zeros(4)
    for row in range(400):
        now, labels = (np.array(values) for values in masked(ids, special, tokenizer, 0.15, [0, 0, row]))
        chosen = labels != -100
        assert not (chosen & (np.array(special) == 1)).any()
        assert (labels[chosen] == np.array(ids)[chosen]).all() and (now[~chosen] == np.array(ids)[~chosen]).all()
        hidden, same = now == tokenizer.mask_token_id, now == np.array(ids)
        counts += [len(ids) - sum(special), chosen.sum(), (chosen & hidden).sum(), (chosen & same).sum()]
    total, chosen, hidden, same = counts
    # four standard errors
    for rate, share, of in (
        (0.15, chosen / total, total),
        (0.8, hidden / chosen, chosen),
        (0.1, same / chosen, chosen),
    ):
        assert share == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / of) + 1 / 600), rate


def test_at_least_one_token_is_hidden(tokenizer):
    ids = tokenizer("oil")["input_ids"]
    special = tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
    for row in range(20):
        _, labels = masked(ids, special, tokenizer, 0.001, [0, 0, row])
        assert sum(label != -100 for label in labels) == 1


def test_a_masked_batch(tokenizer):
    fill = section("fill-mask")
    task = task_of(fill)
    rows = Dataset.from_dict({"text": TEXTS, "row": list(range(len(TEXTS)))})
    encoded = rows.map(task.encode(tokenizer, fill), batched=True, remove_columns=rows.column_names)
    drawn = WithDraws(encoded.remove_columns(["truncated", "unknown", "tokens"]), seed=4)
    batch = task.collate(tokenizer, fill)([drawn[index] for index in range(8)])
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels", "row"}
    assert batch["labels"][batch["attention_mask"] == 0].eq(-100).all()
    drawn.set_epoch(1)
    other = task.collate(tokenizer, fill)([drawn[index] for index in range(8)])
    assert not torch.equal(batch["labels"], other["labels"])


# Labels


def test_several_labels_a_text(tmp_path):
    rows = [{"text": f"text {n}", "label": ["ab"[n % 2], "c"][: 1 + n % 3 // 2]} for n in range(12)]
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"text": "x", "label": []}])
    )
    task = task_of(section(problem_type="multi_label_classification"))
    splits = load_splits(DataSection.model_validate({"path": str(tmp_path / "train.jsonl")}), task.roles, 0,
                         kind=task.labels)  # fmt: skip
    assert splits.labels == ["a", "b", "c"]
    for row in [*splits.train, *splits.validation]:
        wanted = rows[row["row"]]["label"] if row["row"] < 12 else []
        assert row["label"] == [float(name in wanted) for name in "abc"]


def load(path, kind: str = "text-classification", **keys):
    task = task_of(section(kind, **keys))
    return load_splits(DataSection.model_validate({"path": str(path)}), task.roles, 0, kind=task.labels)


def test_labels_that_do_not_fit_the_problem(tmp_path):
    write_csv(tmp_path / "words.csv", [("x", "a"), ("y", "b")] * 4)
    with pytest.raises(UserError, match="the label of train is no list"):
        load(tmp_path / "words.csv", problem_type="multi_label_classification")
    with pytest.raises(UserError, match="train row 0: the label is 'a'; a regression learns a finite number"):
        load(tmp_path / "words.csv", problem_type="regression")
    write_csv(tmp_path / "same.csv", [("x", "1.5"), ("y", "1.5")] * 4)
    with pytest.raises(UserError, match=r"train has one label only, 1\.5"):
        load(tmp_path / "same.csv", problem_type="regression")
    Dataset.from_dict({"tokens": [["a", "b"], ["c"]] * 4, "tags": [["O", "B-x"], ["O", "O"]] * 4}).to_parquet(
        tmp_path / "uneven.parquet"
    )
    with pytest.raises(UserError, match="train row 1: 1 tokens and 2 tags"):
        load(tmp_path / "uneven.parquet", "token-classification")


def test_conll_files(tmp_path):
    text = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\nPeter NNP B-PER\n\t\nBlackburn NNP I-PER"
    (tmp_path / "a.conll").write_text(text + "\n\nx y O" * 5)
    task = task_of(section("token-classification"))
    named = {"path": str(tmp_path / "a.conll"), "options": {"column_names": ["tokens", "pos", "tags"]}}
    splits = load_splits(DataSection.model_validate(named), task.roles, 0, kind=task.labels)
    rows = {row["row"]: row for row in [*splits.train, *splits.validation]}
    assert rows[0]["tokens"] == ["EU", "rejects"] and rows[2]["tokens"] == ["Blackburn"]
    assert splits.labels == ["B-ORG", "B-PER", "I-PER", "O"]
    assert [splits.labels[tag] for tag in rows[0]["tags"]] == ["B-ORG", "O"]
    (tmp_path / "b.conll").write_text("EU B-ORG\nrejects\n")
    with pytest.raises(UserError, match=r"train row 0: the label is missing"):
        load(tmp_path / "b.conll", "token-classification")


def test_a_real_tagged_corpus():
    task = task_of(section("token-classification"))
    data = DataSection.model_validate({"path": NER, "files": {"train": "ner.txt"}, "format": "conll"})
    splits = load_splits(data, task.roles, 0, kind=task.labels)
    assert len(splits.train) + len(splits.validation) == 2394 and len(splits.labels) == 21


# Metrics


def predictions(rows: int = 200, classes: int = 3, seed: int = 0) -> EvalPrediction:
    rng = np.random.default_rng(seed)
    gold = rng.integers(classes, size=rows)
    return EvalPrediction(rng.normal(size=(rows, classes)) + 1.5 * np.eye(classes)[gold], gold)


def test_metrics_of_one_label():
    made, names = predictions(), ["a", "b", "c"]
    task = task_of(section())
    found = task.metrics(section(), names, None)(made)
    assert set(found) == set(task.metric_names)
    assert found["accuracy"] == (made.predictions.argmax(-1) == made.label_ids).mean()
    records = list(task.records(section(), names, None)(made))
    assert [record["gold"] for record in records] == [names[n] for n in made.label_ids]
    assert [record["predicted"] for record in records] == [names[n] for n in made.predictions.argmax(-1)]
    assert records[0]["probabilities"] == pytest.approx(dict(zip(names, softmax(made.predictions[0]), strict=True)))


def test_calibration_error():
    # 100 rows of confidence 0.8: 80 right is calibrated, 50 right is 0.3 off
    scores = np.tile([0.8, 0.2], (100, 1))
    assert calibration_error(scores, np.repeat([0, 1], [80, 20])) == pytest.approx(0.0)
    assert calibration_error(scores, np.repeat([0, 1], [50, 50])) == pytest.approx(0.3)
    # two bins: |0.9 - 1| of half the rows, |0.6 - 0.5| of the others
    scores = np.array([[0.9, 0.1]] * 10 + [[0.6, 0.4]] * 10)
    assert calibration_error(scores, np.array([0] * 10 + [0, 1] * 5)) == pytest.approx(0.1)
    assert calibration_error(np.array([[1.0, 0.0]]), np.array([0])) == 0.0


def test_metrics_of_several_labels():
    keys = {"problem_type": "multi_label_classification", "threshold": 0.7}
    rng = np.random.default_rng(0)
    logits, hot = rng.normal(size=(50, 3)), (rng.random((50, 3)) < 0.4).astype(float)
    task = task_of(section(**keys))
    found = task.metrics(section(**keys), list("abc"), None)(EvalPrediction(logits, hot))
    chosen = expit(logits) >= 0.7
    assert found["accuracy"] == (chosen == (hot == 1)).all(-1).mean()
    true = (chosen & (hot == 1)).sum()
    assert found["f1_micro"] == pytest.approx(2 * true / (chosen.sum() + hot.sum()))
    records = list(task.records(section(**keys), list("abc"), None)(EvalPrediction(logits, hot)))
    assert [len(record["predicted"]) for record in records] == chosen.sum(-1).tolist()
    assert [len(record["gold"]) for record in records] == hot.sum(-1).tolist()


def test_metrics_of_numbers():
    task = task_of(section(problem_type="regression"))
    gold = np.array([1.0, 2.0, 3.0, 4.0])
    found = task.metrics(section(problem_type="regression"), ["LABEL_0"], None)(
        EvalPrediction(2 * gold[:, None] + 1, gold)
    )
    assert found == pytest.approx({"mse": np.mean((gold + 1) ** 2), "mae": np.mean(gold + 1), "pearsonr": 1.0,
                                   "spearmanr": 1.0})  # fmt: skip
    flat = task.metrics(section(problem_type="regression"), ["LABEL_0"], None)(EvalPrediction(np.ones((4, 1)), gold))
    assert (flat["pearsonr"], flat["spearmanr"]) == (0.0, 0.0)


def test_spans_of_tags():
    """One of two spans found, and one that is none: precision, recall and f1 are 1/2; 4 of 6 tokens are right."""
    names = ["O", "B-per", "I-per"]
    gold = np.array([[-100, 1, 2, 0, 1, -100], [-100, 0, 0, -100, -100, -100]])
    predicted = np.array([[0, 1, 2, 0, 0, 0], [0, 1, 0, 0, 0, 0]])
    task = task_of(section("token-classification"))
    found = task.metrics(section("token-classification"), names, None)(EvalPrediction(np.eye(3)[predicted], gold))
    assert found == pytest.approx({"accuracy": 4 / 6, "precision": 0.5, "recall": 0.5, "f1": 0.5})
    records = list(
        task.records(section("token-classification"), names, None)(EvalPrediction(np.eye(3)[predicted], gold))
    )
    assert records[0] == {"gold": ["B-per", "I-per", "O", "B-per"], "predicted": ["B-per", "I-per", "O", "O"]}


TAGS = ["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("per", "geo-loc"))]


@pytest.mark.parametrize("prefixes", ["BI", "IE", "BIES", "I"])
def test_spans_are_those_of_seqeval(prefixes):
    rng = np.random.default_rng(0)
    some = [tag for tag in TAGS if tag[0] in prefixes + "O"]
    gold, predicted = ([[some[n] for n in rng.integers(len(some), size=m % 17)] for m in range(1, 300)] for _ in "gp")
    for row in gold + predicted:
        assert spans(row) == [(kind, first, last + 1) for kind, first, last in get_entities(row)], row
    ours, theirs = scores(gold, predicted), classification_report(gold, predicted, output_dict=True, zero_division=0)
    for ours_of, theirs_of in (("", "micro avg"), ("per", "per"), ("geo-loc", "geo-loc")):
        expected = {key.replace("f1-score", "f1"): value for key, value in theirs[theirs_of].items()}
        assert ours[ours_of] == pytest.approx(expected)


def test_windows_are_pooled():
    logits, labels = np.array([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0]]), np.array([1, 1, 0])
    rows = {"row": [7, 7, 3]}
    mean = pooled(section(stride=4), EvalPrediction(logits, labels), rows)
    assert mean.predictions.tolist() == [[2.0, 1.0], [5.0, 5.0]] and mean.label_ids.tolist() == [1, 0]
    largest = pooled(section(stride=4, pooling="max"), EvalPrediction(logits, labels), rows)
    assert largest.predictions.tolist() == [[3.0, 2.0], [5.0, 5.0]]
    whole = EvalPrediction(logits, labels)
    assert pooled(section(), whole, rows) is whole


def test_balanced_classes_weigh_the_same():
    labels = [0] * 6 + [1] * 2
    loss = weighted_loss(section(class_weights="balanced"), labels, 2)
    logits = torch.zeros(8, 2, requires_grad=True)
    loss({"logits": logits}, torch.tensor(labels)).backward()
    pull = logits.grad.abs().sum(-1)
    assert pull[:6].sum().item() == pytest.approx(pull[6:].sum().item())
    plain = torch.nn.functional.cross_entropy(logits, torch.tensor(labels))
    assert loss({"logits": logits}, torch.tensor(labels)).item() == pytest.approx(plain.item()), "the mean weight is 1"
    with torch.no_grad():
        uneven = torch.randn(8, 2)
        evaluated = loss({"logits": uneven}, torch.tensor(labels))
        assert evaluated == pytest.approx(torch.nn.functional.cross_entropy(uneven, torch.tensor(labels)))


def test_metric_modules(tmp_path):
    made, names = predictions(), ["a", "b", "c"]
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import datasets\nimport evaluate\n\n\nclass Mine(evaluate.Metric):\n    def _info(self):\n"
        "        features = {'references': datasets.Value('int64'),\n"
        "                    'prediction_scores': datasets.Sequence(datasets.Value('float64'))}\n"
        "        return evaluate.MetricInfo(description='', citation='', features=datasets.Features(features))\n\n"
        "    def _compute(self, references, prediction_scores, scale=1):\n"
        "        pairs = zip(references, prediction_scores)\n"
        "        return {'of_gold': scale * sum(s[r] for r, s in pairs) / len(references), 'all': [1]}\n"
    )
    keys = {"metrics": {"matthews_correlation": {}, "balanced_accuracy": {}, str(mine): {"scale": 10}}}
    found = own_metrics(task_of(section()), section(**keys), names, None)(made)
    assert found["matthews_correlation"] == pytest.approx(
        matthews_corrcoef(made.label_ids, made.predictions.argmax(-1))
    )
    recalls = [(made.predictions.argmax(-1) == n)[made.label_ids == n].mean() for n in range(3)]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    scores = softmax(made.predictions, -1)[np.arange(200), made.label_ids]
    assert found["of_gold"] == pytest.approx(10 * scores.mean()) and "all" not in found
    assert found["f1_macro"] == pytest.approx(f1_score(made.label_ids, made.predictions.argmax(-1), average="macro"))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("mathews_correlation", {}, "cannot be loaded; did you mean matthews_correlation"),
        ("matthews_correlation", {"scale": 2}, "refused what it was given"),
    ],
)
def test_metric_modules_that_are_refused(name, options, says):
    keys = {"metrics": {name: options}}
    with pytest.raises(UserError, match=f"task.metrics.{name}: {says}"):
        own_metrics(task_of(section()), section(**keys), ["a", "b", "c"], None)(predictions())


@pytest.mark.parametrize(
    ("task", "labels", "gold", "best"),
    [
        (section(), "abc", [2, 0, 1, 1], {"accuracy": 1.0, "f1_macro": 1.0, "calibration_error": 0.0}),
        (
            section(problem_type="multi_label_classification", threshold=0.99),
            "abc", [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
            {"accuracy": 1.0, "f1_micro": 1.0, "f1_macro": 1.0},
        ),
        (
            section(problem_type="regression"),
            ["LABEL_0"], [0.5, -2.0, 7.0], {"mse": 0.0, "mae": 0.0, "pearsonr": 1.0, "spearmanr": 1.0},
        ),
        (
            section("token-classification"),
            ["B-x", "I-x", "O"], [[-100, 0, 1, -100], [-100, 2, 0, -100, 1, -100]],
            {"accuracy": 1.0, "precision": 1.0, "recall": 1.0, "f1": 1.0},
        ),
    ],
    ids=["one label", "several labels", "a number", "tags"],
)  # fmt: skip
def test_a_prediction_that_is_all_right(task, labels, gold, best):
    found = task_of(task).metrics(task, list(labels), None)(all_right(task_of(task), list(labels), gold))
    assert found == pytest.approx(best)


# Keys of a recipe


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ("{type: fill-mask, stride: 4}", "task.stride: fill-mask does not read it"),
        ("{type: text-classification, mlm_probability: 0.2}", "task.mlm_probability: text-classification does not"),
        ("{type: text-classification, threshold: 0.4}", "set problem_type: multi_label_classification"),
        ("{type: text-classification, problem_type: regression, class_weights: balanced}", "regression has no classes"),
        ("{type: text-classification, pooling: max}", "task.pooling: there is nothing to pool without windows"),
        ("{type: fill-mask, metrics: {f1: {}}}", "task.metrics: fill-mask does not read it"),
        ("{type: token-classification}", "data.columns.label: token-classification does not read it"),
        ("{type: text-classification, problem_type: multi_label}", "task.problem_type: expected"),
    ],
)
def test_keys_that_a_task_does_not_read(tmp_path, task, says):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"name: x\nmodel: {{path: m}}\ntask: {task}\ndata: {{path: d, columns: {{label: topic}}}}\n")
    with pytest.raises(UserError) as caught:
        load_recipe(str(recipe))
    assert says in str(caught.value)


def test_the_registry_and_the_schema_name_the_same_tasks():
    assert TASKS.keys() == TASK_TYPES.keys()
    for name, tasks in TASKS.items():
        assert all(task.name == name and task.roles == TASK_TYPES[name].roles for task in tasks)
