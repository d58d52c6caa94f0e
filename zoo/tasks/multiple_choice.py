"""The right one of several choices for a text, each scored as a pair with it (BERT, arXiv 1810.04805, section 4.4).

Rows of one batch may have different numbers of choices. A choice that is not there is read as one token, and its logit
is put out of reach after the model: in the loss, which is ours for that reason, and wherever probabilities are made.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from scipy.special import softmax
from transformers import DataCollatorForMultipleChoice, EvalPrediction, Pipeline, PreTrainedTokenizerBase

from zoo.errors import UserError
from zoo.labels import LABEL_KINDS, choices_problem
from zoo.sections import TaskSection
from zoo.task_types import TASK_TYPES
from zoo.tasks.base import Collate, Rows, Task, arrays, ask_text, check_length, check_padding, cut, token_counts
from zoo.tasks.classification import one_answer


def _encode(tokenizer: PreTrainedTokenizerBase, section: TaskSection):
    def encode(rows: Rows) -> Rows:
        counts = [len(choices) for choices in rows["choices"]]
        texts = list(chain.from_iterable([text] * count for text, count in zip(rows["text"], counts, strict=True)))
        encoded = cut(tokenizer, section, [texts, list(chain.from_iterable(rows["choices"]))])
        encoded.pop("text")
        ends = np.cumsum(counts)
        found = {
            name: [values[end - count : end] for end, count in zip(ends, counts, strict=True)]
            for name, values in encoded.items()
        }
        counted = {name: list(map(sum, found[name])) for name in ("truncated", "unknown", "tokens")}
        return {**found, **counted, "labels": rows["label"], "row": rows["row"]}

    return encode


def _counts(encoded: Dataset, texts: int, section: TaskSection) -> str:
    counts = [len(choices) for choices in encoded["input_ids"]]
    choices = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return f"{texts:,} texts of {choices} choices; with them {token_counts(encoded, sum(counts), section)}"


def _collate(tokenizer: PreTrainedTokenizerBase, section: TaskSection) -> Collate:
    """`labels` of a batch are (batch, 2): the number of the right choice, and how many there are."""
    check_padding(tokenizer)
    pad = DataCollatorForMultipleChoice(tokenizer)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = [name for name in tokenizer.model_input_names if name in rows[0]]
        counts = [len(row["input_ids"]) for row in rows]
        filled = []
        for row, count in zip(rows, counts, strict=True):
            # one token: what attention makes of a row without any, no library promises
            lacking = max(counts) - count
            choices = {name: [*row[name], *[row[name][0][:1]] * lacking] for name in inputs}
            filled.append(choices | {"labels": [row["labels"], count]})
        return dict(pad(filled)) | {"row": torch.tensor([row["row"] for row in rows])}

    return collate


def _loss(section: TaskSection, labels: Sequence[int], classes: int, smoothing: float = 0.0):
    """Cross entropy over the choices that a row has; `smoothing` is shared out among these."""

    def loss(outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        logits = outputs["logits"].float()
        right, counts = labels.unbind(-1)
        there = torch.arange(logits.shape[-1], device=logits.device) < counts[:, None]
        wanted = (1 - smoothing) * F.one_hot(right, logits.shape[-1]) + smoothing * there / counts[:, None]
        logits = logits.masked_fill(~there, torch.finfo(logits.dtype).min)
        total = F.cross_entropy(logits, wanted, reduction="sum")
        # the library counts labels, and a row has two of them
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch / 2)

    return loss


def _probabilities(prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(probabilities, 0 where there is no choice; the right choice; how many there are) of each row."""
    logits, labels = arrays(prediction)
    right, counts = labels.T
    there = np.arange(logits.shape[-1]) < counts[:, None]
    return softmax(np.where(there, logits, -np.inf), axis=-1), right, counts


def _metrics(section: TaskSection, labels: Sequence[str], processor: Any):
    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        probabilities, right, _ = _probabilities(prediction)
        return {"accuracy": float((probabilities.argmax(-1) == right).mean())}

    return metrics


def _records(section: TaskSection, labels: Sequence[str], processor: Any):
    def records(prediction: EvalPrediction) -> Iterator[dict[str, Any]]:
        for scores, right, count in zip(*_probabilities(prediction), strict=True):
            yield {
                "gold": int(right),
                "predicted": int(scores.argmax()),
                "probabilities": scores[:count].tolist(),
            }

    return records


class Choices(Pipeline):
    """How likely each choice is for a text."""

    _load_tokenizer = True  # type: ignore[assignment]
    tokenizer: Any
    model: Any

    def _sanitize_parameters(self, **options):
        return options, {}, {}

    def preprocess(self, input_, **options):
        texts = [input_["text"]] * len(input_["choices"])
        pairs = self.tokenizer(texts, input_["choices"], padding=True, return_tensors="pt", **options)
        return {name: values[None] for name, values in pairs.items()}

    def _forward(self, input_tensors, **options):
        return {"logits": self.model(**input_tensors).logits}

    def postprocess(self, model_outputs, **options):
        scores = model_outputs["logits"].float().softmax(-1)[0].tolist()
        return [{"label": number, "score": score} for number, score in enumerate(scores)]


def _ask(row: dict[str, Any], number: int, tokenizer: PreTrainedTokenizerBase) -> Any:
    if "choices" not in row:
        raise UserError(f"predict: text {number} stands alone; give a --file with the columns text and choices")
    if problem := choices_problem(row["choices"]):
        raise UserError(f"predict: choices {number}: {problem}")
    return {**row, "text": ask_text({"text": row["text"]}, number, tokenizer)}


def _answer(section: TaskSection, answer: Any) -> dict[str, Any]:
    found = one_answer(section, answer)
    return found | {"probabilities": list(found["probabilities"].values())}


USAGE = """from transformers import AutoModelForMultipleChoice, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForMultipleChoice.from_pretrained("."{trusted})
choices = ["Prices fell.", "It was signed.", "She sang."]
pairs = tokenizer(["Wheat shipments rose."] * len(choices), choices, padding=True, truncation=True, return_tensors="pt")
print(model(**{{name: values[None] for name, values in pairs.items()}}).logits.softmax(-1))"""

MULTIPLE_CHOICE = Task(
    name="multiple-choice",
    auto_class="AutoModelForMultipleChoice",
    roles=TASK_TYPES["multiple-choice"].roles,
    labels=LABEL_KINDS["choice"],
    encode=_encode,
    counts=_counts,
    check=check_length,
    collate=_collate,
    metrics=_metrics,
    metric_names=("accuracy",),
    records=_records,
    loss=_loss,
    asked=("text", "choices"),
    ask=_ask,
    # the choices of one text are its batch
    pipeline=lambda section: (Choices, {"truncation": True, "max_length": section.max_length, "batch_size": 1}),
    answer=_answer,
    usage=USAGE,
)
