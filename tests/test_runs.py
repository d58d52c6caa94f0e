"""A run of each task from end to end; what stock pipelines answer is what `zoo predict` answers."""

import hashlib
import json
import math
import shutil
import struct
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import pipeline

import zoo.evaluation
import zoo.prediction
from tests.conftest import NER, read_r8
from zoo.errors import UserError
from zoo.recipe import Recipe
from zoo.train import run

TEXTS = [text for text, _ in read_r8("test", 12)]


def recipe(model: Path, task: dict, data: dict, **train) -> Recipe:
    arguments = {
        "max_steps": 6, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 16, "learning_rate": 3e-3,
        "eval_strategy": "steps", "eval_steps": 3, "save_steps": 3, "logging_steps": 2, "load_best_model_at_end": True,
        "disable_tqdm": True, "seed": 7,
    }  # fmt: skip
    fields = {"name": "tiny", "model": {"path": str(model)}, "task": {"max_length": 32, **task}, "data": data}
    return Recipe.model_validate(fields | {"train": arguments | train})


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tagged() -> list[dict]:
    """The first tweets of a real corpus of names, with the kinds of name in each."""
    from datasets import load_dataset

    from zoo.sources import resolve

    file = Path(resolve(NER, kind="dataset").location) / "ner.txt"
    rows = load_dataset("conll", data_files=str(file), column_names=["tokens", "tags"], split="train")
    return [dict(row) for row in rows.select(range(160))]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    tweets = tagged()
    write_jsonl(folder / "tags-train.jsonl", tweets)
    known = {tag for tweet in tweets for tag in tweet["tags"]}
    assert len(known) > 5
    write_jsonl(folder / "tags-test.jsonl", tweets[:40])
    kinds = [
        {"text": " ".join(t["tokens"]), "label": sorted({tag[2:] for tag in t["tags"] if tag != "O"})} for t in tweets
    ]
    write_jsonl(folder / "kinds-train.jsonl", kinds)
    write_jsonl(folder / "kinds-test.jsonl", kinds[:40])
    for split, count in (("train", 80), ("test", 24)):
        texts = read_r8(split, count)
        write_jsonl(folder / f"length-{split}.jsonl", [{"text": x, "label": math.log(len(x))} for x, _ in texts])
        write_jsonl(folder / f"topics-{split}.jsonl", [{"text": x, "label": y} for x, y in texts])
        write_jsonl(folder / f"plain-{split}.jsonl", [{"text": x} for x, _ in texts])
    return folder


def files(folder: Path, kind: str) -> dict:
    return {"path": str(folder), "files": {split: f"{kind}-{split}.jsonl" for split in ("train", "test")}}


RUNS = {
    "one label": ({"type": "text-classification", "metrics": {"matthews_correlation": {}}}, "topics"),
    "windows": ({"type": "text-classification", "stride": 8, "class_weights": "balanced"}, "topics"),
    "several labels": (
        {"type": "text-classification", "problem_type": "multi_label_classification", "threshold": 0.3}, "kinds",
    ),
    "a number": ({"type": "text-classification", "problem_type": "regression"}, "length"),
    "tags": ({"type": "token-classification"}, "tags"),
    "masked": ({"type": "fill-mask"}, "plain"),
}  # fmt: skip


