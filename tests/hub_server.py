"""A hub of one's own for tests: the real one, in a process of its own."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi

REPO = Path(__file__).parents[1]
TOKEN = "a-token-of-the-tests"


@dataclass
class Server:
    address: str
    directory: Path
    process: subprocess.Popen

    def api(self, token: str | bool = TOKEN) -> HfApi:
        return HfApi(endpoint=self.address, token=token)


def start(directory: Path, *options: str, token: str | None = TOKEN) -> Server:
    environment = {name: value for name, value in os.environ.items() if name != "ZOO_HUB_TOKEN"}
    environment |= {"PYTHONPATH": str(REPO)} | ({"ZOO_HUB_TOKEN": token} if token else {})
    process = subprocess.Popen(
        [sys.executable, str(REPO / "cli.py"), "serve", str(directory), "--port", "0", *options],
        stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.search(r"at (http://\S+);", line)
    assert found, line + process.stderr.read()
    return Server(found[1], directory, process)
