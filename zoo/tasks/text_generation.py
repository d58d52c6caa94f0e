"""Causal language modelling: the next token of a text (GPT, Radford et al. 2018, section 3.1)."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import DataCollatorForTokenClassification, EvalPrediction, PreTrainedTokenizerBase

from zoo.errors import UserError
from zoo.packed_rows import packed_batch
from zoo.sections import TaskSection
from zoo.task_types import TASK_TYPES
from zoo.tasks.base import IGNORED, Collate, Rows, Task, arrays, check_length, check_padding

LOSS_METRICS = ("token_loss", "perplexity")


def _encode(tokenizer: PreTrainedTokenizerBase, section: TaskSection):
    """Each text whole, in pieces of at most `max_length` tokens, the last of which says that it ends.

    The first token of a piece is no label, so that all labels are learned; a last piece of one token is left out.
    """
    if section.max_length < 2:
        raise UserError("task.max_length: 1, but a token is learned from those before it; give 2 or more")

    def encode(rows: Rows) -> Rows:
        found: Rows = {name: [] for name in ("input_ids", "attention_mask", "labels", "row", "unknown", "tokens")}
        # verbose: of a text that is longer than the model's inputs, which it may be here
        for row, ids in zip(rows["row"], tokenizer(rows["text"], verbose=False)["input_ids"], strict=True):
            end = tokenizer.eos_token_id
            whole = ids if end is None or ids[-1:] == [end] else [*ids, end]
            for start in range(0, max(len(whole) - 1, 0), section.max_length):
                piece = whole[start : start + section.max_length]
                found["input_ids"].append(piece)
                found["attention_mask"].append([1] * len(piece))
                found["labels"].append([IGNORED, *piece[1:]])
                found["row"].append(row)
                found["unknown"].append(0 if tokenizer.unk_token_id is None else piece.count(tokenizer.unk_token_id))
                found["tokens"].append(len(piece))
        return found

    return encode


def _counts(encoded: Dataset, texts: int, section: TaskSection) -> str:
    if len(encoded) == 0:
        raise UserError("data: no text has two tokens, so that one of them could follow the other")
    unknown, tokens = sum(encoded["unknown"]), sum(encoded["tokens"])
    pieces = f"{len(encoded):,} pieces of at most {section.max_length} tokens"
    return f"{texts:,} texts; {pieces}; {unknown:,} of {tokens:,} tokens unknown"


def collate_next_tokens(tokenizer: PreTrainedTokenizerBase, section: TaskSection) -> Collate:
    check_padding(tokenizer)
    # labels end where their text does, whatever id pads it
    pad = DataCollatorForTokenClassification(tokenizer)
    return lambda rows: packed_batch(rows, tokenizer.pad_token_id) if "position_ids" in rows[0] else dict(pad(rows))


def token_losses(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """(batch, length): the loss of each token, 0 where there is none: whole logits would fill the memory."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), following.flatten(), reduction="none", ignore_index=IGNORED)
    return losses.view_as(labels)


def loss_metrics(section: TaskSection, labels: Sequence[str], processor: Any):
    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        losses, gold = arrays(prediction)
        learned = gold[:, 1:] != IGNORED
        mean = float(losses[:, :-1][learned].mean(dtype=np.float64))
        # of each token alike, where eval_loss is a mean over batches
        return {"token_loss": mean, "perplexity": math.exp(min(mean, 700.0))}

    return metrics


def written(section: TaskSection, answer: Any) -> dict[str, Any]:
    return {"predicted": answer[0]["generated_text"]}


TEXT_GENERATION = Task(
    name="text-generation",
    auto_class="AutoModelForCausalLM",
    roles=TASK_TYPES["text-generation"].roles,
    labels=None,
    encode=_encode,
    counts=_counts,
    check=check_length,
    collate=collate_next_tokens,
    metrics=loss_metrics,
    metric_names=LOSS_METRICS,
    reduce=token_losses,
    pipeline=lambda section: (None, {"return_full_text": False}),
    answer=written,
)
