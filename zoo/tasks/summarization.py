"""A shorter text for a text, written by a decoder from what an encoder has read; measured by ROUGE (Lin 2004)."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from transformers import DataCollatorForSeq2Seq, EvalPrediction, Pipeline, PreTrainedTokenizerBase

from zoo.sections import TaskSection
from zoo.task_types import DEFAULT_TARGET_LENGTH, TASK_TYPES
from zoo.tasks.base import IGNORED, Collate, Rows, Task, arrays, check_padding, cut, token_counts

ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge(gold: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """Mean F1 of the words, pairs of words and longest common subsequences that the texts share, stemmed."""
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    scores = [scorer.score(one, other) for one, other in zip(gold, predicted, strict=True)]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in ROUGE}


def _target_length(section: TaskSection) -> int:
    return section.max_target_length or DEFAULT_TARGET_LENGTH


def _encode(tokenizer: PreTrainedTokenizerBase, section: TaskSection):
    def encode(rows: Rows) -> Rows:
        encoded = cut(tokenizer, section, [[f"{section.prefix or ''}{text}" for text in rows["text"]]])
        encoded.pop("text")
        targets = tokenizer(text_target=rows["summary"], truncation=True, max_length=_target_length(section))
        whole = tokenizer(text_target=rows["summary"])["input_ids"]
        cut_off = [len(one) > _target_length(section) for one in whole]
        return {**encoded, "labels": targets["input_ids"], "targets_cut": cut_off, "row": rows["row"]}

    return encode


def _counts(encoded: Dataset, texts: int, section: TaskSection) -> str:
    cut_off = sum(encoded["targets_cut"])
    return f"{token_counts(encoded, texts, section)}; {cut_off:,} summaries cut at {_target_length(section)}"


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


def _metrics(section: TaskSection, labels: Sequence[str], processor: Any):
    return lambda prediction: rouge(*_texts(prediction, processor))


def _records(section: TaskSection, labels: Sequence[str], processor: Any):
    def records(prediction: EvalPrediction) -> Iterator[dict[str, Any]]:
        for gold, predicted in zip(*_texts(prediction, processor), strict=True):
            yield {"gold": gold, "predicted": predicted}

    return records


class Summaries(Pipeline):
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
    return Summaries, {"prefix": section.prefix or "", "truncation": True, "max_length": section.max_length}


USAGE = """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForSeq2SeqLM.from_pretrained("."{trusted})
written = model.generate(**tokenizer("Wheat shipments rose", return_tensors="pt"))
print(tokenizer.decode(written[0], skip_special_tokens=True))"""

SUMMARIZATION = Task(
    name="summarization",
    auto_class="AutoModelForSeq2SeqLM",
    roles=TASK_TYPES["summarization"].roles,
    labels=None,
    encode=_encode,
    counts=_counts,
    collate=_collate,
    metrics=_metrics,
    metric_names=ROUGE,
    records=_records,
    writes=True,
    pipeline=_pipeline,
    answer=lambda section, answer: {"predicted": answer},
    usage=USAGE,
)
