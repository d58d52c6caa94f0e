"""A whole run: what it leaves behind, how it is chosen, and what it refuses."""

import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

import zoo.evaluation
from tests.tiny_run import SAVE, SERVER, STEPS, TRAIN_ROWS, differing, events, make_recipe, weights, without_time
from zoo.building import build_trainer
from zoo.checkpoints import newest_complete
from zoo.data import load_splits
from zoo.encoding import encoded
from zoo.errors import RunError, UserError
from zoo.loading import load_model, load_processor
from zoo.recipe import Recipe
from zoo.tasks import task_of
from zoo.train import run
from zoo.trainer import ZooTrainer


@pytest.fixture(scope="module")
def recipe(tiny_bert, r8) -> Recipe:
    return make_recipe(tiny_bert, r8)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    """The run that nobody interrupts."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    run(recipe, directory)
    return directory


# The directory


def test_what_a_run_leaves_behind(finished, recipe):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "README.md", "checkpoints", "config.json", "confusion_matrix.png", "curves.png", "environment.json",
        "events.jsonl", "metrics.json", "model.safetensors", "per_class.json", "predictions.jsonl", "recipe.yaml",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((finished / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("bert", ["BertForSequenceClassification"])
    assert config["id2label"] == {"0": "acq", "1": "crude", "2": "earn"} and "auto_map" not in config
    assert (finished / "recipe.yaml").read_text() == recipe.to_yaml()
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["train_samples_per_second"] * metrics["train_runtime"] == pytest.approx(STEPS * 8, rel=0.01)
    assert f"| accuracy | {metrics['test_accuracy']:.4f} |" in (finished / "README.md").read_text()
    assert events(finished, "finished") == [(STEPS, without_time(metrics))]
    assert [step for step, _ in events(finished, "save")] == list(range(SAVE, STEPS + 1, SAVE))


def test_the_official_class_gets_the_same_answers(finished, recipe, r8):
    task = task_of(recipe.task)
    rows = load_splits(recipe.data, task.roles, 7, kind=task.labels).test
    tokenizer = AutoTokenizer.from_pretrained(finished)
    official, info = AutoModelForSequenceClassification.from_pretrained(finished, output_loading_info=True)
    assert type(official).__module__.startswith("transformers.models.bert") and not info["missing_keys"]
    native = load_model(recipe.model.model_copy(update={"path": str(finished)}), "AutoModelForSequenceClassification")
    batch = tokenizer(list(rows["text"]), padding=True, truncation=True, max_length=32, return_tensors="pt")
    with torch.no_grad():
        theirs, ours = official.eval()(**batch).logits, native.eval()(**batch).logits
    assert (theirs - ours).abs().max() < 1e-5
    labels = torch.tensor(rows["label"])
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["test_accuracy"] == pytest.approx((theirs.argmax(-1) == labels).float().mean().item())
    assert metrics["test_loss"] == pytest.approx(torch.nn.functional.cross_entropy(theirs, labels).item(), abs=1e-6)


def test_evaluate_finds_the_same_metrics(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    for split, prefix in (("test", "test"), ("validation", "eval")):
        again = zoo.evaluation.run(finished, split)
        for name in ("loss", "accuracy", "f1_macro"):
            assert again[f"{split}_{name}"] == pytest.approx(metrics[f"{prefix}_{name}"], abs=1e-6), (split, name)


def test_evaluate_other_data(finished, r8, tmp_path):
    metrics = json.loads((finished / "metrics.json").read_text())
    again = zoo.evaluation.run(finished, data=str(r8 / "test.csv"))
    assert again["test_loss"] == pytest.approx(metrics["test_loss"], abs=1e-6)
    frame = (r8 / "test.csv").read_text().replace("text,label", "body,topic", 1)
    (tmp_path / "new.csv").write_text(frame)
    with pytest.raises(UserError, match="no column 'text'; it has body, topic"):
        zoo.evaluation.run(finished, data=str(tmp_path / "new.csv"))
    columns = "data.columns={text: body, label: topic}"
    again = zoo.evaluation.run(finished, "validation", [columns], str(tmp_path / "new.csv"))
    assert again["validation_loss"] == pytest.approx(metrics["test_loss"], abs=1e-6)
    with pytest.raises(UserError, match="no/such-data: not in the cache"):
        zoo.evaluation.run(finished, data="no/such-data")


def test_evaluate_of_what_is_not_finished_or_not_read(finished, tmp_path):
    unfinished = shutil.copytree(finished, tmp_path / "unfinished", ignore=shutil.ignore_patterns("checkpoints"))
    for override in ("model.path=elsewhere", "model={path: elsewhere}", "name=other"):
        with pytest.raises(UserError) as caught:
            zoo.evaluation.run(unfinished, "test", [override])
        assert str(caught.value).startswith(f"{override}: an evaluation does not read it; it reads data")
    (unfinished / "metrics.json").unlink()
    with pytest.raises(UserError, match="not a finished run"):
        zoo.evaluation.run(unfinished)
    with pytest.raises(UserError, match="no such directory"):
        zoo.evaluation.run(tmp_path / "nowhere")


# The choice


def test_the_best_checkpoint_is_what_is_saved(recipe, tmp_path):
    # the highest loss, which a model that learns has early: that the last step is not it does not hang on rounding
    train = recipe.train | {"metric_for_best_model": "loss", "greater_is_better": True}
    run(recipe.model_copy(update={"train": train}), tmp_path)
    logged = {step: values["eval_loss"] for step, values in events(tmp_path, "evaluate")[:-1]}
    best = max(logged, key=lambda step: (logged[step], -step))
    assert len(logged) == STEPS // SAVE and logged[STEPS] < logged[best] - 1e-3, "it learns"
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["eval_loss"] == logged[best]
    assert differing(weights(tmp_path), weights(tmp_path / "checkpoints" / f"checkpoint-{best}")) == []
    assert differing(weights(tmp_path), weights(tmp_path / "checkpoints" / f"checkpoint-{STEPS}")) != []


def test_the_test_split_is_read_after_the_choice(recipe, tmp_path, monkeypatch):
    order = []
    load_best, evaluate, predict = ZooTrainer._load_best_model, ZooTrainer.evaluate, ZooTrainer.predict

    def noted_choice(self):
        order.append("choice")
        load_best(self)

    def noted_evaluation(self, rows=None, *args, **kwargs):
        order.append(kwargs.get("metric_key_prefix", "eval"))
        return evaluate(self, rows, *args, **kwargs)

    def noted_prediction(self, *args, metric_key_prefix):
        order.append(metric_key_prefix)
        return predict(self, *args, metric_key_prefix=metric_key_prefix)

    monkeypatch.setattr(ZooTrainer, "predict", noted_prediction)
    monkeypatch.setattr(ZooTrainer, "_load_best_model", noted_choice)
    monkeypatch.setattr(ZooTrainer, "evaluate", noted_evaluation)
    short = recipe.model_copy(update={"train": recipe.train | {"max_steps": 8}})
    run(short, tmp_path / "run")
    assert order == ["eval", "eval", "choice", "eval", "test"]


# Losses that are not numbers


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"learning_rate": 1e30, "max_grad_norm": 0.0}, "the loss is nan at step 2, on train rows ["),
        ({"learning_rate": 1e30, "max_grad_norm": 0.0, "max_steps": 1, "eval_strategy": "no",
          "load_best_model_at_end": False}, "eval_loss is nan after step 1"),
    ],
    ids=["in training", "after the last step"],
)  # fmt: skip
def test_nan_stops_the_run(recipe, tmp_path, train, says):
    with pytest.raises(RunError) as caught:
        run(recipe.model_copy(update={"train": recipe.train | train}), tmp_path / "run")
    assert says in str(caught.value) and "lower learning_rate" in str(caught.value)
    assert not (tmp_path / "run" / "model.safetensors").exists() and not (tmp_path / "run" / "metrics.json").exists()
    for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


@pytest.mark.parametrize(("poison", "word"), [(math.inf, "inf"), (math.nan, "nan")])
def test_the_rows_of_a_wrong_loss_are_named(recipe, tmp_path, poison, word):
    trainer = make_trainer(recipe, tmp_path, {"max_steps": 9, "eval_strategy": "no", "load_best_model_at_end": False})
    rows = trainer.train_dataset
    loss = trainer.compute_loss

    def poisoned(model, inputs, *args, **kwargs):
        return loss(model, inputs, *args, **kwargs) * (poison if poisoned_row in trainer.rows else 1.0)

    trainer.compute_loss = poisoned
    poisoned_row = rows[40]["row"]
    with pytest.raises(RunError, match=f"the loss is {word} at step") as caught:
        trainer.train()
    named = json.loads(str(caught.value).partition("rows ")[2].partition(";")[0])
    assert poisoned_row in named and len(named) == 8 and set(named) <= set(rows["row"])


# No room, as far as a process can be told so without a disk of its own


def _with_small_files(recipe: Recipe, directory: Path, largest: int, answer) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    try:
        run(recipe, directory)
    except RunError as error:
        answer.put(str(error))


@pytest.mark.parametrize(("largest", "file"), [(100_000, "the model"), (250_000, "the optimizer")])
def test_a_checkpoint_that_finds_no_room(recipe, finished, tmp_path, largest, file):
    sizes = {path.name: path.stat().st_size for path in (finished / "checkpoints" / f"checkpoint-{STEPS}").iterdir()}
    assert sizes["model.safetensors"] > 100_000 and sizes["model.safetensors"] < 250_000 < sizes["optimizer.pt"]
    answer = SERVER.Queue()
    process = SERVER.Process(target=_with_small_files, args=(recipe, tmp_path / "run", largest, answer))
    process.start()
    said = answer.get(timeout=120)
    process.join()
    assert "checkpoint-4: cannot be written: " in said and "make room there, and continue with --resume" in said, file
    assert newest_complete(tmp_path / "run" / "checkpoints") is None
    metrics = run(recipe, tmp_path / "run", resume=True)
    assert without_time(metrics) == without_time(json.loads((finished / "metrics.json").read_text()))


def _cached_in_small_files(recipe: Recipe, directory: Path, warm: bool, answer) -> None:
    datasets.config.HF_DATASETS_CACHE = directory / "cache"
    os.environ["HF_HOME"] = str(directory / "home")
    if warm:
        load_splits(recipe.data, task_of(recipe.task).roles, 7, kind=task_of(recipe.task).labels)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
    try:
        run(recipe, directory / "run")
    except RunError as error:
        answer.put(str(error))


@pytest.mark.parametrize("warm", [False, True], ids=["rows", "tokenised rows"])
def test_a_cache_that_finds_no_room(recipe, tmp_path, warm):
    answer = SERVER.Queue()
    process = SERVER.Process(target=_cached_in_small_files, args=(recipe, tmp_path, warm, answer))
    process.start()
    said = answer.get(timeout=120)
    process.join()
    place = tmp_path / ("home/zoo/encoded" if warm else "cache")
    assert said == f"{place}: cannot be written: File too large; make room, or set HF_HOME"
    assert not (tmp_path / "run" / "recipe.yaml").exists(), "the directory stays free"


# The directory is somebody's


def test_directories_that_are_refused(recipe, finished, tmp_path):
    def refused(directory: Path, resume: bool = False, recipe: Recipe = recipe) -> str:
        with pytest.raises(UserError) as caught:
            run(recipe, directory, resume)
        return str(caught.value)

    (tmp_path / "file").write_text("")
    assert "a file of that name exists" in refused(tmp_path / "file")
    assert "cannot be written" in refused(tmp_path / "file" / "below")
    assert "cannot be written" in refused(Path("/proc/zoo"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    assert "not empty, and not a run of zoo" in refused(tmp_path / "full", resume=True)
    assert "holds a finished run; add --resume" in refused(finished)
    other = recipe.model_copy(update={"train": recipe.train | {"seed": 8}})
    assert "its run had another recipe" in refused(finished, resume=True, recipe=other)
    assert (finished / "recipe.yaml").read_text() == recipe.to_yaml()


def test_a_run_of_a_version_that_had_fewer_keys_goes_on(recipe, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "old")
    written = recipe.to_yaml()
    (tmp_path / "old" / "recipe.yaml").write_text(written.replace("lora: {}\n", "").replace("seeds: []\n", ""))
    assert "lora: {}\n" in written and run(recipe, tmp_path / "old", resume=True)["test_loss"] > 0


def test_one_run_at_a_time(recipe, tmp_path):
    directory = tmp_path / "run"
    process = SERVER.Process(target=run, args=(recipe, directory))
    process.start()
    while not (directory / "events.jsonl").exists():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(UserError, match="another run is at work in it"):
            run(recipe, directory, resume=True)
    finally:
        process.kill()
        process.join()
    short = recipe.model_copy(update={"train": recipe.train | {"max_steps": 4}})
    with pytest.raises(UserError, match="had another recipe"):
        run(short, directory, resume=True)
    assert "test_loss" in run(recipe, directory, resume=True), "whoever is killed holds nothing"


def test_what_is_left_of_a_recipe_is_no_run(recipe, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / ".recipe.yaml.123").write_text("name: ti")
    (directory / ".lock").touch()
    run(recipe.model_copy(update={"train": recipe.train | {"max_steps": 4}}), directory)
    assert not [path.name for path in directory.iterdir() if path.name.startswith(".")]


def test_a_recipe_that_is_refused_leaves_its_directory_free(recipe, tmp_path):
    wrong = recipe.model_copy(update={"data": recipe.data.model_copy(update={"columns": {"text": "txt"}})})
    with pytest.raises(UserError, match="did you mean text"):
        run(wrong, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_finished_run_is_not_trained_again(recipe, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert run(recipe, finished, resume=True) == json.loads((finished / "metrics.json").read_text())
    assert "is finished; nothing is trained again" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"metric_for_best_model": "acuracy"}, "train.metric_for_best_model: .*'acuracy'; did you mean accuracy"),
        ({"per_device_train_batch_size": 0}, r"train.per_device_train_batch_size: 0; give 1 or more"),
        ({"learning_rate": -1.0}, "train: refused by transformers: Invalid learning rate"),
        ({"lr_scheduler_kwargs": {"num_cycels": 1}}, "train: refused by transformers: .*num_cycels"),
        ({"optim": "adamw_apex_fused"}, "train: refused by transformers: .*apex"),
        ({"save_steps": 3}, "train: refused by transformers: .*load_best_model_at_end"),
    ],
)
def test_train_sections_that_only_the_library_can_judge(recipe, tmp_path, train, says):
    with pytest.raises(UserError, match=says):
        run(recipe.model_copy(update={"train": recipe.train | train}), tmp_path / "run")
    short = recipe.model_copy(update={"train": recipe.train | {"max_steps": 4}})
    assert "test_accuracy" in run(short, tmp_path / "run"), "the directory is still free"


METRIC = """
import datasets
import evaluate
from sklearn.metrics import f1_score


