"""`zoo predict`: answers of a finished model for texts or images, by transformers' own pipelines."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import pipeline
from transformers.pipelines.base import PipelineException

from zoo.chats import with_prefix
from zoo.errors import RunError, UserError
from zoo.files import replacing
from zoo.images import image_column
from zoo.model_directory import Finished, open_beside, open_finished
from zoo.reading import read_rows
from zoo.task_types import TASK_TYPES
from zoo.tasks.base import position_count
from zoo.tasks.instruction_tuning import chat_ids

SHOW_BAR_AFTER_SECONDS = 2


def run(
    directory: Path,
    asked: Sequence[str] = (),
    file: Path | None = None,
    trust_remote_code: bool = False,
    pictures: Path | None = None,
    adapters: Sequence[Path] = (),
) -> Iterator[dict[str, Any]]:
    """An answer for each text or image file, or each row of a file of them.

    Each has `id`, what was asked, `predicted` and, of classes, `probabilities`; of vectors, `embedding`. file: any the
    datasets library reads, with the columns that the task asks for (`text` and `text_pair` or `choices`, `image`,
    `question` and `context`, `prompt` or `messages`), or the names of the run's own data. pictures: a folder for images
    that the model makes, which is made then; without it nothing is kept of them but how far they are. adapters: other
    runs whose adapters are of the same base, which answer in turn after that of `directory`, in the same model; each
    answer then has an `adapter`.
    Raises UserError at once, and not only when the answers are read, for what cannot be answered.
    """
    if bool(asked) == (file is not None):
        raise UserError("predict: give texts (or image files), or --file; one of the two")
    finished = open_finished(directory, trust_remote_code=trust_remote_code)
    first = finished.task.asked[0]
    rows = _rows(finished, file) if file is not None else [{first: one} for one in asked]
    given = [finished.task.ask(row, number, finished.processor) for number, row in enumerate(rows)]
    given = [with_prefix(finished.recipe.task.prefix, one) if isinstance(one, list) else one for one in given]
    if TASK_TYPES[finished.task.name].generates:
        _check_room(finished, given)
    if not adapters:
        return _answers(finished, rows, given, pictures)
    opened = [finished, *(open_beside(finished, other, f"adapter_{n}") for n, other in enumerate(adapters, 1))]
    return _answers_in_turn(opened, rows, given, pictures)


def _answers_in_turn(
    opened: Sequence[Finished], rows: Sequence[dict[str, Any]], given: Sequence[Any], pictures: Path | None
) -> Iterator[dict[str, Any]]:
    for finished in opened:
        finished.activate()
        for answer in _answers(finished, rows, given, pictures):
            yield {"adapter": str(finished.directory), **answer}


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


def _rows(finished: Finished, file: Path) -> list[dict[str, Any]]:
    rows = read_rows(file)
    named = {str(role): name for part in finished.recipe.data.parts for role, name in part.columns.items()}
    first, wanted = finished.task.asked[0], {}
    if any({role, named.get(role, role)}.isdisjoint(rows.column_names) for role in finished.task.asked):
        # a column within another has a name such as choices.text
        rows = rows.flatten()
    for role in finished.task.asked:
        names = [name for name in (named.get(role, role), role) if name in rows.column_names]
        if names:
            wanted[role] = names[0]
    if first not in wanted and "messages" not in wanted:
        raise UserError(f"--file {file}: no column {first!r}; it has {', '.join(rows.column_names)}")
    if first == "image":
        rows = image_column(rows, wanted[first], file.parent, f"--file {file}")
    return [{role: row[name] for role, name in wanted.items()} for row in rows]


def _check_room(finished: Finished, texts: Sequence[Any]) -> None:
    """Raises UserError for a text that leaves a decoder no positions to write at; encoders get texts that are cut."""
    tokenizer: Any = finished.processor
    config, positions = finished.model.config, position_count(finished.model)
    if positions is None or config.is_encoder_decoder:
        return
    new = getattr(finished.model.generation_config, "max_new_tokens", None) or 1
    for number, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"] if isinstance(text, str) else chat_ids(tokenizer, text, ask=True)
        tokens = len(ids)
        # the last token is written and never read
        if tokens + new - 1 > positions:
            raise UserError(
                f"predict: text {number} has {tokens} tokens and {new} more are written (max_new_tokens), but the "
                f"model has {positions} positions; shorten it"
            )


def _answers(
    finished: Finished, rows: Sequence[dict[str, Any]], given: Sequence[Any], pictures: Path | None
) -> Iterator[dict[str, Any]]:
    recipe, task = finished.recipe, finished.task
    pipeline_class, options = task.pipeline(recipe.task)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    parts: dict[str, Any] = {"model": finished.model, task.processor: finished.processor, "device": device}
    pipe = pipeline(**{"task": task.name, **parts}) if pipeline_class is None else pipeline_class(**parts)
    # a generator is answered bit by bit; a list would be a list of answers
    answers = pipe(
        (one for one in given), **{"batch_size": recipe.train.get("per_device_eval_batch_size", 8), **options}
    )
    bar = tqdm(answers, total=len(rows), unit=task.asked[0], delay=SHOW_BAR_AFTER_SECONDS, desc="Predicting")
    try:
        for number, (row, answer) in enumerate(zip(rows, bar, strict=True)):
            named = {role: value for role, value in row.items() if isinstance(value, str | list)}
            said = task.answer(recipe.task, answer)
            picture = said.pop("picture", None)
            if picture is not None and pictures is not None:
                said["predicted"] = _keep(picture, pictures / f"{number}.png")
            yield {"id": number, **named, **said}
    except PipelineException as error:
        # a mask that is behind the cut is not found
        raise UserError(f"predict: {error}; texts are cut at {recipe.task.max_length} tokens") from error


def _keep(picture: Image.Image, file: Path) -> str:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from error
    return str(file)


def in_lines(answers: Iterable[dict[str, Any]]) -> Iterator[str]:
    """For people: what was predicted, how surely or how far off, and the beginning of the text, or the image's file."""
    shown = None
    for answer in _with_nearest(iter(answers)):
        if answer.get("adapter") != shown:
            shown = answer["adapter"]
            yield f"{shown}:"
        told = answer["messages"][-1]["content"] if "messages" in answer else f"image {answer['id']}"
        text = next((answer[name] for name in ("text", "question", "prompt", "image") if answer.get(name)), told)
        yield f"{'  '.join(chain(_predicted(answer)))}  {_beginning(text)}"


