"""Where encoded rows are kept: under the hash of the rows, the tokenizer, the task's section and its code.

So another run finds them, wherever its data lie, and one letter of difference is another hash.
"""

import hashlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from zoo.errors import RunError
from zoo.sections import TaskSection
from zoo.sources import cache_home
from zoo.tasks import Task, base


def cached(rows: Dataset, task: Task, section: TaskSection, tokenizer: Any) -> dict[str, Any]:
    """Options of `Dataset.map` that keep and find what it makes of the rows with this task.

    None for a tokenizer that cannot be written down. Raises RunError where nothing can be kept.
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
    for code in sorted({inspect.getfile(task.encode), base.__file__}):
        yield Path(code).read_bytes()
    yield repr(rows.features).encode()
    for table in rows.with_format("arrow").iter(batch_size=1000):
        for batch in table.combine_chunks().to_batches():
            yield batch.serialize().to_pybytes()
