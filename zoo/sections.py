"""The sections of a recipe that are ours, and their own rules.

Nothing here imports torch or transformers.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from zoo.errors import Keys, did_you_mean
from zoo.task_types import TASK_TYPES
from zoo.variants import contradictions as of_variants

Text = Annotated[str, Field(min_length=1)]
# one variant, or several that the layers take in turn
Attentions = Annotated[
    Annotated[Text, Tag("name")] | Annotated[list[Text], Field(min_length=1), Tag("cycle")],
    Discriminator(lambda value: "cycle" if isinstance(value, list) else "name"),
]


ATTENTION_FIELDS = ("attention", "encoder_attention", "decoder_attention", "cross_attention")


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


class TokenizerSection(Section):
    """A vocabulary to be learned from train, of the kind that a family has.

    bert: WordPiece; gpt2, roberta: BPE on bytes; t5, albert: Unigram, with `byte_fallback` for what it lacks. `rows`:
    from so many of them. `options` go verbatim to the tokenizer class of transformers.
    """

    type: Literal["bert", "roberta", "gpt2", "t5", "albert"]
    vocab_size: int = Field(gt=0)
    byte_fallback: bool = False
    rows: int | None = Field(default=None, gt=0)
    options: dict[str, Any] = Field(default_factory=dict)

    def contradictions(self) -> Iterator[tuple[Keys, str]]:
        if self.byte_fallback and self.type not in ("t5", "albert"):
            why = "WordPiece has no bytes" if self.type == "bert" else "it is made of bytes already"
            yield ("byte_fallback",), f"{self.type}: {why}; use type: t5 or albert, or remove the key"


class BlockSection(Section):
    """What a model from random weights has in place of its family's own block; `docs/blocks.md`."""

    norm: Literal["layernorm", "rmsnorm"] | None = None
    norm_place: Literal["pre", "post", "sandwich"] | None = None
    feed_forward: Literal["gelu", "relu", "silu", "geglu", "reglu", "swiglu"] | None = None
    positions: Literal["learned", "sinusoidal", "rotary", "alibi", "buckets", "none"] | None = None
    rope_theta: float | None = Field(default=None, gt=0)
    num_key_value_heads: int | None = Field(default=None, ge=1)
    qk_norm: bool | None = None
    parallel: bool | None = None


class ModelSection(Section):
    """Which checkpoint, run by whom, with which attention. `config` overrides the model's own config fields.

    In the place of `path`, `size` (`zoo ls models`), or `config.model_type`, starts from random weights; texts then
    want a `tokenizer`, that of a checkpoint or one that is learned, whose vocabulary and special tokens the config
    takes. `added_tokens` begin at the mean of the
    other embeddings.
    """

    path: Text | None = None
    size: Text | None = None
    tokenizer: (
        Annotated[
            Annotated[Text, Tag("path")] | Annotated[TokenizerSection, Tag("learned")],
            Discriminator(lambda value: "path" if isinstance(value, str) else "learned"),
        ]
        | None
    ) = None
    added_tokens: list[Text] = Field(default_factory=list)
    revision: Text | None = None
    implementation: Literal["native", "official"] = "native"
    attention: Attentions | None = None
    encoder_attention: Attentions | None = None
    decoder_attention: Attentions | None = None
    cross_attention: Text | None = None
    attention_kwargs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    block: BlockSection | None = None
    attn_implementation: Text | None = None
    ragged: Literal["auto", "on", "off"] = "auto"
    trust_remote_code: bool = False
    config: dict[str, Any] = Field(default_factory=dict)

    @property
    def start(self) -> str:
        """Where the weights come from, in words."""
        return self.path or f"{self.size or self.config['model_type']} with random weights"

    @property
    def attentions(self) -> dict[str, list[str]]:
        """The variants that each field names."""
        said = {field: getattr(self, field) for field in ATTENTION_FIELDS}
        return {field: [x] if isinstance(x, str) else list(x) for field, x in said.items() if x is not None}

    def contradictions(self) -> Iterator[tuple[Keys, str]]:
        starts = [key for key in ("path", "size") if getattr(self, key) is not None]
        starts += ["config.model_type"] if "model_type" in self.config else []
        if len(starts) != 1:
            there = " and ".join(f"model.{start}" for start in starts) or "none of them"
            yield (), f"a model has one beginning, path, size or config.model_type; there is {there}"
        if self.tokenizer is not None and self.path is not None:
            yield ("tokenizer",), "a checkpoint brings its own; remove the key, or path"
        borrowed = self.tokenizer if isinstance(self.tokenizer, str) else None
        if self.revision is not None and self.path is None and borrowed is None:
            yield ("revision",), "it is that of path or of tokenizer, and there is neither"
        attentions = self.attentions
        for field, names in attentions.items():
            if self.implementation == "official" and set(names) != {"full"}:
                yield (field,), "official classes know full attention only; use implementation: native"
        yield from of_variants(attentions, self.attention_kwargs)
        if self.block is not None and self.path is not None:
            yield ("block",), "a checkpoint keeps the blocks that its weights are of; a block is for random weights"
        if self.block is not None and self.implementation == "official":
            yield ("block",), "official classes have blocks of their own; use implementation: native"
        if self.implementation == "official" and self.ragged == "on":
            yield ("ragged",), "official classes always run padded; use implementation: native, or ragged: auto"
        if self.implementation == "native" and self.trust_remote_code:
            yield ("trust_remote_code",), "native classes run no code of a checkpoint; use implementation: official"
        for name in self.config:
            if name in ("attention_kwargs", "block", *ATTENTION_FIELDS):
                yield ("config", name), f"write it as model.{name}"
        yield from revision_contradiction(self.path or borrowed or "", self.revision)