def _beginning(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _with_nearest(answers: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Vectors say nothing to people: with those of single texts, the nearest other text and the cosine to it."""
    first = next(answers, None)
    if first is None or "embedding" not in first or "predicted" in first:
        yield from chain([] if first is None else [first], answers)
        return
    texts = [first, *answers]
    vectors = np.array([answer["embedding"] for answer in texts])
    for number, answer in enumerate(texts):
        cosines = vectors @ vectors[number]
        cosines[number] = -np.inf
        other = int(cosines.argmax())
        near = f"{cosines[other]:.4f} {_beginning(texts[other]['text'])}  <-"
        yield answer | {"predicted": near if len(texts) > 1 else f"{vectors.shape[1]} numbers (--json)"}


def _predicted(answer: dict[str, Any]) -> Iterator[str]:
    predicted: Any = answer.get("predicted")
    scores = answer.get("probabilities", {})
    if "mae" in answer:
        yield f"mae {answer['mae']:.4f}"
    elif isinstance(predicted, float):
        yield f"{predicted:.4f}"
    elif isinstance(predicted, str) and "n_best" in answer:
        yield f"{predicted or 'no answer'} {answer['score']:.3f}"
    elif isinstance(predicted, int):
        yield f"{answer['choices'][predicted]} {scores[predicted]:.3f}"
    elif isinstance(predicted, str) and not scores:
        yield predicted
    elif isinstance(predicted, str):
        yield f"{predicted} {scores[predicted]:.3f}"
    elif scores:
        yield ", ".join(f"{label} {scores[label]:.3f}" for label in predicted) or "none"
    elif predicted and isinstance(predicted[0], list):
        yield "; ".join(", ".join(f"{word['word']} {word['score']:.3f}" for word in mask) for mask in predicted)
    else:
        yield ", ".join(f"{span['word']} ({span['entity_group']} {span['score']:.3f})" for span in predicted) or "none"
