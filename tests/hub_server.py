"""A hub of one's own for tests: the real one, in a process of its own."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    def environment(self, cache: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Of another process, whose clients know this hub alone and begin with an empty cache."""
        offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_TOKEN")
        found = {name: value for name, value in os.environ.items() if name not in offline}
        found |= {"HF_ENDPOINT": self.address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        found |= {"HF_HUB_CACHE": str(cache / "hub"), "HF_DATASETS_CACHE": str(cache / "datasets")}
        found |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "PYTHONPATH": str(REPO)}
        return found | ({"HF_TOKEN": token} if token else {})

    def asked(self, code: str, cache: Path) -> Any:
        """What a Python process with the stock clients prints, which is JSON."""
        command = [sys.executable, "-c", code]
        environment = self.environment(cache) | {"USE_TORCH": "0"}
        done = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)


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
