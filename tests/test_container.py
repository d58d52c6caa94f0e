"""The image, built and run for real where buildah is there and a base can be had; a visible skip elsewhere.

ZOO_TEST_BASE names the base image (any with Python 3.11), ZOO_TEST_INDEX where torch is, ZOO_TEST_VOLUMES what to mount
(certificates, pip's settings), as buildah's --volume has them, with spaces between.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
IMAGE = "localhost/transformer-zoo-test"
BASE = os.environ.get("ZOO_TEST_BASE")


def test_the_build_context_has_all_that_is_copied():
    """What .dockerignore keeps out cannot be copied; what the wheel is made of must be there."""
    kept = {line[1:] for line in (REPO / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = set()
    for line in (REPO / "Dockerfile").read_text().splitlines():
        words = line.split()
        if words[:1] == ["COPY"] and not words[1].startswith("--"):
            copied |= set(words[1:-1])
    assert copied == kept and all((REPO / name).exists() for name in kept)
    assert copied >= {"zoo", "recipes", "cli.py", "pyproject.toml", "constraints.txt"}


def buildah(*arguments: str, **keys) -> subprocess.CompletedProcess:
    return subprocess.run(["buildah", *arguments], capture_output=True, text=True, **keys)


@pytest.mark.skipif(shutil.which("buildah") is None, reason="no buildah on this machine: the image is not built")
@pytest.mark.skipif(BASE is None, reason="ZOO_TEST_BASE names no base image: the image is not built")
def test_the_image_builds_and_runs(tmp_path):
    volumes = [word for volume in os.environ.get("ZOO_TEST_VOLUMES", "").split() for word in ("--volume", volume)]
    index = os.environ.get("ZOO_TEST_INDEX", "https://download.pytorch.org/whl/cpu")
    arguments = ["--build-arg", f"BASE={BASE}", "--build-arg", f"TORCH_INDEX={index}"]
    built = buildah("bud", "--isolation", "chroot", *arguments, *volumes, "--tag", IMAGE, str(REPO))
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    container = buildah("from", IMAGE).stdout.strip()
    job = tmp_path / "job"
    job.mkdir()
    job.chmod(0o777)  # the user in the image is another than the one here
    shutil.copy(REPO / "recipes" / "bert" / "finetune-topics.yaml", job)
    run = ["run", "--isolation", "chroot", "--volume", f"{job}:/job", *volumes, container, "--"]

    def zoo(*words: str) -> str:
        done = buildah(*run, "zoo", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        assert buildah(*run, "id", "-u").stdout.strip() == "1000", "not as root"
        assert "bert/finetune-topics" in zoo("ls", "recipes")
        answer = json.loads(zoo("train", "finetune-topics.yaml", "--smoke", "--json", "--output-dir", "/job/run"))
        assert answer["test_accuracy"] == json.loads((job / "run" / "metrics.json").read_text())["test_accuracy"]
    finally:
        buildah("rm", container)
