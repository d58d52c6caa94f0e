"""`zoo predict`: answers of a finished model for texts, by transformers' own pipelines."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Pipeline, TextClassificationPipeline, pipeline

from zoo.data import read_rows
from zoo.errors import RunError, UserError
from zoo.files import replacing
from zoo.model_directory import Finished, open_finished
from zoo.tasks.text_classification import threshold

SHOW_BAR_AFTER_SECONDS = 2
TOP_WORDS = 5  # for a masked token


def run(
    directory: Path, texts: Sequence[str] = (), file: Path | None = None, trust_remote_code: bool = False
) -> Iterator[dict[str, Any]]:
    """An answer for each text, or each row of a file: `id`, `text`, `predicted` and, of classes, `probabilities`.

    file: any the datasets library reads, with a column `text` (and `text_pair`), or the names of the run's own data.
    Raises UserError at once, and not only when the answers are read, for what cannot be answered.
    """
    if bool(texts) == (file is not None):
        raise UserError("predict: give texts, or --file; one of the two")
    finished = open_finished(directory, trust_remote_code=trust_remote_code)
    rows = _rows(finished, file) if file is not None else [{"text": text} for text in texts]
    for number, row in enumerate(rows):
        for role, text in row.items():
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"predict: {role} {number} is {'empty' if text == '' else repr(text)}")
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise UserError(f"predict: {role} {number} is not UTF-8: {text[:60]!r}")
        if finished.task.name == "fill-mask" and finished.tokenizer.mask_token not in row["text"]:
            raise UserError(
                f"predict: text {number} has no {finished.tokenizer.mask_token} to fill: {row['text'][:60]!r}"
            )
    return _answers(finished, rows)


def write(answers: Iterable[dict[str, Any]], output: Path) -> int:
    """Answers as JSON lines, in place only when all are there; returns how many."""
    if output.is_dir() or not output.name:
        raise UserError(f"--output {str(output)!r}: a directory; name a file")
    count = 0
    try:
        with ExitStack() as stack:
            try:
                stream = stack.enter_context(replacing(output))
            except OSError as error:
                raise UserError(f"--output {output}: cannot be written: {error.strerror}") from error
            for answer in answers:
                stream.write(json.dumps(answer, ensure_ascii=False) + "\n")
                count += 1
    except OSError as error:
        why = f"cannot be written: {error.strerror}; make room, and predict again"
        raise RunError(f"--output {output}: {why}") from error
    return count


def _rows(finished: Finished, file: Path) -> list[dict[str, str]]:
    rows = read_rows(file)
    named = {str(role): name for role, name in finished.recipe.data.columns.items()}
    wanted = {}
    for role in ("text", "text_pair"):
        names = [name for name in (named.get(role, role), role) if name in rows.column_names]
        if names:
            wanted[role] = names[0]
    if "text" not in wanted:
        raise UserError(f"--file {file}: no column 'text'; it has {', '.join(rows.column_names)}")
    return [{role: row[name] for role, name in wanted.items()} for row in rows]


def _answers(finished: Finished, rows: Sequence[dict[str, str]]) -> Iterator[dict[str, Any]]:
    pipe, options = _pipeline(finished)
    given = (row if "text_pair" in row else row["text"] for row in rows)
    answers = pipe(given, **{"batch_size": finished.recipe.train.get("per_device_eval_batch_size", 8), **options})
    bar = tqdm(answers, total=len(rows), unit="text", delay=SHOW_BAR_AFTER_SECONDS, desc="Predicting")
    for number, (row, answer) in enumerate(zip(rows, bar, strict=True)):
        yield {"id": number, **row, **_in_words(finished, answer)}


class _Windows(TextClassificationPipeline):
    """Reads a long text in windows, as the model was trained (`task.stride`), and pools their logits."""

    pooling = "mean"

    def _forward(self, model_inputs):  # type: ignore[override] # as the class above has it
        model_inputs.pop("overflow_to_sample_mapping")
        logits = self.model(**model_inputs).logits
        return {"logits": logits.amax(0, keepdim=True) if self.pooling == "max" else logits.mean(0, keepdim=True)}


def _pipeline(finished: Finished) -> tuple[Pipeline, dict[str, Any]]:
    recipe, task = finished.recipe, finished.task
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    common: dict[str, Any] = {
        "task": task.name, "model": finished.model, "tokenizer": finished.tokenizer, "device": device
    }  # fmt: skip
    cut = {"truncation": True, "max_length": recipe.task.max_length}
    if task.name == "text-classification" and recipe.task.stride is not None:
        # the windows of one text are its batch
        windows = {"stride": recipe.task.stride, "return_overflowing_tokens": True, "padding": True, "batch_size": 1}
        windowed = pipeline(pipeline_class=_Windows, **common)
        windowed.pooling = recipe.task.pooling or "mean"
        return windowed, cut | windows | {"top_k": None}
    pipe = pipeline(**common)
    if task.name == "text-classification":
        return pipe, cut | {"top_k": None}
    if task.name == "token-classification":
        # a word's tag is learned and measured at its first piece
        return pipe, {"aggregation_strategy": "first"}
    return pipe, {"top_k": TOP_WORDS, "tokenizer_kwargs": cut}


def _in_words(finished: Finished, answer: Any) -> dict[str, Any]:
    """A pipeline's answer under the names of `predictions.jsonl`."""
    if finished.task.name == "token-classification":
        return {"predicted": [{key: _plain(value) for key, value in span.items()} for span in answer]}
    if finished.task.name == "fill-mask":
        # one list of words for each mask, where there are several
        masks = answer if isinstance(answer[0], list) else [answer]
        return {"predicted": [[{"word": word["token_str"], "score": word["score"]} for word in mask] for mask in masks]}
    scores = {entry["label"]: entry["score"] for entry in answer}
    if not all(math.isfinite(score) for score in scores.values()):
        raise RunError("predict: the model's answer is not finite: its weights or its config are damaged")
    problem_type = finished.task.problem_type
    if problem_type == "regression":
        return {"predicted": next(iter(scores.values()))}
    if problem_type == "multi_label_classification":
        chosen = [label for label, score in scores.items() if score >= threshold(finished.recipe.task)]
        return {"predicted": chosen, "probabilities": scores}
    return {"predicted": max(scores, key=lambda label: scores[label]), "probabilities": scores}


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def in_lines(answers: Iterable[dict[str, Any]]) -> Iterator[str]:
    """For people: what was predicted, how surely, and the beginning of the text."""
    for answer in answers:
        text = answer["text"] if len(answer["text"]) <= 60 else f"{answer['text'][:57]}..."
        yield f"{'  '.join(chain(_predicted(answer)))}  {text}"


def _predicted(answer: dict[str, Any]) -> Iterator[str]:
    predicted, scores = answer["predicted"], answer.get("probabilities", {})
    if isinstance(predicted, float):
        yield f"{predicted:.4f}"
    elif isinstance(predicted, str):
        yield f"{predicted} {scores[predicted]:.3f}"
    elif scores:
        yield ", ".join(f"{label} {scores[label]:.3f}" for label in predicted) or "none"
    elif predicted and isinstance(predicted[0], list):
        yield "; ".join(", ".join(f"{word['word']} {word['score']:.3f}" for word in mask) for mask in predicted)
    else:
        yield ", ".join(f"{span['word']} ({span['entity_group']} {span['score']:.3f})" for span in predicted) or "none"
