"""A run that is killed or interrupted is resumed, and ends like one that was not."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import zoo.evaluation
from tests.tiny_run import SAVE, SERVER, STEPS, checkpoints, differing, events, make_recipe, weights, without_time
from zoo.checkpoints import mark_complete, newest_complete
from zoo.errors import Interrupted, RunError, UserError
from zoo.recipe import Recipe
from zoo.train import run
from zoo.trainer import ZooTrainer


@pytest.fixture(scope="module")
def recipe(tiny_bert, r8) -> Recipe:
    return make_recipe(tiny_bert, r8)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    """The run that nobody interrupts."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    run(recipe, directory)
    return directory


def log_history(directory: Path) -> list[dict]:
    state = json.loads((directory / "checkpoints" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [without_time(entry) for entry in state["log_history"]]


def killed(recipe: Recipe, directory: Path, at) -> None:
    """Starts the run in a process of its own and kills it (SIGKILL) as soon as `at(directory)` is true."""
    process = SERVER.Process(target=run, args=(recipe, directory, directory.exists()))
    process.start()
    assert process.pid is not None
    while process.is_alive():
        time.sleep(0.0005)
        if at(directory):
            # stopped, so that what was seen still holds when it is killed
            os.kill(process.pid, signal.SIGSTOP)
            if at(directory):
                break
            os.kill(process.pid, signal.SIGCONT)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it ended by itself before it could be killed"
    assert not (directory / "metrics.json").exists()


def after_step(step: int):
    def reached(directory: Path) -> bool:
        done = checkpoints(directory)
        return max(done, default=0) >= step and (done[max(done)] / "complete.json").exists()

    return reached


def while_writing(directory: Path) -> bool:
    """In the middle of a checkpoint that is not the first."""
    done = checkpoints(directory)
    return max(done, default=0) > 3 * SAVE and not (done[max(done)] / "complete.json").exists()


@pytest.mark.parametrize("at", [after_step(5 * SAVE), while_writing, after_step(STEPS)], ids=["middle", "write", "end"])
def test_a_killed_run_resumes_as_if_nothing_had_happened(recipe, finished, tmp_path, at):
    directory = tmp_path / "run"
    killed(recipe, directory, at)
    left = checkpoints(directory)
    begun = [] if (left[max(left)] / "complete.json").exists() else [max(left)]
    assert len(begun) == (at is while_writing)
    moved = tmp_path / "moved"  # the state names the best checkpoint by its old path
    directory.rename(moved)
    metrics = run(recipe, moved, resume=True)
    expected = json.loads((finished / "metrics.json").read_text())
    assert without_time(metrics) == without_time(expected)
    assert differing(weights(moved), weights(finished)) == []
    assert differing(weights(checkpoints(moved)[STEPS]), weights(checkpoints(finished)[STEPS])) == []
    assert log_history(moved) == log_history(finished)
    resumed_at = [step for step, _ in events(moved, "begin")][-1]
    assert resumed_at == max(step for step in left if step not in begun)
    # the lines before a resume count up to its step
    assert dict(events(moved, "train")) == dict(events(finished, "train"))
    speed = metrics["train_samples_per_second"] * metrics["train_runtime"]
    assert speed == pytest.approx(STEPS * 8, rel=0.01), "time and samples are those of the whole run"


EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": 27}


@pytest.mark.parametrize("at", [5, 9, 13, 27], ids=["in an epoch", "at its end", "in the next", "at the very end"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_its_step(recipe, tmp_path, monkeypatch, at, number):
    """An epoch has 9 steps, and an evaluation at its end that must not be lost."""
    by_epoch = recipe.model_copy(update={"train": recipe.train | EPOCHS})
    if not (tmp_path.parent / "by-epoch").exists():
        run(by_epoch, tmp_path.parent / "by-epoch")
    step = ZooTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == at - 1:
            os.kill(os.getpid(), number)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ZooTrainer, "training_step", interrupted)
        with pytest.raises(Interrupted, match=f"interrupted; step {at} is saved") as caught:
            run(by_epoch, tmp_path / "run")
    assert caught.value.status == 128 + number and max(checkpoints(tmp_path / "run")) == at
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    metrics = run(by_epoch, tmp_path / "run", resume=True)
    whole = tmp_path.parent / "by-epoch"
    assert without_time(metrics) == without_time(json.loads((whole / "metrics.json").read_text()))
    assert differing(weights(tmp_path / "run"), weights(whole)) == []


def test_an_optimizer_of_8_bits_goes_on_where_it_was(tiny_bert, r8, tmp_path):
    config = {"model_type": "bert", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config |= {"num_hidden_layers": 1}
    wide = {"path": None, "config": config, "tokenizer": str(tiny_bert)}
    recipe = make_recipe(tiny_bert, r8, {"optim": "adamw_bnb_8bit", "max_steps": 2 * SAVE}, **wide)
    run(recipe, tmp_path / "whole")
    state = torch.load(checkpoints(tmp_path / "whole")[SAVE] / "optimizer.pt", weights_only=True)["state"]
    # tensors of less than 4,096 values keep moments of 32 bits
    assert {one["__bnb_optimizer_quant_state__"]["state1"].dtype for one in state.values()} == {
        torch.uint8, torch.float32,
    }  # fmt: skip
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    (tmp_path / "half" / "metrics.json").unlink()
    shutil.rmtree(checkpoints(tmp_path / "half")[2 * SAVE])
    run(recipe, tmp_path / "half", resume=True)
    assert differing(weights(tmp_path / "half"), weights(tmp_path / "whole")) == []


def test_half_a_line_of_events_is_taken_back(recipe, tmp_path):
    short = recipe.model_copy(update={"train": recipe.train | {"max_steps": 8}})
    run(short, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    with (tmp_path / "run" / "events.jsonl").open("a") as file:
        file.write('{"time": 17')
    run(short, tmp_path / "run", resume=True)
    assert [step for step, _ in events(tmp_path / "run", "begin")] == [0, 8]


def test_checkpoints_that_are_not_whole(finished, tmp_path, capsys):
    directory = shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    steps = sorted(int(path.name.partition("-")[2]) for path in directory.iterdir())
    assert len(steps) == 2 and steps[-1] == STEPS, "the best and the last are kept"
    newest, best = directory / f"checkpoint-{STEPS}", directory / f"checkpoint-{steps[0]}"
    (directory / "checkpoint-99").mkdir()
    (directory / "checkpoint-notes").mkdir()
    assert newest_complete(directory) == newest
    assert "checkpoint-99 is not complete" in capsys.readouterr().out
    content = bytearray((newest / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "optimizer.pt").write_bytes(content)
    assert newest_complete(directory) == best and not newest.exists(), "one flipped bit is seen"
    (best / "complete.json").write_text('{"files": ')
    assert newest_complete(directory) is None
    assert [path.name for path in directory.iterdir()] == ["checkpoint-notes"]


def test_older_checkpoints_go_only_when_the_new_one_is_complete(recipe, tmp_path, monkeypatch):
    import zoo.trainer

    rotate, seen = zoo.trainer.rotate_checkpoints, []

    def noted(output_dir, **kwargs):
        paths = list(Path(output_dir).glob("checkpoint-*"))
        assert all((path / "complete.json").exists() for path in paths)
        rotate(output_dir=output_dir, **kwargs)
        seen.append((len(paths), len(list(Path(output_dir).glob("checkpoint-*")))))

    monkeypatch.setattr(zoo.trainer, "rotate_checkpoints", noted)
    plain = {"max_steps": 8, "eval_strategy": "no", "save_steps": 2, "load_best_model_at_end": False}
    run(recipe.model_copy(update={"train": recipe.train | plain}), tmp_path / "run")
    assert seen == [(1, 1), (2, 2), (3, 2), (3, 2)]


# Damaged by somebody


@pytest.fixture
def unfinished(finished, tmp_path) -> Path:
    """All of a run but its end."""
    directory = shutil.copytree(finished, tmp_path / "unfinished")
    (directory / "metrics.json").unlink()
    return directory


def forge(checkpoint: Path, name: str, content: str | None) -> None:
    """Replaces a file of a checkpoint, or removes it, and marks it complete as it then is."""
    (checkpoint / name).unlink()
    if content is not None:
        (checkpoint / name).write_text(content)
    (checkpoint / "complete.json").unlink()
    mark_complete(checkpoint)


@pytest.mark.parametrize("name", ["events.jsonl", "recipe.yaml", "metrics.json", "checkpoints"])
def test_a_directory_in_the_place_of_a_file(recipe, unfinished, name):
    path, says = unfinished / name, f"{name} is a directory, where a run has a file; move it away"
    if name == "checkpoints":
        says = "checkpoints is a file, where a run has a directory; move it away"
        shutil.rmtree(path)
        path.touch()
    else:
        path.unlink(missing_ok=True)
        path.mkdir()
    with pytest.raises(UserError, match=says):
        run(recipe, unfinished, resume=True)
    if name in ("recipe.yaml", "metrics.json"):
        with pytest.raises(UserError, match=f"not a finished run .*no {name}"):
            zoo.evaluation.run(unfinished)


@pytest.mark.parametrize(
    "content", ["", "[1]", "{}", '{"files": {}}', '{"files": [1]}', '{"files": {"config.json": 5}}', "[" * 100_000]
)
def test_marks_that_are_none(unfinished, content):
    newest = checkpoints(unfinished)[STEPS]
    (newest / "complete.json").write_text(content)
    found = newest_complete(unfinished / "checkpoints")
    assert found is not None and found != newest and not newest.exists()


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "progress.json"]
)
def test_a_checkpoint_without_a_part_is_not_complete(recipe, finished, unfinished, capsys, name):
    """The stock Trainer would go on with a new optimizer, schedule or random state, and say nothing."""
    forge(checkpoints(unfinished)[STEPS], name, None)
    metrics = run(recipe, unfinished, resume=True)
    assert f"checkpoint-{STEPS} is not complete" in capsys.readouterr().out
    assert without_time(metrics) == without_time(json.loads((finished / "metrics.json").read_text()))
    assert differing(weights(unfinished), weights(finished)) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("trainer_state.json", "{"), ("trainer_state.json", "[1]"), ("trainer_state.json", "{}")),
        *(("progress.json", "[1]"), ("progress.json", '{"loss_since_logged": "much"}')),
        *(("optimizer.pt", "x"), ("scheduler.pt", "x"), ("rng_state.pth", "x"), ("model.safetensors", "x")),
    ],
)
def test_parts_that_cannot_be_read(recipe, unfinished, name, content):
    shutil.rmtree(checkpoints(unfinished)[STEPS])
    ((step, checkpoint),) = checkpoints(unfinished).items()
    forge(checkpoint, name, content)
    with pytest.raises(RunError, match=rf"checkpoint-{step}: the run cannot continue from it: .*; delete it, and"):
        run(recipe, unfinished, resume=True)


@pytest.mark.parametrize("gone", [True, False])
def test_the_best_checkpoint_is_missed_before_the_end(recipe, unfinished, gone):
    best = next(path for step, path in checkpoints(unfinished).items() if step != STEPS)
    shutil.rmtree(best) if gone else (best / "model.safetensors").write_text("x")
    with pytest.raises(RunError, match=rf"{best.name}: the best checkpoint so far is missing or damaged; put it back"):
        run(recipe, unfinished, resume=True)
