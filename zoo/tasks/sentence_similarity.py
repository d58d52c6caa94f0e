"""A vector for a text, near those of texts that belong to it: the other texts of a batch are what it is told from
(Henderson et al. 2017, arXiv 1705.00652, section 4.4). What is saved opens in sentence-transformers."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pipelines.base import ChunkPipeline
from transformers.utils import cached_file

from zoo.errors import RunError, UserError
from zoo.sections import TaskSection
from zoo.task_types import DEFAULT_TEMPERATURE, TASK_TYPES
from zoo.tasks.base import COUNTED, Collate, Rows, Task, arrays, check_length, check_padding, cut, token_counts
from zoo.tasks.retrieval import RETRIEVAL, ranks, retrieval, text_id

ROLES = TASK_TYPES["sentence-similarity"].roles


def _encode(tokenizer: PreTrainedTokenizerBase, section: TaskSection):
    """A row has the ids of each of its texts, and as `labels` what tells equal texts."""

    def encode(rows: Rows) -> Rows:
        if "text_pair" not in rows:
            raise UserError("data.columns.text_pair: required, and not there: the text that belongs to each text")
        texts = [rows[role] for role in ROLES if role in rows]
        sides = [cut(tokenizer, section, [side]) for side in texts]

        def together(name: str) -> list:
            return [list(values) for values in zip(*(side[name] for side in sides), strict=True)]

        inputs = [name for name in tokenizer.model_input_names if name in sides[0]]
        return {
            **{name: together(name) for name in inputs},
            **{name: [sum(values) for values in together(name)] for name in COUNTED if name in sides[0]},
            # what groups rows of like length looks at
            "length": [max(map(len, row)) for row in together("input_ids")],
            "labels": [[text_id(text) for text in row] for row in zip(*texts, strict=True)],
            "row": rows["row"],
        }

    return encode


def _counts(encoded: Dataset, texts: int, section: TaskSection) -> str:
    if texts < 2:
        raise UserError("data: a split of one row; texts are told from those of other rows, so give two at least")
    each = len(encoded[0]["labels"])
    return f"{texts:,} rows of {each} texts; {token_counts(encoded, each * texts, section)}"


def _collate(tokenizer: PreTrainedTokenizerBase, section: TaskSection) -> Collate:
    """Tensors of (rows, texts of a row, length)."""
    check_padding(tokenizer)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        names = [name for name in tokenizer.model_input_names if name in rows[0]]
        texts = [dict(zip(names, text, strict=True)) for row in rows for text in zip(*map(row.get, names), strict=True)]
        padded = tokenizer.pad(texts, return_tensors="pt")
        made = {name: values.unflatten(0, (len(rows), -1)) for name, values in padded.items()}
        return made | {name: torch.tensor([row[name] for row in rows]) for name in ("labels", "row") if name in rows[0]}

    return collate


# Vectors


def _mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def _max(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return states.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(1)


def _first(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return states[torch.arange(len(states), device=states.device), mask.argmax(1)]


# by sentence-transformers' names: (texts, length, hidden) and the mask of real tokens -> (texts, hidden)
POOLINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"mean": _mean, "max": _max, "cls": _first}


def pooling_of(section: TaskSection) -> str:
    return section.pooling or "mean"


def vectors_of(model: Any, batch: dict[str, torch.Tensor], pooling: str) -> torch.Tensor:
    """(texts, hidden), of length 1."""
    states = model(**batch).last_hidden_state.float()
    return F.normalize(POOLINGS[pooling](states, batch["attention_mask"]), dim=-1)


def contrast(vectors: torch.Tensor, texts: torch.Tensor, temperature: float) -> torch.Tensor:
    """The mean over rows of the cross entropy of finding an anchor's own text, by cosine, among those of all rows.

    vectors (rows, 2 or 3, dim): anchors, their texts, and one hard negative each. texts: their ids; one that is the
    anchor's own again, the anchor itself, or belongs to an equal anchor is nothing to be told from.
    """
    rows = torch.arange(len(texts), device=texts.device)
    # the texts of all rows, then all hard negatives
    candidates, ids = vectors[:, 1:].transpose(0, 1).flatten(0, 1), texts[:, 1:].T.flatten()
    same = (ids == texts[:, 1:2]) | (ids == texts[:, :1])
    same[:, : len(rows)] |= texts[:, :1] == texts[:, 0]
    same[rows, rows] = False
    scores = vectors[:, 0] @ candidates.T / temperature
    return F.cross_entropy(scores.masked_fill(same, -torch.inf), rows)


def _learn(section: TaskSection):
    def learn(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, vectors of (rows, texts of a row, hidden)), in one pass of all texts."""
        texts = batch["labels"]
        flat = {name: values.flatten(0, 1) for name, values in batch.items() if name != "labels"}
        vectors = vectors_of(model, flat, pooling_of(section)).unflatten(0, texts.shape)
        # in half precision a cosine over the temperature is a coarse number
        with torch.autocast(vectors.device.type, enabled=False):
            return contrast(vectors, texts, section.temperature or DEFAULT_TEMPERATURE), vectors

    return learn


