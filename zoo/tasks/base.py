"""What a task is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import EvalPrediction, PreTrainedTokenizerBase

from zoo.recipe import TaskSection


@dataclass(frozen=True)
class Task:
    """encode: (tokenizer, section) -> a function of a batch of rows, as `Dataset.map` calls it.
    collate: (tokenizer) -> a function of a list of encoded rows to a batch of tensors.
    metrics: of the gathered logits and labels, under `metric_names`.
    roles: the columns it reads; a task without pairs has no text_pair.
    """

    name: str
    auto_class: str
    roles: tuple[str, ...]
    encode: Callable[[PreTrainedTokenizerBase, TaskSection], Callable[[dict[str, list]], dict[str, list]]]
    collate: Callable[[PreTrainedTokenizerBase], Callable[[list[dict[str, Any]]], dict[str, Any]]]
    metrics: Callable[[EvalPrediction], dict[str, float]]
    metric_names: tuple[str, ...]
