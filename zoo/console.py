"""What all commands share: how they end, where their answer goes, the options they have in common."""

import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from zoo.errors import Interrupted, RunError, UserError, unexpected

DEBUG = "ZOO_DEBUG"  # set, tracebacks are shown
# what any look at a file, or any print, may be the first to meet: what to do, and the exit status
_NO_ROOM = "make room where standard output goes, and the run", 1
SYSTEM = {
    errno.ENAMETOOLONG: ("longer than names of files may be; give a shorter one", 2),
    errno.ENOSPC: _NO_ROOM,
    errno.EDQUOT: _NO_ROOM,
    errno.EFBIG: _NO_ROOM,
}

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's file, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as train.learning_rate=3e-5.")
]
Trusted = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the directory brings. Read it first.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]


@contextmanager
def ending() -> Iterator[None]:
    """Turns the ways to fail into words and an exit status: 2 the user's words, 1 the run, 130 and 143 interrupted."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except (UserError, RunError) as error:
        if os.environ.get(DEBUG):
            traceback.print_exc()
        _fail(str(error), 2 if isinstance(error, UserError) else 1)
    except Interrupted as error:
        _fail(str(error), error.status, "yellow")
    except KeyboardInterrupt:
        _fail("interrupted", 130, "yellow")
    except BrokenPipeError:
        # whoever read has read enough
        raise
    except Exception as error:
        if isinstance(error, typer.Exit) or os.environ.get(DEBUG):
            raise
        if isinstance(error, OSError) and error.errno in SYSTEM:
            _flush()
            _fail_of_system(error)
        _fail(f"{unexpected(error)}; {DEBUG}=1 shows the whole of it: please report it", 1)
    finally:
        left = _flush()
        if isinstance(left, BrokenPipeError):
            raise typer.Exit(1)
        if left is not None:
            _fail_of_system(left)


def _fail(said: str, status: int, colour: str = "red") -> NoReturn:
    typer.secho(f"zoo: {said}", err=True, fg=colour)
    raise typer.Exit(status) from None


def _fail_of_system(error: OSError) -> NoReturn:
    said, status = SYSTEM.get(error.errno or 0, ("standard output cannot be written", 1))
    name = "" if error.filename is None else f" ({str(error.filename)[:60]}...)"
    _fail(f"{error.strerror}{name}: {said}", status)


def _flush() -> OSError | None:
    """What standard output does not take, being full or closed, is dropped: Python would try again when it ends."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


def _terminate(number: int, frame: Any) -> None:
    raise Interrupted(number)


@contextmanager
def only_json(wanted: bool) -> Iterator[Any]:
    """With --json, everything a library prints goes to standard error; yields where the answer goes."""
    answer = sys.stdout
    if wanted:
        sys.stdout = sys.stderr
    try:
        yield answer
    finally:
        sys.stdout = answer


def attention_kwargs_of(text: str | None) -> dict[str, dict[str, Any]]:
    """`--attention-kwargs`, as a recipe's `model.attention_kwargs`. Raises UserError."""
    try:
        kwargs = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise UserError(f"--attention-kwargs: not JSON: {error}") from error
    if not isinstance(kwargs, dict) or not all(isinstance(own, dict) for own in kwargs.values()):
        raise UserError('--attention-kwargs: parameters by variant, such as {"local": {"window": 64}}')
    return kwargs