# Measures


def _measured(prediction: EvalPrediction) -> tuple[list[int], np.ndarray]:
    """Of each row: its text's place among those of the split and their hard negatives, and the cosine to it."""
    vectors, ids = arrays(prediction)
    candidates, of = vectors[:, 1:].reshape(-1, vectors.shape[-1]), ids[:, 1:].reshape(-1)
    places = list(ranks(vectors[:, 0], candidates, ids[:, :2], of))
    return places, (vectors[:, 0] * vectors[:, 1]).sum(-1)


def _metrics(section: TaskSection, labels: Sequence[str], processor: Any):
    return lambda prediction: retrieval(*_measured(prediction))


def _records(section: TaskSection, labels: Sequence[str], processor: Any):
    def records(prediction: EvalPrediction) -> Iterator[dict[str, Any]]:
        for place, cosine in zip(*_measured(prediction), strict=True):
            yield {"rank": place, "cosine": float(cosine)}

    return records


# A checkpoint and a finished model as sentence-transformers knows them; all its versions read the names of the first

_MODULES = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
_MODES = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "max": "pooling_mode_max_tokens"}


def _files(section: TaskSection, model: PreTrainedModel) -> dict[str, str]:
    settings: dict[str, Any] = {"model_type": "SentenceTransformer", "prompts": {}, "default_prompt_name": None}
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (path, kind) in enumerate(_MODULES.items())
        ],
        "sentence_bert_config.json": {"max_seq_length": section.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {**settings, "similarity_fn_name": "cosine"},
        "1_Pooling/config.json": {
            "word_embedding_dimension": model.config.hidden_size,
            **{name: mode == pooling_of(section) for mode, name in _MODES.items()},
        },
    }
    return {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}


def _read(model: PreTrainedModel, name: str) -> Any:
    """A JSON file of the checkpoint that a model was opened from, or None. Raises UserError for a damaged one."""
    if not model.name_or_path:
        return None
    file = cached_file(
        model.name_or_path, name, revision=getattr(model.config, "_commit_hash", None),
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    try:
        return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model {model.name_or_path}: {name} cannot be read: {error}") from error


def _check(section: TaskSection, model: Any) -> None:
    """Raises UserError for a model that is no encoder, or that sentence-transformers would use otherwise."""
    check_length(section, model)
    where = f"model {model.name_or_path}"
    if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "decoder"):
        raise UserError(f"{where}: {type(model).__name__} has a decoder, and {section.type} wants an encoder alone")
    try:
        modules = [(module["type"].rpartition(".")[2], module["path"]) for module in _read(model, "modules.json") or ()]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: modules.json is not one of sentence-transformers") from error
    for kind, path in modules:
        if kind not in _MODULES.values():
            raise UserError(f"{where}: its vectors come out of a further module, {kind}, which is not learned here")
        if kind == "Pooling":
            mode = _stated(_read(model, f"{path}/config.json") or {})
            if mode not in POOLINGS:
                raise UserError(f"{where}: pools its tokens by {mode}, which is not learned here")
            if mode != pooling_of(section):
                raise UserError(f"task.pooling: {pooling_of(section)}, but {where} pools by {mode}; set it to that")


