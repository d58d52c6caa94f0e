"""Checkpoints are complete or ignored: the mark that is written last, and the search for the newest that has it."""

import contextlib
import errno
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from zoo.errors import RunError
from zoo.files import sha256, write_json

COMPLETE = "complete.json"
PROGRESS = "progress.json"
# what a run continues from besides the weights; where one is missing the stock Trainer begins it anew, silently
STATE = (TRAINER_STATE_NAME, PROGRESS, OPTIMIZER_NAME, SCHEDULER_NAME, "rng_state.pth")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(path: Path, then: str = "continue with --resume") -> Iterator[None]:
    """Words for a full disk or a directory that is gone. torch and safetensors have their own errors for it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        # the libraries' own errors have no number, and are of a full disk
        another = isinstance(error, OSError) and error.errno not in (*_NO_ROOM, None)
        remedy = "see to it" if another else "make room there"
        raise RunError(f"{path}: cannot be written: {cause}; {remedy}, and {then}") from error


def mark_complete(directory: Path) -> None:
    """Writes complete.json: the size and sha256 of every file of a checkpoint."""
    files = {
        file.relative_to(directory).as_posix(): {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }
    write_json(directory / COMPLETE, {"files": files})


def newest_complete(run_dir: Path, needed: Sequence[str] = STATE) -> Path | None:
    """The latest checkpoint that has the `needed` files, and all as they were when it was marked complete.

    Broken ones are removed.
    """
    numbered = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-[0-9]+")
    found = [path for path in run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if numbered.fullmatch(path.name)]
    for checkpoint in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if is_complete(checkpoint, needed):
            return checkpoint
        print(f"{checkpoint} is not complete (the run was stopped while writing it, or it was changed); it is removed")
        # a file, or a link, of that name is not followed
        shutil.rmtree(checkpoint) if checkpoint.is_dir() and not checkpoint.is_symlink() else checkpoint.unlink()
    return None


def is_complete(checkpoint: Path, needed: Sequence[str] = ()) -> bool:
    """Whether a checkpoint is marked complete, has the `needed` files, and all are as they were then."""
    try:
        files = json.loads((checkpoint / COMPLETE).read_text())["files"]
        return (
            bool(files)
            and files.keys() >= set(needed)
            and all(
                (checkpoint / name).stat().st_size == file["size"] and sha256(checkpoint / name) == file["sha256"]
                for name, file in files.items()
            )
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
