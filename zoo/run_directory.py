"""The directory of a run: whether a run may use it, and that only one does."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from zoo.errors import UserError
from zoo.model_directory import METRICS, RECIPE
from zoo.recipe import Recipe
from zoo.recipe_loading import load_recipe

CHECKPOINTS = "checkpoints"
EVENTS = "events.jsonl"
LOCK = ".lock"


def check_directory(recipe: Recipe, output_dir: Path, resume: bool) -> None:
    """Refuses a directory that holds something else, or that cannot be made."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output-dir {output_dir}: a file of that name exists")
    for name in (RECIPE, EVENTS, METRICS, CHECKPOINTS):
        path, kinds = output_dir / name, ("a directory", "a file")
        if path.exists() and path.is_dir() != (name == CHECKPOINTS):
            is_, wanted = kinds if path.is_dir() else kinds[::-1]
            raise UserError(f"--output-dir {output_dir}: {name} is {is_}, where a run has {wanted}; move it away")
    old = output_dir / RECIPE
    # folders without a file in them are what a refused recipe has left
    if any(not path.is_dir() and not _is_ours(path) for path in output_dir.rglob("*")):
        if not old.exists():
            raise UserError(f"--output-dir {output_dir}: not empty, and not a run of zoo; choose another directory")
        if not resume:
            state = "a finished" if (output_dir / METRICS).exists() else "an unfinished"
            raise UserError(
                f"--output-dir {output_dir}: holds {state} run; add --resume to continue it, delete it, or choose "
                "another --output-dir"
            )
        if not _says(old, recipe):
            raise UserError(f"--output-dir {output_dir}: its run had another recipe ({old}); choose another directory")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: cannot be written: {error.strerror}") from error


def _says(file: Path, recipe: Recipe) -> bool:
    """Whether a run's recipe is this one; one that an older version wrote may lack keys that have come since."""
    try:
        return file.read_bytes() == recipe.to_yaml().encode() or load_recipe(str(file)) == recipe
    except (OSError, UserError):
        return False


def _is_ours(path: Path) -> bool:
    """Whether a file is the lock, or what a run that was killed has left of writing its recipe."""
    return path.name == LOCK or path.name.startswith(f".{RECIPE}.")


@contextlib.contextmanager
def alone(output_dir: Path) -> Iterator[None]:
    """Holds the directory, until the process ends at the latest. Raises UserError where another run has it."""
    lock = FileLock(output_dir / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"--output-dir {output_dir}: another run is at work in it; wait for it, or choose another directory"
        ) from None
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        (output_dir / LOCK).unlink(missing_ok=True)
        lock.release()


def discard(output_dir: Path) -> None:
    """Removes a run of zoo, such as an earlier trial; anything else stays."""
    if (output_dir / RECIPE).is_file() and not output_dir.is_symlink():
        with alone(output_dir):
            shutil.rmtree(output_dir)