def _stated(config: dict[str, Any]) -> str:
    """The pooling of a module's config, of old versions or new ones."""
    named = {name: mode for mode, name in _MODES.items()}
    old = [named.get(key, key) for key, value in config.items() if key.startswith("pooling_mode_") and value]
    return str(config.get("pooling_mode") or " and ".join(old) or "mean")


# Answers


class Vectors(ChunkPipeline):
    """A vector for a text, or for each of a pair."""

    _load_tokenizer = True  # type: ignore[assignment]
    tokenizer: Any
    model: Any

    def _sanitize_parameters(self, pooling="mean", **options):
        return options, {"pooling": pooling}, {}

    def preprocess(self, inputs, **options):  # type: ignore[override] # as the class above has it
        texts = [inputs] if isinstance(inputs, str) else [inputs["text"], inputs["text_pair"]]
        for number, text in enumerate(texts, start=1):
            yield {"is_last": number == len(texts), **self.tokenizer(text, return_tensors="pt", **options)}

    def _forward(self, model_inputs, pooling="mean"):  # type: ignore[override]
        last = model_inputs.pop("is_last")
        return {"is_last": last, "vectors": vectors_of(self.model, model_inputs, pooling)}

    def postprocess(self, model_outputs):  # type: ignore[override]
        return torch.cat([output["vectors"] for output in model_outputs])


def _pipeline(section: TaskSection):
    return Vectors, {"pooling": pooling_of(section), "truncation": True, "max_length": section.max_length}


def _answer(section: TaskSection, answer: torch.Tensor) -> dict[str, Any]:
    if not bool(answer.isfinite().all()):
        raise RunError("predict: the model's answer is not finite: its weights or its config are damaged")
    vectors = dict(zip(("embedding", "embedding_pair"), answer.tolist(), strict=False))
    return {"predicted": float(answer[0] @ answer[1]), **vectors} if len(answer) > 1 else vectors


USAGE = """from sentence_transformers import SentenceTransformer

texts = ["Wheat shipments rose", "More wheat was shipped", "The bank raised its rates"]
model = SentenceTransformer("."{{trusted}})
print(model.similarity(model.encode(texts), model.encode(texts)))
```

With transformers alone:

```python
import torch
from transformers import {auto}, AutoTokenizer

texts = ["Wheat shipments rose", "More wheat was shipped", "The bank raised its rates"]
tokenizer, model = AutoTokenizer.from_pretrained("."), {auto}.from_pretrained("."{{trusted}})
batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    states, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
vectors = torch.nn.functional.normalize({pooled}, dim=-1)
print(vectors @ vectors.T)"""
_POOLED = {
    "mean": "(states * mask).sum(1) / mask.sum(1)",
    "max": "states.masked_fill(mask == 0, -torch.inf).amax(1)",
    "cls": "states[:, 0]",
}


def _usage(section: TaskSection, model: PreTrainedModel) -> str:
    # the encoder of a model that has a decoder, too, is a class of its own
    auto = "AutoModelForTextEncoding" if type(model).__name__.endswith("EncoderModel") else "AutoModel"
    return USAGE.format(auto=auto, pooled=_POOLED[pooling_of(section)])


SENTENCE_SIMILARITY = Task(
    name="sentence-similarity",
    auto_class="AutoModelForTextEncoding",
    roles=ROLES,
    labels=None,
    encode=_encode,
    counts=_counts,
    check=_check,
    collate=_collate,
    learn=_learn,
    metrics=_metrics,
    metric_names=RETRIEVAL,
    records=_records,
    files=_files,
    asked=("text", "text_pair"),
    pipeline=_pipeline,
    answer=_answer,
    usage=_usage,
    library="sentence-transformers",
)
