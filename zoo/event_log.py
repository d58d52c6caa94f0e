"""What happens in a run, line by line in events.jsonl."""

import os
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from zoo.checkpoints import writing
from zoo.files import json_line


class EventLog(TrainerCallback):
    """Appends what happens to events.jsonl: a line each of time, step, phase and values.

    A `begin` at a step after 0 is a resume: it takes the place of the lines before it that are of later steps. A value
    that is not finite, which JSON does not know, is null.
    """

    def __init__(self, path: Path):
        self.path = path

    def write(self, phase: str, step: int, values: dict[str, Any]) -> None:
        line = json_line({"time": time.time(), "step": step, "phase": phase, "values": values})
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def on_train_begin(self, args, state, control, **kwargs):
        if self.path.exists():
            # half a line is what a full disk, or a kill, has left
            whole = self.path.read_bytes().rpartition(b"\n")
            if whole[2]:
                os.truncate(self.path, len(whole[0]) + len(whole[1]))
        self.write("begin", state.global_step, {"max_steps": state.max_steps})

    def on_log(self, args, state, control, logs=None, **kwargs):
        phase = "evaluate" if any(key.startswith("eval_") for key in logs) else "train"
        self.write(phase, state.global_step, logs)

    def on_save(self, args, state, control, **kwargs):
        self.write("save", state.global_step, {})

    def on_train_end(self, args, state, control, **kwargs):
        self.write("end", state.global_step, {})
