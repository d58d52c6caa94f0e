"""A hub as a source of models and data: every way in which it does not give them is said in words."""

import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import httpx2
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from tests.hub_server import TOKEN
from zoo import hub
from zoo.data import load_splits
from zoo.data_sections import DataSection
from zoo.errors import RunError, UserError
from zoo.hub_errors import dataset_failure
from zoo.loading import load_model, load_processor
from zoo.sections import ModelSection

pytestmark = pytest.mark.usefixtures("online", "no_waiting")


def ask(repo: str, **keys):
    return load_model(ModelSection(path=repo, **keys), "AutoModelForSequenceClassification", ["a", "b", "c"])


def refused(repo: str, error=UserError, **keys) -> str:
    with pytest.raises(error) as caught:
        ask(repo, **keys)
    said = str(caught.value)
    with pytest.raises(error) as caught:
        load_processor(ModelSection(path=repo, **keys), "tokenizer")
    also = str(caught.value)
    assert TOKEN not in said + also
    assert also == said or ("no readable config.json" in said and "its tokenizer cannot be read" in also)
    return said


class Bad(BaseHTTPRequestHandler):
    """A hub that answers as it is told to; what it is not told it asks of a good one."""

    good = ""
    status = 0

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if self.status:
            self.send_error(self.status)
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() in ("authorization", "range")}
        answer = httpx2.request(self.command, self.good + self.path, headers=headers)
        self.send_response(answer.status_code)
        for name, value in answer.headers.items():
            if name.lower() not in ("connection", "date", "server"):
                self.send_header(name, value.replace(self.good, f"http://{self.headers['host']}"))
        self.end_headers()
        weights = self.command == "GET" and "model.safetensors" in self.path
        self.wfile.write(answer.content[: len(answer.content) // 2] if weights else answer.content)

    def log_message(self, *words):
        pass


@pytest.fixture
def bad(server, monkeypatch) -> Iterator[type[Bad]]:
    handler = type("Answering", (Bad,), {"good": server.address})
    listening = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    use(f"http://127.0.0.1:{listening.server_port}", monkeypatch)
    yield handler
    listening.shutdown()


def use(address: str, monkeypatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


def test_what_is_not_there(server, topics_run, monkeypatch):
    hub.push(topics_run, "zoo/private", private=True)
    assert ask("zoo/private") is not None
    assert f"model zoo/nothing: {server.address} does not know it, or the token may not see it" in refused(
        "zoo/nothing"
    )
    assert "does not have this revision of it" in refused("zoo/private", revision="v9")
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_secr\u00e9t")
        assert (
            refused("zoo/other") == "model zoo/other: the token for the hub is not of ASCII letters; look at HF_TOKEN"
        )
        said = str(dataset_failure("data zoo/rows", "zoo/rows", None, "try again"))
        assert said == "data zoo/rows: the token for the hub is not of ASCII letters; look at HF_TOKEN"
    server.api().create_repo("zoo/empty")
    assert "no readable config.json" in refused("zoo/empty")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE + "-of-another")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    assert "the token may not see it" in refused("zoo/private")


@pytest.mark.parametrize(("status", "error", "says"), [
    (500, RunError, "failed: status 500; try again"), (503, RunError, "failed: status 503; try again"),
    (403, UserError, "does not accept the token"),
])  # fmt: skip
def test_a_hub_that_fails(bad, status, error, says):
    bad.status = status
    assert says in refused("zoo/anything", error)


def test_nobody_at_the_address(monkeypatch):
    use("http://127.0.0.1:9", monkeypatch)
    said = refused("zoo/anything", RunError)
    assert said.startswith("model zoo/anything: cannot reach http://127.0.0.1:9: ConnectError") and "try again" in said


def test_offline_and_not_in_the_cache(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "zoo/anything: not in the cache, and HF_HUB_OFFLINE is set" in refused("zoo/anything")


def test_it_goes_away_in_the_middle(bad, server, topics_run, tmp_path, monkeypatch):
    """Half of the weights arrives: an error; from a good hub they are whole."""
    larger = shutil.copytree(topics_run, tmp_path / "larger", ignore=shutil.ignore_patterns("checkpoints"))
    with monkeypatch.context() as good:
        use(server.address, good)
        hub.push(larger, "zoo/larger")
    with pytest.raises(RunError) as caught:
        ask("zoo/larger")
    assert "try again" in str(caught.value)
    use(server.address, monkeypatch)
    held = ask("zoo/larger").state_dict()
    for name, tensor in load_file(larger / "model.safetensors").items():
        assert any(torch.equal(tensor, other) for other in held.values() if other.shape == tensor.shape), name


def test_weights_from_a_hub_are_compared_with_the_files(topics_run, monkeypatch):
    """As those of a directory are."""
    hub.push(topics_run, "zoo/topics")
    ask("zoo/topics")
    seen = list(Path(constants.HF_HUB_CACHE).rglob("model.safetensors"))
    assert len(seen) == 1
    tensors = load_file(seen[0])
    from transformers.modeling_utils import PreTrainedModel

    opened = PreTrainedModel.from_pretrained.__func__

    def changed(cls, *arguments, **keys):
        found = opened(cls, *arguments, **keys)
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, seen[0].resolve(), {"format": "pt"})
        return found

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(changed))
    with pytest.raises(RunError, match="are not the same"):
        ask("zoo/topics")


@pytest.mark.parametrize(("address", "status", "error", "says"), [
    ("http://127.0.0.1:9", 0, RunError, "data zoo/rows: cannot reach http://127.0.0.1:9"),
    (None, 500, RunError, "data zoo/rows: http://"), (None, 404, UserError, "data zoo/rows: http://"),
    ("offline", 0, UserError, "data zoo/rows: not in the cache, and HF_HUB_OFFLINE is set"),
])  # fmt: skip
def test_data(bad, monkeypatch, address, status, error, says):
    bad.status = status
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", address == "offline")
    if address == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif address:
        use(address, monkeypatch)
    with pytest.raises(error) as caught:
        load_splits(DataSection(path="zoo/rows"), ["text"], 1)
    assert says in str(caught.value) and TOKEN not in str(caught.value)
