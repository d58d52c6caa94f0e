"""Rows as batches take them: encoded by their task, in memory or bit by bit; kept for the next run.

They are kept under the hash of the rows, the tokenizer, the task's section and its code. So another run finds them,
wherever its data lie, and one letter of difference is another hash.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from datasets import Dataset
from transformers import EvalPrediction

from zoo import tasks
from zoo.errors import RunError
from zoo.loading import Processor
from zoo.packed_rows import PackedRows
from zoo.reading import room_in_cache
from zoo.recipe import Recipe
from zoo.samples import WithDraws
from zoo.sections import TaskSection
from zoo.sources import cache_home
from zoo.streaming import Stream, Unread
from zoo.tasks import COUNTED, Task


def encoded(
    rows: Dataset, recipe: Recipe, task: Task, processor: Processor, seed: int, training: bool = False
) -> tuple[Any, str]:
    """The rows as `Task.collate` takes them, with their numbers in the data; and what was counted, in words."""
    encode = task.encode(processor, recipe.task)
    verb = "Tokenising" if task.processor == "tokenizer" else "Reading images"
    kept = cached(rows, task, recipe.task, processor) if task.processor == "tokenizer" else {}
    with room_in_cache(Path(kept["cache_file_name"]).parent if kept else None):
        found = rows.map(encode, batched=True, remove_columns=rows.column_names, desc=verb, **kept)
    words = [task.counts(found, len(rows), recipe.task)]
    if "label" in rows.column_names and hasattr(rows.features["label"], "names"):
        names, counts = rows.features["label"].names, Counter(rows["label"])
        words.append("labels " + ", ".join(f"{name} {counts[n]:,}" for n, name in enumerate(names)))
    lengths = list(found["tokens"]) if recipe.task.packing and training else None
    found = found.remove_columns([name for name in COUNTED if name in found.column_names])
    if not found.column_names:
        # images were looked at only: they go to the batches as they are
        found = rows.rename_column("label", "labels") if "label" in rows.column_names else rows
    if lengths is not None:
        packed = PackedRows(found, lengths, recipe.task.max_length)
        return packed, "; ".join([*words, packed.note])
    drawn = task.draws == "all" or (task.draws is not None and training)
    return WithDraws(found, seed, task.others) if drawn else found, "; ".join(words)


def stream(unread: Unread, recipe: Recipe, task: Task, processor: Processor, seed: int) -> Stream:
    """The same of rows that are read while they are learned."""
    encode = task.encode(processor, recipe.task)

    def samples(rows: Dataset) -> dict[str, list]:
        columns = rows.to_dict()
        if task.processor == "image_processor":
            return {"labels" if name == "label" else name: values for name, values in columns.items()}
        return {name: values for name, values in encode(columns).items() if name not in COUNTED}

    return Stream(unread, samples, seed, task.draws is not None, task.others)


def by_rows(task: Task, recipe: Recipe, prediction: EvalPrediction, rows: Any) -> EvalPrediction:
    """One prediction a row, where rows were encoded as several."""
    return prediction if task.pool is None else task.pool(recipe.task, prediction, rows)


def cached(rows: Dataset, task: Task, section: TaskSection, tokenizer: Any) -> dict[str, Any]:
    """Options of `Dataset.map` that keep and find what it makes of the rows with this task.

    Nothing for a tokenizer that cannot be written down. Raises RunError where nothing can be kept.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        return {}
    digest = hashlib.sha256()
    for part in _parts(rows, task, section, tokenizer):
        digest.update(hashlib.sha256(part).digest())
    file = cache_home() / "zoo" / "encoded" / f"{digest.hexdigest()}.arrow"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{file.parent}: cannot be written: {error.strerror}; unlock it, or set HF_HOME") from error
    return {"cache_file_name": str(file), "new_fingerprint": digest.hexdigest()[:32], "load_from_cache_file": True}


def _parts(rows: Dataset, task: Task, section: TaskSection, tokenizer: Any) -> Iterator[bytes]:
    yield from (task.name.encode(), section.model_dump_json().encode())
    # what a call has left behind, for the next to find, is no part of a tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    sides = (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_input_names, tokenizer.chat_template)
    yield json.dumps([state, sides, tokenizer.special_tokens_map], sort_keys=True, default=str).encode()
    # what it calls is there, and in the libraries
    package = Path(tasks.__file__).parent
    for code in (*sorted(package.glob("*.py")), *(package.parent / f"{name}.py" for name in ("chats", "task_types"))):
        yield code.read_bytes()
    yield f"{transformers.__version__} {tokenizers.__version__}".encode()
    yield repr(rows.features).encode()
    for table in rows.with_format("arrow").iter(batch_size=1000):
        for batch in table.combine_chunks().to_batches():
            yield batch.serialize().to_pybytes()
