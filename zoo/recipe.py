"""A recipe says what a run is. `sections` has its parts, `recipe_loading` reads one from YAML.

Nothing here imports torch or transformers.
"""

import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.nodes import Node
from ruamel.yaml.representer import SafeRepresenter

from zoo import generated
from zoo.adapter_types import ADAPTER_TYPES, DEFAULT_TYPE
from zoo.data_sections import DataSection, SourceSection
from zoo.errors import Keys, did_you_mean
from zoo.sections import (
    DistillSection,
    FinetuneSection,
    Freeze,
    HubSection,
    LaunchSection,
    ModelSection,
    Section,
    TaskSection,
    TokenizerSection,
)
from zoo.task_types import TASK_TYPES


class Recipe(Section):
    """A resolved recipe: base, file and command line merged and checked.

    `train` is given verbatim to transformers.TrainingArguments, `generate` to its GenerationConfig, `quantize` to its
    BitsAndBytesConfig, `lora` to a config of peft, LoraConfig unless its `type` names another; `seeds`, a run each,
    take the place of train's seed.
    `file` is the recipe's file, `origins` where each value came from ("command line", "file:line" or "default");
    neither counts in comparisons.
    """

    name: Annotated[str, Field(max_length=100)]
    stage: Literal["train"] = "train"
    model: ModelSection
    task: TaskSection
    data: DataSection
    train: dict[str, Any] = Field(default_factory=dict)
    quantize: dict[str, Any] = Field(default_factory=dict)
    lora: dict[str, Any] = Field(default_factory=dict)
    finetune: FinetuneSection = Field(default_factory=FinetuneSection)
    distill: DistillSection = Field(default_factory=DistillSection)
    generate: dict[str, Any] = Field(default_factory=dict)
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(default_factory=list)
    hub: HubSection = Field(default_factory=HubSection)
    launch: LaunchSection = Field(default_factory=LaunchSection)
    _file: Path | None = PrivateAttr(default=None)
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def contradictions(self) -> Iterator[tuple[Keys, str]]:
        if len(self.seeds) == 1:
            yield ("seeds",), "one seed has no interval; give several, or write it as train.seed"
        if len(set(self.seeds)) < len(self.seeds):
            yield ("seeds",), "a seed stands there twice"
        if self.seeds and self.hub.repo is not None:
            yield ("hub", "repo"), "several seeds make several models; push the one you choose with zoo push"
        roles = (*TASK_TYPES[self.task.type].roles, *TASK_TYPES[self.task.type].beside)
        if self.generate and not TASK_TYPES[self.task.type].generates:
            yield ("generate",), f"{self.task.type} generates nothing; remove the section"
        if self.train.get("label_smoothing_factor") and not self._smooths():
            what = f"{self.task.type} with {self.task.problem_type}" if self.task.problem_type else self.task.type
            yield ("train", "label_smoothing_factor"), f"{what} has no label alone to smooth; remove the key"
        sources: list[tuple[Keys, SourceSection]] = [((), self.data)]
        sources += [(("mixture", number), part) for number, part in enumerate(self.data.mixture)]
        for keys, source in sources:
            if source.pixels is not None and "image" not in roles:
                yield ("data", *keys, "pixels"), f"{self.task.type} reads no images; remove the key"
            for role in source.columns:
                if role not in roles:
                    text = f"{self.task.type} does not read it; its roles are {', '.join(roles)}"
                    yield ("data", *keys, "columns", role), text
        if self.quantize and not self.lora:
            yield ("quantize",), "weights of 8 or 4 bits do not learn; add a section lora, whose adapters do"
        if self.lora:
            yield from self._adapter_contradictions()
        elif self.finetune.loraplus_lr_ratio is not None:
            yield ("finetune", "loraplus_lr_ratio"), "it is of adapters, and there is no section lora; remove the key"
        if self.data.streaming:
            yield from self._stream_contradictions()

    def _adapter_contradictions(self) -> Iterator[tuple[Keys, str]]:
        kind = self.lora.get("type", DEFAULT_TYPE)
        if kind not in ADAPTER_TYPES:
            near = did_you_mean(str(kind), ADAPTER_TYPES)
            yield ("lora", "type"), f"unknown method{near} (known: {', '.join(ADAPTER_TYPES)})"
        if self.model.path is None:
            yield ("lora",), "random weights hold nothing to adapt; name a checkpoint as model.path, or train it whole"
        if self.model.added_tokens:
            text = "their embeddings would be no part of the adapter; train whole, or remove the section lora"
            yield ("model", "added_tokens"), text
        for key in ("layerwise_decay", "gradual_unfreezing"):
            if getattr(self.finetune, key) is not None:
                yield ("finetune", key), "of a model with adapters nothing else learns; remove the key"
        if self.finetune.freeze != Freeze():
            yield ("finetune", "freeze"), "of a model with adapters nothing else learns; remove the key"
        if self.finetune.loraplus_lr_ratio is not None and kind != "lora":
            yield ("finetune", "loraplus_lr_ratio"), f"{kind} has no two matrices; remove the key"

    def _stream_contradictions(self) -> Iterator[tuple[Keys, str]]:
        steps = self.train.get("max_steps", -1)
        # of another type the library's section says what is wrong
        if steps is None or (isinstance(steps, int) and steps <= 0):
            yield ("train", "max_steps"), "required with data.streaming: a stream has no end of its own"
        if self.train.get("dataloader_num_workers", 0):
            text = "a stream is read ahead by a thread of its own, so that a run can go on where it was; remove the key"
            yield ("train", "dataloader_num_workers"), text
        if self.train.get("train_sampling_strategy", "random") != "random":
            yield ("train", "train_sampling_strategy"), "a stream comes in blocks that are shuffled; remove the key"
        for key in ("eval_strategy", "save_strategy", "logging_strategy"):
            if self.train.get(key) == "epoch":
                yield ("train", key), "a stream has no epochs; write steps"
        for key in ("ignore_data_skip", "data_seed"):
            if key in self.train:
                yield ("train", key), "a stream goes on where it was, in an order by train.seed; remove the key"
        if self.finetune.gradual_unfreezing == "epoch":
            yield ("finetune", "gradual_unfreezing"), "a stream has no epochs; give a number of steps"
        if self.task.class_weights is not None:
            yield ("task", "class_weights"), "of a stream it is not known how often a class comes; remove the key"
        if self.task.packing:
            yield ("task", "packing"), "of a stream the lengths of all texts are not known, to pack by; remove the key"

    def _smooths(self) -> bool:
        """Whether a label is one class of several, and the loss about it alone."""
        one = self.task.problem_type in (None, "single_label_classification")
        return one and self.task.type not in ("next-sentence-prediction", "sentence-order-prediction")

    @field_validator("name")
    @classmethod
    def _safe(cls, value: str) -> str:
        # The name becomes a directory: no separators, no leading dot or dash.
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", value):
            text = f"{value!r} cannot name a directory; use letters, digits, '.', '_' and '-' between them"
            raise PydanticCustomError("name", "{text}", {"text": text})
        return value

    @property
    def file(self) -> Path | None:
        """The file it was read from."""
        return self._file

    @property
    def origins(self) -> Mapping[str, str]:
        """Dotted key -> "command line", "file:line" or "default"."""
        return self._origins

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def to_yaml(self) -> str:
        """The whole recipe, defaults written out, as `load_recipe` reads it back to an equal one."""
        yaml = YAML(typ="safe", pure=True)
        yaml.Representer = _Representer
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        yaml.width = 10_000
        stream = io.StringIO()
        yaml.dump(plain(self), stream)
        return stream.getvalue()

    def smoke(self) -> "Recipe":
        """A copy that runs in seconds: 64 rows a split, `smoke_length` tokens, 4 steps, evaluated and saved every 2.

        Of a published size with random weights two layers are left. What goes on from a run that has only been tried
        goes on from that.
        """
        data = self.data.model_copy(update={"limit": min(self.data.limit or 64, 64)})
        if (data.path or "").startswith(generated.SCHEME):
            data = data.model_copy(update={"path": generated.smaller(data.path or "", 512)})
        for key in ("validation", "test"):
            if isinstance(getattr(data, key), int):
                data = data.model_copy(update={key: min(getattr(data, key), 16)})
        length = min(self.task.max_length, TASK_TYPES[self.task.type].smoke_length)
        stride = None if self.task.stride is None else min(self.task.stride, length // 4)
        lengths = {"max_length": length, "stride": stride}
        task = self.task.model_copy(update=lengths if "max_length" in TASK_TYPES[self.task.type].keys else {})
        train = self.train | {"max_steps": 4, "logging_strategy": "steps", "logging_steps": 1}
        for key, largest in (("per_device_train_batch_size", 8), ("per_device_eval_batch_size", 8)):
            train[key] = min(train.get(key, largest), largest)
        if train.get("gradient_accumulation_steps", 1) > 2:
            train["gradient_accumulation_steps"] = 2
        train.pop("eval_delay", None)  # it could outlast the 4 steps, and then there is no best model
        # load_best_model_at_end wants both strategies alike. Saving as "best" goes with any evaluation.
        for kind, kept in (("eval", ("no",)), ("save", ("no", "best"))):
            if train.get(f"{kind}_strategy") not in kept:
                train |= {f"{kind}_strategy": "steps", f"{kind}_steps": 2}
        model = self.model
        if model.size is not None:
            stacks = ("num_hidden_layers", *(["num_decoder_layers"] if model.size.startswith("t5") else []))
            model = model.model_copy(update={"config": model.config | dict.fromkeys(stacks, 2)})
        if isinstance(model.tokenizer, TokenizerSection):
            fewer = model.tokenizer.model_copy(update={"rows": min(model.tokenizer.rows or 64, 64)})
            model = model.model_copy(update={"tokenizer": fewer})
        for key in ("path", "tokenizer"):
            start = getattr(model, key)
            if isinstance(start, str) and not Path(start).exists() and Path(f"{start}-smoke").is_dir():
                model = model.model_copy(update={key: f"{start}-smoke"})
        changes = {"model": model, "data": data, "task": task, "train": train, "seeds": self.seeds[:2]}
        small = self.model_copy(update=changes, deep=True)
        before, after = leaves(plain(self)), leaves(plain(small))
        changed = {key for key, value in after.items() if key not in before or before[key] != value}
        small._origins = {key: "command line" if key in changed else self._origins.get(key, "default") for key in after}
        return small


class _Representer(SafeRepresenter):
    """Writes equal lists twice, without anchors, and escapes the line breaks of Unicode, which YAML would fold."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, data: str) -> Node:
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        node: Node = self.represent_scalar("tag:yaml.org,2002:str", data, style=style)
        return node


_Representer.add_representer(str, _Representer.text)


def plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as mappings. An unset optional field of ours is left out; a null inside a verbatim section stays."""
    sections: dict[str, Any] = {}
    for key, value in recipe:
        sections[key] = _plain(value)
    return sections


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return _plain_section(value) if isinstance(value, Section) else value


def _plain_section(section: Section) -> dict[str, Any]:
    read = (
        {"type", *TASK_TYPES[section.type].keys}
        if isinstance(section, TaskSection)
        else set(type(section).model_fields)
    )
    values = {key: value for key, value in section if key in read and value is not None}
    return {key: _plain(value) for key, value in values.items()}


def leaves(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, of every value that is no mapping, or an empty one."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        below = isinstance(value, dict) and bool(value)
        found |= leaves(value, f"{prefix}{key}.") if below else {f"{prefix}{key}": value}
    return found
