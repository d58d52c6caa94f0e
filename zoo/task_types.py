"""What can be learned: the tasks that a recipe may name, with the columns and keys that each reads.

Nothing here imports torch or transformers: `zoo ls` and `zoo validate` read it.
"""

from dataclasses import dataclass
from typing import Literal

DEFAULT_THRESHOLD = 0.5
DEFAULT_MLM_PROBABILITY = 0.15
DEFAULT_TARGET_LENGTH = 64
DEFAULT_MASK_RATIO = 0.6
DEFAULT_TEMPERATURE = 0.05
DEFAULT_ANSWER_LENGTH = 30
DEFAULT_N_BEST = 20
Role = Literal[
    "text", "text_pair", "choices", "label", "tokens", "tags", "image", "summary", "translation", "negative",
    "question", "context", "answers", "messages", "prompt", "completion",
]  # fmt: skip


@dataclass(frozen=True)
class TaskType:
    """What is learned, the columns it reads, and the keys of the section `task` that it reads.

    generates: its answers are written by `generate`, so that the section of that name is read. smoke_length: what
    `--smoke` cuts `max_length` to. beside: columns that a recipe may name although nothing learns them; rows are held
    out in proportion to a label.
    """

    summary: str
    roles: tuple[str, ...]
    keys: tuple[str, ...]
    generates: bool = False
    smoke_length: int = 32
    beside: tuple[str, ...] = ()


TASK_TYPES = {
    "text-classification": TaskType(
        "One label, several, or a number for a text or a pair of texts (problem_type).",
        ("text", "text_pair", "label"),
        ("max_length", "metrics", "problem_type", "stride", "pooling", "threshold", "class_weights"),
    ),
    "multiple-choice": TaskType(
        "The right one of several choices for a text.",
        ("text", "choices", "label"),
        ("max_length",),
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
        "Causal language modelling: the next token of a text.", ("text",), ("max_length", "packing"), generates=True
    ),
    "instruction-tuning": TaskType(
        "Chats: the answers of messages, or a completion for a prompt, by a causal model.",
        ("messages", "prompt", "completion"),
        ("max_length", "prefix", "packing"),
        generates=True,
        # answers stand behind what is asked
        smoke_length=128,
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
    "translation": TaskType(
        "A text in another language, by an encoder and a decoder.",
        ("text", "translation"),
        ("max_length", "max_target_length", "prefix", "metrics"),
        generates=True,
    ),
    "sentence-similarity": TaskType(
        "A vector for a text, near those of texts that belong to it.",
        ("text", "text_pair", "negative"),
        ("max_length", "pooling", "temperature"),
    ),
    "question-answering": TaskType(
        "The span of a context that answers a question, or that there is none.",
        ("question", "context", "answers"),
        ("max_length", "stride", "max_answer_length", "n_best_size", "version_2_with_negative"),
        smoke_length=128,
    ),
    "image-classification": TaskType(
        "One label for an image.", ("image", "label"), ("metrics", "image_size", "augmentation", "class_weights")
    ),
    "masked-image-modeling": TaskType(
        "SimMIM's pretraining: the pixels of hidden parts of an image.",
        ("image",),
        ("image_size", "augmentation", "mask_ratio", "mask_patch_size"),
        beside=("label",),
    ),
}
