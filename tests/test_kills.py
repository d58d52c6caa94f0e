"""Runs that are killed (SIGKILL) again and again, at random moments and between the writes of one checkpoint.

Each is continued until it ends, and must end as if nobody had touched it. `ZOO_KILL_SEED=<seed>` makes the same choices
again, as far as the machine's timing does.
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.tiny_run import SERVER, checkpoints, differing, make_recipe, weights, without_time
from zoo.checkpoints import newest_complete
from zoo.errors import UserError
from zoo.model_directory import check_finished, open_finished
from zoo.train import run

KILLS = 50
STEPS, SAVE = 40, 4
# in the order in which a checkpoint gets them
WRITTEN = (
    "config.json", "model.safetensors", "tokenizer.json", "training_args.bin", "optimizer.pt", "scheduler.pt",
    "rng_state.pth", "trainer_state.json", "progress.json", "complete.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tiny_bert, r8):
    return make_recipe(tiny_bert, r8, {"max_steps": STEPS, "save_steps": SAVE, "eval_steps": SAVE})


def moment(choice: random.Random, directory: Path):
    """A description of when to kill, and a function that says whether it is now."""
    kind = choice.choice(["at any time", "while writing", "while writing", "while finishing"])
    if kind == "at any time":
        until = time.monotonic() + choice.uniform(0.0, 3.0)
        return f"{until - time.monotonic():.2f} s after the start", lambda: time.monotonic() >= until
    if kind == "while finishing":
        # one that does not come so far ends, or is killed after a while
        count = choice.randrange(12)
        return f"{count} files into the end", lambda: len(list((directory / ".model").glob("*"))) > count
    there, name, delay = set(checkpoints(directory)), choice.choice(WRITTEN), choice.uniform(0.0, 0.01)
    skipped = choice.randrange(3)

    def written() -> bool:
        new = sorted(set(checkpoints(directory)) - there)
        if len(new) > skipped and (directory / "checkpoints" / f"checkpoint-{new[skipped]}" / name).exists():
            time.sleep(delay)
            return True
        return False

    return f"{1000 * delay:.0f} ms after {name} of new checkpoint {skipped + 1}", written


def killed_once(recipe, directory: Path, choice: random.Random) -> tuple[str, bool]:
    """(when, whether it was killed; otherwise it has ended)."""
    process = SERVER.Process(target=run, args=(recipe, directory, directory.exists()))
    said, now = moment(choice, directory)
    process.start()
    assert process.pid is not None
    longest = time.monotonic() + 60
    while process.is_alive() and not now():
        assert time.monotonic() < longest, f"{said}: it hangs"
        time.sleep(0.0002)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"{said}: it failed by itself"
    return said, process.exitcode != 0


def check_what_is_left(directory: Path) -> None:
    """What looks finished is, and what is not is never taken for it."""
    if (directory / "metrics.json").exists():
        finished = open_finished(directory)
        assert "test_loss" in json.loads((directory / "metrics.json").read_text())
        assert finished.labels == ["acq", "crude", "earn"]
        return
    if directory.exists():
        with pytest.raises(UserError, match="not a finished run"):
            check_finished(directory)


def test_killed_again_and_again(recipe, tmp_path, capsys):
    seed = int(os.environ.get("ZOO_KILL_SEED") or random.SystemRandom().randrange(10**6))
    choice = random.Random(seed)
    run(recipe, tmp_path / "whole")
    expected = without_time(json.loads((tmp_path / "whole" / "metrics.json").read_text()))
    kills, runs, said = 0, 0, []
    with capsys.disabled():
        print(f"\nZOO_KILL_SEED={seed}")
    while kills < KILLS or not (tmp_path / f"run-{runs}" / "metrics.json").exists():
        directory = tmp_path / f"run-{runs}"
        if kills < KILLS:
            when, was_killed = killed_once(recipe, directory, choice)
            kills += was_killed
            said.append(when)
        else:
            run(recipe, directory, resume=True)
        check_what_is_left(directory)
        if (directory / "metrics.json").exists():
            history = f"seed {seed}: {said}"
            assert without_time(json.loads((directory / "metrics.json").read_text())) == expected, history
            assert differing(weights(directory), weights(tmp_path / "whole")) == [], history
            newest = newest_complete(directory / "checkpoints")
            assert newest is not None and newest.name == f"checkpoint-{STEPS}", history
            if kills < KILLS:
                runs, said = runs + 1, []
    assert kills == KILLS
