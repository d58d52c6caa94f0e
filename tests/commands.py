"""Commands of the command line for tests, each a process of its own that has the libraries from the start."""

import multiprocessing
import os
import sys
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
# to import them takes longer than most commands; what a command then does is that of `python cli.py`
SERVER.set_forkserver_preload(["cli", "zoo.train", "zoo.evaluation", "zoo.prediction", "zoo.bench.training"])


def _command(arguments: tuple[str, ...], cwd: Path, streams: tuple[Path, Path]) -> None:
    os.chdir(cwd)
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["zoo", *arguments]
    import cli

    cli.app()


def zoo(*arguments: str, cwd: Path) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of a command. A traceback is never an answer."""
    streams = cwd / ".stdout", cwd / ".stderr"
    process = SERVER.Process(target=_command, args=(arguments, cwd, streams))
    process.start()
    process.join(240)
    out, err = (stream.read_text() for stream in streams)
    assert "Traceback" not in out + err and "zoo: unexpected" not in err, out + err
    assert process.exitcode is not None, "it hangs"
    return process.exitcode, out, " ".join(err.split())
