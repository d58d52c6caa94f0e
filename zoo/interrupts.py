"""Ctrl-C and SIGTERM while training: the step under way is finished and saved, then the run ends."""

import signal
import sys
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from zoo.errors import Interrupted


class StopAtCheckpoint(TrainerCallback):
    """A context in which the first signal asks for a checkpoint, and a second one does what signals do.

    Raises Interrupted when the checkpoint is written. What belongs to its step, an evaluation above all, comes before
    it, so that the resumed run ends like one that was never interrupted.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.saving = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopAtCheckpoint":
        # in other threads Python lets nobody set handlers
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self.before[number])
        print("\nzoo: stopping when this step is done and saved; once more stops at once", file=sys.stderr)

    def on_step_end(self, args, state, control, **kwargs):
        # with an epoch's last step comes what stands at the epoch's end
        if self.received is not None and not float(state.epoch).is_integer():
            control.should_save = self.saving = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.received is not None:
            control.should_save = self.saving = True

    def on_save(self, args, state, control, **kwargs):
        if self.saving and self.received is not None:
            raise Interrupted(self.received, f"; step {state.global_step} is saved, continue with --resume")
