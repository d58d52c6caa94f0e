"""What the system does not let a person read or write is said in words. For root this thread is made somebody else."""

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest

from tests.conftest import read_r8, write_csv
from tests.test_runs import recipe
from zoo import hub, prediction
from zoo.data import load_splits
from zoo.data_sections import DataSection
from zoo.errors import UserError
from zoo.train import run

NOBODY = 65534
TASK = {"type": "text-classification"}


@contextmanager
def nobody() -> Iterator[None]:
    """File access of this thread is that of the user nobody, where the tests run as root."""
    libc = ctypes.CDLL(None)
    if os.getuid() == 0:
        libc.setfsuid(NOBODY)
    try:
        yield
    finally:
        libc.setfsuid(os.getuid())


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody may enter, with a locked one and a file that nobody may read in it."""
    # pytest's own folders are closed to others
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    (folder / "locked").mkdir()
    write_csv(folder / "secret.csv", read_r8("train", 24))
    write_csv(folder / "open.csv", read_r8("train", 24))
    (folder / "cache").mkdir()
    (folder / "cache").chmod(0o777)
    (folder / "locked").chmod(0o555)
    (folder / "secret.csv").chmod(0o000)
    yield folder
    shutil.rmtree(folder)


def test_nothing_can_be_written(tiny_bert, place):
    wanted = recipe(tiny_bert, TASK, {"path": str(place / "open.csv")})
    with nobody(), pytest.raises(UserError, match=r"locked/run: cannot be written: Permission denied"):
        run(wanted, place / "locked" / "run")
    with nobody(), pytest.raises(UserError, match=r"locked: cannot be written: Permission denied"):
        run(wanted, place / "locked")
    assert list((place / "locked").iterdir()) == []


def test_nothing_can_be_read(place, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
    with nobody(), pytest.raises(UserError, match=r"secret.csv: cannot be read: .*Permission denied"):
        load_splits(DataSection(path=str(place / "secret.csv")), ["text"], 1)


def test_answers_that_cannot_be_written(topics_run, place):
    answers = list(prediction.run(topics_run, ["wheat rose"]))
    with nobody(), pytest.raises(UserError, match=r"locked.*cannot be written: Permission denied"):
        prediction.write(iter(answers), place / "locked" / "answers.jsonl")


def test_a_directory_that_cannot_be_pushed(place):
    with nobody(), pytest.raises(UserError, match="not a finished run"):
        hub.push(place / "locked", "topics", dry_run=True)
