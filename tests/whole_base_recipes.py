"""One step of recipes of base models at their whole size, over a hub that holds more rows; an hour or two, so no test.

python -m tests.whole_base_recipes bert/pretrain-base vit/pretrain-base
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import constants

from tests.hub_server import REPO, start
from tests.web_data import fill


def main(names: list[str]) -> None:
    """Trains with the hub's address and `train.max_steps=1` alone, in a folder that is removed behind it."""
    constants.HF_HUB_DISABLE_XET = True
    with tempfile.TemporaryDirectory() as folder:
        server = start(Path(folder) / "hub")
        try:
            # 1,000 of each are held out; a step is 1,024 pictures
            fill(server.api(), Path(folder) / "files", 3000, {"train": 2400, "validation": 200, "test": 16})
            for name in names:
                print(f"== {name}", flush=True)
                command = [sys.executable, str(REPO / "cli.py"), "train", name, "train.max_steps=1"]
                subprocess.run(command, cwd=folder, env=server.environment(Path(folder) / "cache"), check=True)
        finally:
            server.process.terminate()


if __name__ == "__main__":
    main(sys.argv[1:])
