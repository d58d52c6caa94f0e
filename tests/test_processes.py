"""Two processes with batches of four learn what one does with batches of eight."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import read_r8
from tests.test_runs import write_jsonl
from tests.test_writing import T5
from tests.tiny_run import SERVER
from zoo.recipe import Recipe

CLASSES = {"type": "text-classification", "max_length": 32}
BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS = {
    "classes": (CLASSES, {"config": BERT, "implementation": "official"}, {"label_smoothing_factor": 0.1}),
    "masked": (
        {"type": "fill-mask", "max_length": 32},
        {"config": BERT},
        {"train_sampling_strategy": "group_by_length"},
    ),
    "next": ({"type": "next-sentence-prediction", "max_length": 32}, {"config": BERT}, {}),
    "written": ({"type": "summarization", "max_length": 32}, {"config": {**T5, "dropout_rate": 0.0}}, {}),
}


def recipe(folder: Path, tokenizer: Path, name: str, batch: int) -> Recipe:
    task, model, train = MODELS[name]
    start = {"tokenizer": str(tokenizer)} if name == "written" else {"path": str(tokenizer)}
    settings = {
        "max_steps": 9, "per_device_train_batch_size": batch, "per_device_eval_batch_size": batch, "optim": "sgd",
        "learning_rate": 0.1, "disable_tqdm": True, "save_steps": 7, "seed": 7, "use_cpu": True,
    }  # fmt: skip
    return Recipe.model_validate(
        {"name": "two", "task": task, "model": model | start, "train": settings | train,
         "data": {"path": str(folder), "files": {"train": "train.jsonl", "test": "test.jsonl"}, "validation": 0.2}}
    )  # fmt: skip


def trainer(made: Recipe, directory: Path):
    # in the processes that train, and not where the tests are collected
    from transformers import set_seed

    from zoo.building import build_trainer, training_arguments
    from zoo.data import load_splits
    from zoo.encoding import encoded
    from zoo.loading import load_model, load_processor
    from zoo.tasks import task_of

    task, arguments = task_of(made.task), training_arguments(made, directory)
    set_seed(7)
    processor = load_processor(made.model, task.processor)
    splits = load_splits(made.data, task.roles, 7, kind=task.labels)
    model = load_model(made.model, task.auto_class, splits.labels, task.problem_type, processor=processor)
    some = {"train": splits.train, "validation": splits.validation}
    rows = [encoded(some[name], made, task, processor, 7, training=name == "train")[0] for name in some]
    return build_trainer(made, task, model, processor, arguments, splits.labels, *rows)


def learned(folder: Path, tokenizer: Path, output: Path, batch: int) -> None:
    """Trains each, and writes what came of it; an epoch has 6 steps. The end of two of them is learned once more."""
    for name in MODELS:
        made = recipe(folder, tokenizer, name, batch)
        first = trainer(made, output / name)
        seen, step = [], first.training_step

        def noted(*args, first=first, seen=seen, step=step, **kwargs):
            loss = step(*args, **kwargs)
            seen.append(first.rows)
            return loss

        first.training_step = noted
        metrics = {"train_loss": first.train().training_loss, **first.evaluate()}
        rank = first.args.process_index
        (output / f"{name}-{rank}.json").write_text(json.dumps({"rows": seen, "metrics": metrics}))
        weights = {key: one.detach().clone() for key, one in first.model.named_parameters()}
        save_file(weights, output / f"{name}-{rank}.safetensors")
        if name in ("masked", "written"):
            again = trainer(made, output / name)
            resumed = again.train(resume_from_checkpoint=str(output / name / "checkpoints" / "checkpoint-7"))
            assert resumed.training_loss == pytest.approx(metrics["train_loss"], rel=1e-6)
            # sums of two processes are the same to rounding only
            assert all((one - weights[key]).abs().max() < 1e-6 for key, one in again.model.named_parameters())


def process(rank: int, port: int, *arguments) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    learned(*arguments)
    assert torch.distributed.get_world_size() == 2


@pytest.fixture(scope="module")
def both(tiny_bert, tmp_path_factory) -> tuple[Path, Path]:
    """What one process wrote, and what two did."""
    folder = tmp_path_factory.mktemp("two")
    for split, count in (("train", 60), ("test", 12)):
        # R8 has no full stops left: its sentences are made of ten words here
        texts = [(text.split(), label) for text, label in read_r8(split, count)]
        rows = [
            {"text": ". ".join(" ".join(words[n : n + 10]) for n in range(0, len(words), 10)), "label": label,
             "summary": " ".join(words[:5])}
            for words, label in texts
        ]  # fmt: skip
        write_jsonl(folder / f"{split}.jsonl", rows)
    one, two = folder / "one", folder / "two"
    for output in (one, two):
        output.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [SERVER.Process(target=process, args=(n, port, folder, tiny_bert, two, 4)) for n in range(2)]
    processes.append(SERVER.Process(target=learned, args=(folder, tiny_bert, one, 8)))
    for started in processes:
        started.start()
    for started in processes:
        started.join(120)
    assert [started.exitcode for started in processes] == [0, 0, 0]
    return one, two


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_are_one(both, name):
    one, two = both
    alone, *ranks = (
        json.loads(file.read_text()) for file in (one / f"{name}-0.json", *sorted(two.glob(f"{name}-?.json")))
    )
    together = [first + second for first, second in zip(*(rank["rows"] for rank in ranks), strict=True)]
    assert [sorted(rows) for rows in together] == [sorted(rows) for rows in alone["rows"]]
    wanted, *found = (
        load_file(file) for file in (one / f"{name}-0.safetensors", *sorted(two.glob(f"{name}-?.safetensors")))
    )
    assert len(found) == 2
    for weights in found:
        assert max((weights[key] - wanted[key]).abs().max().item() for key in wanted) < 2e-6
    for rank in ranks:
        assert rank["metrics"]["train_loss"] == pytest.approx(alone["metrics"]["train_loss"], abs=2e-6)
        timed = ("runtime", "per_second", "loss", "perplexity")
        measured = {key: value for key, value in rank["metrics"].items() if not key.endswith(timed)}
        assert measured == pytest.approx({key: alone["metrics"][key] for key in measured}, abs=1e-6)
        assert len(measured) > 1
