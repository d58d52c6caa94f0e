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
from zoo.tasks.base import IGNORED, Collate, Rows, Task, arrays, check_length, check_padding, pieces

LOSS_METRICS = ("token_loss", "perplexity")


def _encode(tokenizer: PreTrainedTokenizerBase, section: TaskSection):
    """Each text whole, in pieces of at most `max_length` tokens, the last of which says that it ends.

    The first token of a piece is no label, so that all labels are learned; a last piece of one token is left out.
    """
    if section.max_length < 2:
        raise UserError("task.max_length: 1, but a token is learned from those before it; give 2 or more")

    def encode(rows: Rows) -> Rows:
        end, whole = tokenizer.eos_token_id, []
        # verbose: of a text that is longer than the model's inputs, which it may be here
        for ids in tokenizer(rows["text"], verbose=False)["input_ids"]:
            whole.append(ids if end is None or ids[-1:] == [end] else [*ids, end])
        found = pieces(tokenizer, rows["row"], whole, section.max_length)
        del found["piece"]  # nothing is drawn
        masks = {"attention_mask": [[1] * len(ids) for ids in found["input_ids"]]}
        return found | masks | {"labels": [[IGNORED, *ids[1:]] for ids in found["input_ids"]]}

    return encode


def _counts(encoded: Dataset, texts: int, section: TaskSection) -> str:
    if len(encoded) == 0:
        raise UserError("data: no text has two tokens, so that one of them could follow the other")
    unknown, tokens = sum(encoded["unknown"]), sum(encoded["tokens"])
    words = f"{len(encoded):,} pieces of at most {section.max_length} tokens"
    return f"{texts:,} texts; {words}; {unknown:,} of {tokens:,} tokens unknown"


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
