"""transformers' Trainer, made right for losses of several batches and processes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer

from zoo.tasks.base import IGNORED


class StepLoss(Trainer):
    """A Trainer whose loss of a step is a mean over all that the step learns, however it is divided.

    row_loss: (outputs, batch) -> the part of the model's loss that is a mean over rows, where the rest is one over
    labels.
    """

    # the stock one takes it for scaled by every class that has **kwargs, and most ignore the count that is in them
    loss_is_scaled_for_ga = True
    row_loss: Callable[[Any, dict[str, Any]], torch.Tensor] | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        # the stock one knows official classes alone, and of these not all
        self._loss_shifts_labels = type(base).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        if self.label_smoother is not None and self._loss_shifts_labels:
            self.label_smoother = partial(self.label_smoother, shift_labels=True)  # type: ignore[assignment]
        self._decoder_inputs = getattr(base, "prepare_decoder_input_ids_from_labels", None)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if self.label_smoother is not None and self._decoder_inputs is not None and "labels" in inputs:
            # the model sees no labels then, from which it would make them
            inputs["decoder_input_ids"] = self._decoder_inputs(labels=inputs["labels"])
        return super()._prepare_inputs(inputs)

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """(the batches of a step, how many labels and rows it learns in all processes)."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        learned = sum((self._learned(batch) for batch in batches), torch.zeros(2))
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            learned = self.accelerator.reduce(learned.to(device), "sum").cpu()
        return batches, learned

    def _get_num_items_in_batch(self, batch_samples, device) -> None:
        # a batch that is evaluated has a mean of its own
        return None

    def _learned(self, batch: dict[str, Any]) -> torch.Tensor:
        """(2,): how many labels of a batch are learned, and its rows; where it has no labels, its rows twice."""
        rows = len(next(iter(batch.values())))
        labels = batch.get("labels")
        if labels is None:
            return torch.tensor([rows, rows])
        labels = labels[:, 1:] if self._loss_shifts_labels else labels
        return torch.tensor([int(labels.ne(IGNORED).sum()), rows])

    def shares(self, batch: dict[str, Any], learned: torch.Tensor | None) -> tuple[float, float]:
        """What a mean over a batch's labels, and one over its rows, are of those of the step that it is part of."""
        if learned is None:
            return 1.0, 1.0
        # gradients of several processes are averaged
        times = self.args.world_size if self.args.average_tokens_across_devices else 1
        of_labels, of_rows = (times * self._learned(batch) / learned.clamp(min=1)).tolist()
        return of_labels, of_rows

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """num_items_in_batch: labels and rows of the whole step; without it, the loss is a mean over the batch."""
        of_labels, of_rows = self.shares(inputs, num_items_in_batch)
        if self._learned(inputs)[0] == 0 and "labels" in inputs:
            # a mean over nothing is no number, even with a weight of 0
            inputs["labels"] = inputs["labels"].clamp(min=0)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if num_items_in_batch is not None:
            loss_of_rows = 0.0 if self.row_loss is None else self.row_loss(outputs, inputs)
            loss = (loss - loss_of_rows) * of_labels + loss_of_rows * of_rows
        return (loss, outputs) if return_outputs else loss
