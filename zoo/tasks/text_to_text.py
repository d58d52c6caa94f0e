"""A text for a text, written by a decoder from what an encoder has read: what such tasks have in common."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, EvalPrediction, Pipeline, PreTrainedModel, PreTrainedTokenizerBase

from zoo.errors import UserError
from zoo.sections import TaskSection
from zoo.task_types import DEFAULT_TARGET_LENGTH, TASK_TYPES
from zoo.tasks.base import (
    IGNORED,
    Collate,
    Rows,
    arrays,
    check_length,
    check_padding,
    cut,
    position_count,
    token_counts,
)

Measure = Callable[[Sequence[str], Sequence[str]], dict[str, float]]  # of gold and predicted texts


def _target_length(section: TaskSection) -> int:
    return section.max_target_length or DEFAULT_TARGET_LENGTH


def _encode(tokenizer: PreTrainedTokenizerBase, section: TaskSection):
    _, target = TASK_TYPES[section.type].roles

    def encode(rows: Rows) -> Rows:
        encoded = cut(tokenizer, section, [[f"{section.prefix or ''}{text}" for text in rows["text"]]])
        encoded.pop("text")
        targets = tokenizer(text_target=rows[target], truncation=True, max_length=_target_length(section))
        whole = tokenizer(text_target=rows[target])["input_ids"]
        cut_off = [len(one) > _target_length(section) for one in whole]
        return {**encoded, "labels": targets["input_ids"], "targets_cut": cut_off, "row": rows["row"]}

    return encode


def _counts(encoded: Dataset, texts: int, section: TaskSection) -> str:
    cut_off = sum(encoded["targets_cut"])
    return f"{token_counts(encoded, texts, section)}; {cut_off:,} targets cut at {_target_length(section)}"


def _collate(tokenizer: PreTrainedTokenizerBase, section: TaskSection) -> Collate:
    check_padding(tokenizer)
    pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    return lambda rows: dict(pad(rows))


def _texts(prediction: EvalPrediction, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[str]]:
    """Gold and predicted texts."""
    generated, gold = arrays(prediction)
    for ids in (gold, generated):
        # what fills a row up is no token
        yield tokenizer.batch_decode(np.where(ids == IGNORED, tokenizer.pad_token_id, ids), skip_special_tokens=True)


def _records(section: TaskSection, labels: Sequence[str], processor: Any):
    def records(prediction: EvalPrediction) -> Iterator[dict[str, Any]]:
        for gold, predicted in zip(*_texts(prediction, processor), strict=True):
            yield {"gold": gold, "predicted": predicted}

    return records


class Writer(Pipeline):
    """Writes a text for a text, as `generate` and the model's own settings have it."""

    _load_tokenizer = True  # type: ignore[assignment]
    tokenizer: Any
    model: Any

    def _sanitize_parameters(self, prefix="", **options):
        return {"prefix": prefix, **options}, {}, {}

    def preprocess(self, input_, prefix="", **options):
        return self.tokenizer(f"{prefix}{input_}", return_tensors="pt", **options)

    def _forward(self, input_tensors, **options):
        return {"ids": self.model.generate(**input_tensors, **options)}

    def postprocess(self, model_outputs, **options):
        return self.tokenizer.decode(model_outputs["ids"][0], skip_special_tokens=True)


def _pipeline(section: TaskSection):
    return Writer, {"prefix": section.prefix or "", "truncation": True, "max_length": section.max_length}


USAGE = """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForSeq2SeqLM.from_pretrained("."{trusted})
written = model.generate(**tokenizer({text!r}, return_tensors="pt"))
print(tokenizer.decode(written[0], skip_special_tokens=True))"""


def _check(section: TaskSection, model: PreTrainedModel) -> None:
    """Raises UserError where texts, read or written, may be longer than the model has positions for."""
    check_length(section, model)
    positions, written = position_count(model), _target_length(section)
    if positions is not None and written > positions:
        raise UserError(f"task.max_target_length: {written}, but the model has {positions} positions")


def text_to_text(measure: Measure, metric_names: tuple[str, ...]) -> dict[str, Any]:
    """What a Task is whose second role is written for the first, `text`, apart from its name, head and roles."""

    def metrics(section: TaskSection, labels: Sequence[str], processor: Any):
        return lambda prediction: measure(*_texts(prediction, processor))

    return {
        "labels": None,
        "encode": _encode,
        "counts": _counts,
        "collate": _collate,
        "metrics": metrics,
        "metric_names": metric_names,
        "records": _records,
        "check": _check,
        "writes": True,
        "pipeline": _pipeline,
        "answer": lambda section, answer: {"predicted": answer},
        "usage": USAGE,
    }
