"""transformers' Trainer, made right for renamed weights and safe to interrupt."""

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from zoo.errors import RunError
from zoo.files import sha256, write_json
from zoo.loading import assert_same_adapter, assert_same_weights

COMPLETE = "complete.json"


class ZooTrainer(Trainer):
    """A Trainer whose checkpoints are complete or ignored, and whose resume restores every tensor.

    Rows carry `row`, their number in the data, which never reaches the model: a loss that is not finite names them.
    """

    rows: list[int] = []

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        rows = inputs.pop("row", None)
        self.rows = [] if rows is None else rows.tolist()
        return super()._prepare_inputs(inputs)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(loss.item()):
            raise RunError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, on train rows {self.rows}; try a "
                "lower learning_rate, gradient clipping (max_grad_norm) or look at these rows"
            )
        return loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        model = self.model if model is None else model
        if isinstance(model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        _restore(model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel):
            super()._load_best_model()
        _restore(self.model, Path(self.state.best_model_checkpoint))

    def _save_checkpoint(self, model, trial) -> None:
        """Writes the mark of completeness last, and removes older checkpoints only after it."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        run_dir = self._get_output_dir(trial=trial)
        if self.args.should_save:
            mark_complete(Path(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"))
            rotate_checkpoints(
                output_dir=run_dir, save_total_limit=limit, best_model_checkpoint=self.state.best_model_checkpoint
            )


def _restore(model, directory: Path) -> None:
    """Puts a checkpoint's weights into the model: the stock Trainer ignores renamed ones, with a mere warning.

    Adapters, whose names are never changed, are in it already; they are compared all the same.
    """
    if isinstance(model, PeftModel):
        assert_same_adapter(model, directory)
        return
    loaded = type(model).from_pretrained(directory, config=model.config, dtype=model.dtype)
    model.load_state_dict(loaded.state_dict(), strict=True)
    assert_same_weights(model, directory)


def mark_complete(directory: Path) -> None:
    """Writes complete.json: the size and sha256 of every file of a checkpoint."""
    files = {
        file.relative_to(directory).as_posix(): {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }
    write_json(directory / COMPLETE, {"files": files})


def newest_complete(run_dir: Path) -> Path | None:
    """The latest checkpoint whose files are all as they were when it was marked complete; broken ones are removed."""
    found = [path for path in run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    for checkpoint in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if _is_complete(checkpoint):
            return checkpoint
        print(f"{checkpoint} is not complete (the run was stopped while writing it); it is removed")
        shutil.rmtree(checkpoint)
    return None


def _is_complete(checkpoint: Path) -> bool:
    try:
        files = json.loads((checkpoint / COMPLETE).read_text())["files"]
        return all(
            (checkpoint / name).stat().st_size == file["size"] and sha256(checkpoint / name) == file["sha256"]
            for name, file in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


class EventLog(TrainerCallback):
    """Appends what happens to events.jsonl: a line each of time, step, phase and values."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, phase: str, step: int, values: dict[str, Any]) -> None:
        line = json.dumps({"time": time.time(), "step": step, "phase": phase, "values": values})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def on_train_begin(self, args, state, control, **kwargs):
        self.write("begin", state.global_step, {"max_steps": state.max_steps})

    def on_log(self, args, state, control, logs=None, **kwargs):
        phase = "evaluate" if any(key.startswith("eval_") for key in logs) else "train"
        self.write(phase, state.global_step, logs)

    def on_save(self, args, state, control, **kwargs):
        self.write("save", state.global_step, {})

    def on_train_end(self, args, state, control, **kwargs):
        self.write("end", state.global_step, {})