class Augmentation(Section):
    """How a training image may be changed, each time anew: up to so many degrees turned, so large a share of its side
    shifted, so much larger or smaller, and mirrored half of the time."""

    rotate: float = Field(default=0.0, ge=0, le=180)
    shift: float = Field(default=0.0, ge=0, le=0.5)
    scale: float = Field(default=0.0, ge=0, lt=1)
    flip: bool = False


class TaskSection(Section):
    """What is learned. `max_length` and `stride` count tokens, `image_size` the pixels of a side.

    `max_target_length` is that of texts that are written, `prefix` stands before each text, or each prompt. `packing`:
    training rows hold as many texts as fit, which do not see each other. `stride`: a longer text is read in windows
    that overlap by so much, and their logits are pooled; without it the text is cut. `pooling` is that of windows, or
    of the tokens of a text that becomes a vector. A question's context is always read in windows. Its answer has at
    most `max_answer_length` tokens; the `n_best_size` best are told; with `version_2_with_negative` there may be none.
    `mask_ratio`: the share of an image that is hidden, in squares of `mask_patch_size` pixels, or in the model's
    patches. `metrics`: more of them, each with its options, by the name of one of ours, a file, or a name on the hub.
    """

    type: str
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    max_length: int = Field(default=128, gt=0)
    stride: int | None = Field(default=None, ge=0)
    pooling: Literal["mean", "max", "cls"] | None = None
    temperature: float | None = Field(default=None, gt=0)
    threshold: float | None = Field(default=None, gt=0, lt=1)
    class_weights: Literal["balanced"] | None = None
    mlm_probability: float | None = Field(default=None, gt=0, lt=1)
    mean_noise_span_length: float | None = Field(default=None, ge=1)
    max_target_length: int | None = Field(default=None, gt=0)
    prefix: Text | None = None
    packing: bool | None = None
    max_answer_length: int | None = Field(default=None, gt=0)
    n_best_size: int | None = Field(default=None, gt=0)
    version_2_with_negative: bool | None = None
    image_size: int | None = Field(default=None, gt=0)
    mask_ratio: float | None = Field(default=None, gt=0, lt=1)
    mask_patch_size: int | None = Field(default=None, gt=0)
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
        if self.pooling is not None and "stride" in TASK_TYPES[self.type].keys:
            if self.stride is None:
                yield ("pooling",), "there is nothing to pool without windows; set stride"
            if self.pooling == "cls":
                yield ("pooling",), "windows are pooled by mean or max"


def revision_contradiction(path: str, revision: str | None) -> Iterator[tuple[Keys, str]]:
    if revision is not None and path.startswith("pypi://"):
        yield ("revision",), "the version is in the path (pypi://name@version/...); remove revision"


class Freeze(Section):
    """What stays as it is: the embeddings, and so many layers from the input, of each stack."""

    embeddings: bool = False
    layers: int = Field(default=0, ge=0)


class FinetuneSection(Section):
    """What of a model learns, how fast and from when on.

    `layerwise_decay`: `train.learning_rate` is the head's, each layer's so many times that of the one above it, and the
    embeddings' the lowest. `gradual_unfreezing`: the head is trained first, one more layer from the top with each
    epoch, or after so many steps each. `loraplus_lr_ratio`: a LoRA's second matrix learns so many times as fast as the
    first (LoRA+, arXiv 2402.12354).
    """

    layerwise_decay: float | None = Field(default=None, gt=0, le=1)
    freeze: Freeze = Field(default_factory=Freeze)
    gradual_unfreezing: (
        Annotated[
            Annotated[Literal["epoch"], Tag("word")] | Annotated[int, Field(gt=0), Tag("steps")],
            Discriminator(lambda value: "word" if isinstance(value, str) else "steps"),
        ]
        | None
    ) = None
    loraplus_lr_ratio: float | None = Field(default=None, ge=1)


class DistillSection(Section):
    """A finished model to learn from, and what its answers weigh in the loss.

    `labels`, `logits`, `hidden`: the weights of the task's own loss, of the teacher's probabilities at `temperature`,
    and of its layers' states.
    """

    teacher: Text | None = None
    labels: float = Field(default=1.0, ge=0)
    logits: float = Field(default=1.0, ge=0)
    hidden: float = Field(default=0.0, ge=0)
    temperature: float = Field(default=2.0, gt=0)

    def contradictions(self) -> Iterator[tuple[Keys, str]]:
        said = {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
        if self.teacher is None and said:
            yield ("teacher",), "required with the other keys: a directory that zoo train has made, or a hub id"
        if self.teacher is not None and not (self.logits or self.hidden):
            yield ("teacher",), "nothing is learned from it where logits and hidden are 0"


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