class Mine(evaluate.Metric):
    def _info(self):
        numbers = datasets.Value("int64")
        features = datasets.Features({"predictions": numbers, "references": numbers})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references, labels=None, pos_label=1, average="binary", broken=False):
        if broken:
            return predictions.there_is_none
        return {"mine": f1_score(references, predictions, labels=labels, pos_label=pos_label, average=average)}
"""


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("matthews_correlation", {"bogus": 1}, "unexpected keyword argument 'bogus'"),
        ("mine.py", {"bogus": 1, "average": "macro"}, "unexpected keyword argument 'bogus'"),
        ("mine.py", {"average": "bogus"}, "Error: .*average.*bogus"),
        ("mine.py", {}, "Target is multiclass but average='binary'"),
        ("mine.py", {"broken": True}, "AttributeError: .*there_is_none"),
    ],
)
def test_options_of_metrics_are_judged_before_the_training(recipe, tmp_path, monkeypatch, name, options, says):
    (tmp_path / "mine.py").write_text(METRIC)
    monkeypatch.setattr(ZooTrainer, "train", lambda *args, **kwargs: pytest.fail("it trains"))
    module = str(tmp_path / name) if name == "mine.py" else name
    task = recipe.task.model_copy(update={"metrics": {module: options}})
    with pytest.raises(UserError, match=rf"task.metrics.*{name}: refused what it was given: .*{says}"):
        run(recipe.model_copy(update={"task": task}), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == [], "the directory stays free"


def test_options_that_fit_the_data_are_taken(recipe, tmp_path):
    """Each of these fails on other labels than the data's three."""
    (tmp_path / "mine.py").write_text(METRIC)
    for options in ({"average": "micro", "labels": [0, 2]}, {"average": "macro", "pos_label": 2}):
        task = recipe.task.model_copy(update={"metrics": {str(tmp_path / "mine.py"): options}})
        train = recipe.train | {"max_steps": 4, "metric_for_best_model": "mine", "greater_is_better": True}
        measured = recipe.model_copy(update={"task": task, "train": train})
        assert 0 <= run(measured, tmp_path / f"run-{options['average']}")["test_mine"] <= 1
    wrong = measured.model_copy(update={"train": train | {"metric_for_best_model": "mne"}})
    with pytest.raises(UserError, match="does not measure 'mne'; did you mean mine"):
        run(wrong, tmp_path / "wrong")