@pytest.fixture(scope="module")
def directories(tiny_bert, data, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for number, (task, kind) in enumerate(RUNS.values()):
        # one that has hardly learned names many things, one that has learned a little names none
        train = {"learning_rate": 1e-6} if kind == "tags" else {}
        run(recipe(tiny_bert, task, files(data, kind), **train), folder / str(number))
    return {name: folder / str(number) for number, name in enumerate(RUNS)}


def read_metrics(directory: Path) -> dict:
    return json.loads((directory / "metrics.json").read_text())


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


MEASURED = {
    "one label": {"accuracy", "f1_macro", "calibration_error", "matthews_correlation"},
    "windows": {"accuracy", "f1_macro", "calibration_error"},
    "several labels": {"accuracy", "f1_micro", "f1_macro"},
    "a number": {"mse", "mae", "pearsonr", "spearmanr"},
    "tags": {"accuracy", "precision", "recall", "f1"},
    "masked": {"accuracy", "perplexity"},
}


@pytest.mark.parametrize("name", RUNS)
def test_metrics_and_predictions(directories, name):
    metrics = read_metrics(directories[name])
    measured = {key.removeprefix("test_") for key in metrics if key.startswith("test_")}
    assert measured - {"loss", "runtime", "samples_per_second"} == MEASURED[name]
    if name == "masked":
        assert metrics["test_perplexity"] == pytest.approx(math.exp(metrics["test_loss"]), rel=1e-4)
        assert not (directories[name] / "predictions.jsonl").exists()
        return
    lines = read_lines(directories[name] / "predictions.jsonl")
    assert [line["id"] for line in lines] == list(range(len(lines)))
    gold, predicted = ([line[side] for line in lines] for side in ("gold", "predicted"))
    if name == "a number":
        assert metrics["test_mae"] == pytest.approx(
            sum(abs(g - p) for g, p in zip(gold, predicted, strict=True)) / len(gold)
        )
    elif name == "tags":
        right = [g == p for pair in zip(gold, predicted, strict=True) for g, p in zip(*pair, strict=True)]
        assert metrics["test_accuracy"] == pytest.approx(sum(right) / len(right))
    else:
        right = [g == p for g, p in zip(gold, predicted, strict=True)]
        assert metrics["test_accuracy"] == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("name", RUNS)
def test_evaluate_again(directories, name):
    metrics, again = read_metrics(directories[name]), zoo.evaluation.run(directories[name])
    for key in MEASURED[name] | {"loss"}:
        assert again[f"test_{key}"] == pytest.approx(metrics[f"test_{key}"], abs=1e-5), key


# predict, and the stock pipeline


def stock(directory: Path, task: str):
    return pipeline(task, str(directory))


def as_scores(answer: list[dict]) -> dict[str, float]:
    return {entry["label"]: entry["score"] for entry in answer}


@pytest.mark.parametrize("name", ["one label", "several labels", "a number"])
def test_predict_is_the_stock_pipeline(directories, name):
    pipe = stock(directories[name], "text-classification")
    assert type(pipe.model).__module__.startswith("transformers.models.bert")
    assert pipe.tokenizer.model_max_length == 32, "what the pipeline cuts at"
    theirs = pipe(TEXTS, top_k=None, truncation=True)
    ours = list(zoo.prediction.run(directories[name], TEXTS))
    assert [one["id"] for one in ours] == list(range(12)) and [one["text"] for one in ours] == TEXTS
    for one, other in zip(ours, theirs, strict=True):
        scores = as_scores(other)
        if name == "a number":
            assert one["predicted"] == pytest.approx(scores["LABEL_0"], abs=1e-5)
            continue
        assert one["probabilities"] == pytest.approx(scores, abs=1e-5)
        chosen = [label for label, score in one["probabilities"].items() if score >= 0.3]
        assert one["predicted"] == (max(scores, key=scores.get) if name == "one label" else chosen)


@pytest.mark.parametrize("name", ["one label", "windows", "several labels", "a number"])
def test_predict_of_the_test_file_is_predictions_jsonl(directories, data, name):
    kind = RUNS[name][1]
    answers = list(zoo.prediction.run(directories[name], file=data / f"{kind}-test.jsonl"))
    for one, line in zip(answers, read_lines(directories[name] / "predictions.jsonl"), strict=True):
        if name == "a number":
            assert one["predicted"] == pytest.approx(line["predicted"], abs=1e-5)
        else:
            assert one["probabilities"] == pytest.approx(line["probabilities"], abs=1e-5)
            assert set(one["predicted"]) == set(line["predicted"])


def test_spans_and_words_are_those_of_the_pipelines(directories):
    theirs = stock(directories["tags"], "token-classification")(TEXTS, aggregation_strategy="first")
    ours = list(zoo.prediction.run(directories["tags"], TEXTS))
    assert sum(len(one["predicted"]) for one in ours) > 0
    for one, other in zip(ours, theirs, strict=True):
        spans = [(span["entity_group"], span["start"], span["end"]) for span in one["predicted"]]
        assert spans == [(span["entity_group"], span["start"], span["end"]) for span in other]
    questions = ["shares of the [MASK] rose", "the [MASK] said [MASK] fell"]
    filled = stock(directories["masked"], "fill-mask")
    ours = list(zoo.prediction.run(directories["masked"], questions))
    assert [[len(mask) for mask in one["predicted"]] for one in ours] == [[5], [5, 5]]
    first = filled(questions[0])
    assert [word["word"] for word in ours[0]["predicted"][0]] == [word["token_str"] for word in first]
    assert [w["score"] for w in ours[0]["predicted"][0]] == pytest.approx([w["score"] for w in first], abs=1e-6)


def test_answers_are_written_whole_or_not(directories, tmp_path):
    output = tmp_path / "answers.jsonl"
    assert zoo.prediction.write(zoo.prediction.run(directories["one label"], TEXTS), output) == 12
    assert [line["text"] for line in read_lines(output)] == TEXTS

    def broken():
        yield {"id": 0}
        raise KeyboardInterrupt

    before = output.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        zoo.prediction.write(broken(), output)
    assert output.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_lines_for_people(directories):
    said = {name: list(zoo.prediction.in_lines(zoo.prediction.run(directories[name], TEXTS[:2]))) for name in
            ("one label", "several labels", "a number", "tags")}  # fmt: skip
    best = next(zoo.prediction.run(directories["one label"], TEXTS[:1]))
    assert said["one label"][0].startswith(f"{best['predicted']} {best['probabilities'][best['predicted']]:.3f}  ")
    assert all(len(lines) == 2 for lines in said.values()) and said["one label"][0].endswith("...")
    (line,) = zoo.prediction.in_lines(zoo.prediction.run(directories["masked"], ["the [MASK] rose"]))
    assert line.endswith("  the [MASK] rose") and line.count(",") == 4


def test_what_cannot_be_answered(directories, tmp_path):
    def refused(*arguments, **keys) -> str:
        with pytest.raises(UserError) as caught:
            zoo.prediction.run(*arguments, **keys)
        return str(caught.value)

    one = directories["one label"]
    assert "give texts (or image files), or --file" in refused(one)
    assert "one of the two" in refused(one, ["x"], tmp_path / "y")
    assert "text 1 is empty" in refused(one, ["x", ""])
    assert "no such file" in refused(one, file=tmp_path / "none.jsonl")
    write_jsonl(tmp_path / "other.jsonl", [{"body": "x"}])
    assert "no column 'text'; it has body" in refused(one, file=tmp_path / "other.jsonl")
    assert "has no [MASK] to fill" in refused(directories["masked"], ["x"])
    assert "no such directory" in refused(tmp_path / "nowhere", ["x"])


# What stands beside the model


def test_a_mask_behind_the_cut(directories):
    with pytest.raises(UserError, match=r"predict: No mask_token .* texts are cut at 32 tokens"):
        list(zoo.prediction.run(directories["masked"], ["oil " * 60 + "[MASK]"]))


def test_windows_read_the_whole_text(directories, data):
    """A word far beyond the first window changes the answer of a model with windows, and no other."""
    long = " ".join(TEXTS[:4])
    for name, changes in (("windows", True), ("one label", False)):
        first, second = zoo.prediction.run(directories[name], [long, f"{long} grain wheat corn"])
        assert (first["probabilities"] != second["probabilities"]) == changes, name


def test_the_table_of_classes(directories):
    table = json.loads((directories["one label"] / "per_class.json").read_text())
    lines = read_lines(directories["one label"] / "predictions.jsonl")
    assert set(table) == {"acq", "crude", "earn"}
    for name, values in table.items():
        found = sum(line["predicted"] == name for line in lines)
        right = sum(line["predicted"] == line["gold"] == name for line in lines)
        there = sum(line["gold"] == name for line in lines)
        assert values["support"] == there and values["recall"] == pytest.approx(right / there, abs=1e-6)
        assert values["precision"] == pytest.approx(right / found if found else 0.0, abs=1e-6)
    f1 = read_metrics(directories["one label"])["test_f1_macro"]
    assert sum(values["f1"] for values in table.values()) / 3 == pytest.approx(f1, abs=1e-6)
    assert "geo-loc" in json.loads((directories["tags"] / "per_class.json").read_text())
    assert "geo-loc" in json.loads((directories["several labels"] / "per_class.json").read_text())
    assert not (directories["a number"] / "per_class.json").exists()


def test_pictures(directories):
    for name in ("curves.png", "confusion_matrix.png"):
        content = (directories["one label"] / name).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert min(width, height) > 300
    assert not (directories["a number"] / "confusion_matrix.png").exists()


def test_where_a_result_comes_from(directories, data):
    made = json.loads((directories["one label"] / "environment.json").read_text())
    assert made["versions"]["torch"] == torch.__version__ and made["world_size"] == 1
    assert made["hardware"]["threads"] == torch.get_num_threads()
    content = (data / "topics-test.jsonl").read_bytes()
    assert made["data"]["files"]["topics-test.jsonl"] == hashlib.sha256(content).hexdigest()


def test_the_card(directories):
    for name, directory in directories.items():
        card, metrics = ModelCard.load(directory / "README.md"), read_metrics(directory)
        fields = yaml.safe_load((directory / "README.md").read_text().split("---\n")[1])
        (result,) = fields["model-index"][0]["results"]
        assert fields["pipeline_tag"] == RUNS[name][0]["type"] == result["task"]["type"]
        assert {entry["type"] for entry in result["metrics"]} == MEASURED[name]
        for entry in result["metrics"]:
            assert entry["value"] == pytest.approx(metrics[f"test_{entry['type']}"], abs=1e-6)
        assert fields["license"] == "unknown" and "base_model" not in fields
        assert f"{directory.parent}" not in card.text and "/tmp" not in card.text, "no path of a machine"
        pictures = [line for line in card.text.splitlines() if line.startswith("![")]
        assert all((directory / line.partition("(")[2].rstrip(")")).exists() for line in pictures) and pictures


def test_the_code_in_the_card_runs(directories, monkeypatch, capsys):
    for name, directory in directories.items():
        code = (directory / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
        monkeypatch.chdir(directory)
        exec(code, {})
        assert capsys.readouterr().out.startswith(("[{", "{")), name


def test_licences_as_recipe_and_sources_state_them(tiny_bert, data, tmp_path):
    source = shutil.copytree(tiny_bert, tmp_path / "stated")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    stated = recipe(source, RUNS["one label"][0], files(data, "topics"), max_steps=3)
    run(stated, tmp_path / "a")
    assert ModelCard.load(tmp_path / "a" / "README.md").data.license == "mit"
    hub = stated.hub.model_copy(update={"license": "apache-2.0", "data_license": "cc-by-4.0"})
    run(stated.model_copy(update={"hub": hub}), tmp_path / "b")
    card = ModelCard.load(tmp_path / "b" / "README.md")
    assert card.data.license == "apache-2.0" and "Data: cc-by-4.0." in card.text
    rows = shutil.copytree(data, tmp_path / "rows")
    (rows / "README.md").write_text("---\nlicense: [odbl, mit]\n---\n# Rows\n")
    run(recipe(tiny_bert, RUNS["one label"][0], files(rows, "topics"), max_steps=3), tmp_path / "c")
    assert "Model: unknown. Data: odbl, mit." in ModelCard.load(tmp_path / "c" / "README.md").text


# Masked language modelling: what is hidden does not depend on when a run was stopped


def test_a_resumed_run_hides_the_same_tokens(tiny_bert, data, tmp_path):
    masked = recipe(tiny_bert, {"type": "fill-mask"}, files(data, "plain"), max_steps=24, save_steps=12, eval_steps=12)
    run(masked, tmp_path / "whole")
    run(masked, tmp_path / "stopped")
    for name in ("metrics.json", "model.safetensors", "config.json"):
        (tmp_path / "stopped" / name).unlink()
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "checkpoint-24")
    run(masked, tmp_path / "stopped", resume=True)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_counts_before_training(tiny_bert, data, tmp_path, capsys):
    run(recipe(tiny_bert, RUNS["one label"][0], files(data, "topics"), max_steps=3), tmp_path / "run")
    said = capsys.readouterr().out
    train = next(line for line in said.splitlines() if line.startswith("train: "))
    assert (
        train.startswith("train: 72 texts; ")
        and "cut at 32 tokens; " in train
        and "tokens unknown; labels acq" in train
    )
