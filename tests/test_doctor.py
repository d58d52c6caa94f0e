"""`zoo doctor` says what is there and what is wrong, and never a token."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from threading import Thread

import pytest

from zoo.doctor import packages

REPO = Path(__file__).parents[1]
TOKEN = "hf_" + "s" * 34


def doctor(home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    variables = clean | {"HF_HOME": str(home), "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, str(REPO / "cli.py"), "doctor", *words]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert TOKEN not in done.stdout + done.stderr and "Traceback" not in done.stderr
    return done


def found(done: subprocess.CompletedProcess) -> dict[str, dict]:
    return {finding["name"]: finding for finding in json.loads(done.stdout)}


@pytest.fixture
def hub():
    """A server on this machine; what it answers is set by its `status`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(self.server.status)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.status = 200
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_machine_without_a_problem(tmp_path, hub):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    done = doctor(tmp_path, "--json", HF_ENDPOINT=endpoint)
    findings = found(done)
    assert done.returncode == 0 and all(finding["problem"] is None for finding in findings.values()), findings
    assert findings["torch"]["value"] == metadata.version("torch")
    assert findings["hub"]["value"] == f"{endpoint} answers 200" and findings["hub token"]["value"] == "set"
    assert findings["cpu"]["value"].startswith("1 threads on ") and str(tmp_path) in findings["cache"]["value"]


def test_problems_have_remedies(tmp_path, hub):
    hub.status = 503
    findings = found(doctor(tmp_path, "--json", HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}"))
    assert findings["hub"]["problem"].startswith("it has failed; directories, files and pypi:// sources work")
    (tmp_path / "file").touch()
    done = doctor(tmp_path / "file" / "home", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1 and done.stdout.endswith("\n2 problems found\n")
    assert "cannot be written: Not a directory; unlock it, or set HF_HOME" in done.stdout
    assert "cannot be reached (ConnectError)" in done.stdout


def test_offline_asks_nobody(tmp_path):
    done = doctor(tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and "not asked, HF_HUB_OFFLINE is set" in done.stdout
    assert done.stdout.endswith("\nno problem found\n")


def test_packages_of_other_versions():
    wanted = ["torch>=2", "torch<2", "no-such-package>=1", "pytest>=99; extra == 'dev'"]
    fits, old, missing = packages(wanted)
    assert fits.problem is None and fits.value == old.value
    assert old.problem == "<2 is needed; run: pip install 'torch<2'"
    assert (missing.value, missing.problem) == ("not installed", "run: pip install 'no-such-package>=1'")