def test_flex_attention_that_cannot_train(recipe, tiny_bert, r8, tmp_path, monkeypatch):
    keys = {"attn_implementation": "flex_attention", "config": {"hidden_dropout_prob": 0.0}}
    if not torch.accelerator.is_available():
        with pytest.raises(
            UserError, match=r"model.attn_implementation: flex_attention cannot train on a CPU; use sdpa"
        ):
            run(make_recipe(tiny_bert, r8, **keys), tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(TrainingArguments, "device", torch.device("cuda"))
        with pytest.raises(UserError, match=r"set model.config.attention_probs_dropout_prob: 0.0 \(it is 0.1\)"):
            run(make_recipe(tiny_bert, r8, **keys), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == [], "the directory stays free"


def test_more_tokens_than_positions(recipe, tmp_path):
    task = recipe.task.model_copy(update={"max_length": 65})
    with pytest.raises(UserError, match=r"task.max_length: 65, but the model has 64 positions"):
        run(recipe.model_copy(update={"task": task}), tmp_path / "run")


# Variants


def test_a_variant_carries_its_code(tiny_bert, r8, tmp_path):
    variant = {"attention": ["full", "local"], "attention_kwargs": {"local": {"window": 2}}}
    recipe = make_recipe(tiny_bert, r8, {"max_steps": 4}, **variant)
    run(recipe, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model_type"] == "zoo_bert" and config["attention_kwargs"] == {"local": {"window": 2}}
    section = make_recipe(tmp_path / "run", r8).model
    model = load_model(section, "AutoModelForSequenceClassification").eval()
    tokenizer = load_processor(section, "tokenizer")
    assert model.config.attention == ["full", "local"], "a checkpoint keeps its attention"
    text = "shares of the oil company rose on the takeover offer said traders"
    ours = model(**tokenizer(text, return_tensors="pt")).logits
    code = f"""
import sys
from transformers import pipeline
answer = pipeline("text-classification", {str(tmp_path / "run")!r}, trust_remote_code=True, top_k=None,
                  function_to_apply="none")([{text!r}])
scores = {{one["label"]: one["score"] for one in answer[0]}}
print([scores[name] for name in ("acq", "crude", "earn")])
assert "zoo" not in sys.modules
"""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    assert (ours[0] - theirs).abs().max() < 1e-5
    again = zoo.evaluation.run(tmp_path / "run")
    assert again["test_loss"] == pytest.approx(
        json.loads((tmp_path / "run" / "metrics.json").read_text())["test_loss"], abs=1e-6
    )


# What a step is


def make_trainer(recipe: Recipe, directory: Path, train: dict | None = None, **config) -> ZooTrainer:
    task = task_of(recipe.task)
    arguments = recipe.train | {"report_to": "none", "remove_unused_columns": False} | (train or {})
    torch.manual_seed(3)
    splits = load_splits(recipe.data, task.roles, 7, kind=task.labels)
    model = load_model(recipe.model.model_copy(update={"config": config}), task.auto_class, splits.labels)
    tokenizer = load_processor(recipe.model, "tokenizer")
    rows = [encoded(part, recipe, task, tokenizer, 7)[0] for part in (splits.train, splits.validation)]
    settings = TrainingArguments(output_dir=str(directory), **arguments)
    return build_trainer(recipe, task, model, tokenizer, settings, splits.labels, *rows)


PLAIN = {"max_steps": 6, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def trained(trainer: ZooTrainer) -> dict[str, torch.Tensor]:
    """The weights after training; the rows of each step are in `trainer.order`, the losses in `trainer.losses`."""
    step, trainer.order, trainer.losses = trainer.training_step, [], []

    def noted(*args, **kwargs):
        loss = step(*args, **kwargs)
        trainer.order.append(trainer.rows)
        trainer.losses.append(loss.item())
        return loss

    trainer.training_step = noted
    trainer.train()
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def test_accumulated_batches_are_one_large_batch(recipe, tmp_path):
    # Adam divides by the gradients' size, and so makes much of rounding where they are small
    whole = PLAIN | {"per_device_train_batch_size": 16, "max_steps": 4, "optim": "sgd", "learning_rate": 0.1}
    large = make_trainer(recipe, tmp_path, whole, **NO_DROPOUT)
    halves = whole | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    small = make_trainer(recipe, tmp_path, halves, **NO_DROPOUT)
    first, second = trained(large), trained(small)
    assert [sorted(rows) for rows in large.order] == [
        sorted(a + b) for a, b in zip(small.order[::2], small.order[1::2], strict=True)
    ]
    sums = [a + b for a, b in zip(small.losses[::2], small.losses[1::2], strict=True)]
    assert large.losses == pytest.approx(sums, abs=1e-6)
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-6


def test_a_seed_says_it_all(recipe, tmp_path):
    def result(**changes):
        trainer = make_trainer(recipe, tmp_path, PLAIN | changes)
        return trained(trainer), trainer.order

    first, order = result()
    for same in (result(), result(dataloader_num_workers=2)):
        assert differing(first, same[0]) == [] and same[1] == order
    other = result(seed=8)
    assert differing(first, other[0]) != [] and other[1] != order


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_the_order_is_a_function_of_seed_and_epoch(recipe, tmp_path, strategy):
    """Whatever else draws random numbers, and also when the run begins in the middle of its second epoch."""
    train = PLAIN | {"max_steps": 20, "save_strategy": "steps", "save_steps": 12, "train_sampling_strategy": strategy}
    with_dropout = make_trainer(recipe, tmp_path / "a", train)
    without = make_trainer(recipe, tmp_path / "b", train, **NO_DROPOUT)
    end = trained(with_dropout)
    trained(without)
    assert with_dropout.order == without.order
    epochs = [sorted(itertools.chain(*with_dropout.order[start : start + 9])) for start in (0, 9)]
    assert epochs[0] == epochs[1] and len(set(epochs[0])) == TRAIN_ROWS
    assert with_dropout.order[:9] != with_dropout.order[9:18]
    resumed = make_trainer(recipe, tmp_path / "a", train)
    step, order = resumed.training_step, []
    resumed.training_step = lambda *args, **kwargs: (step(*args, **kwargs), order.append(resumed.rows))[0]
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-12"))
    assert order == with_dropout.order[12:]
    assert differing(end, resumed.model.state_dict()) == []
