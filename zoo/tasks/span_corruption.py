"""T5's pretraining: spans are hidden, each behind a token of its own, and written (arXiv 1910.10683, section 3.1.4)."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import count, takewhile
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from zoo.errors import UserError
from zoo.sections import TaskSection
from zoo.task_types import TASK_TYPES
from zoo.tasks.base import IGNORED, Collate, Rows, Task, ask_text, check_length, check_padding, pieces
from zoo.tasks.fill_mask import likeliest, mask_probability, token_metrics
from zoo.tasks.text_to_text import Writer

DEFAULT_SPAN_LENGTH = 3.0


def sentinels(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of <extra_id_0>, <extra_id_1> and so on, as far as the tokenizer knows them."""
    known = tokenizer.get_vocab()
    return [known[name] for name in takewhile(known.__contains__, (f"<extra_id_{n}>" for n in count()))]


def hidden_counts(section: TaskSection, length: int) -> tuple[int, int]:
    """(hidden tokens, spans of them) of so many tokens, at least 2: one is hidden at least, and one is not."""
    hidden = min(max(round(length * mask_probability(section)), 1), length - 1)
    spans = max(round(hidden / (section.mean_noise_span_length or DEFAULT_SPAN_LENGTH)), 1)
    return hidden, min(spans, length - hidden)


def piece_length(section: TaskSection, special: int) -> int:
    """How many tokens become an input of at most `max_length`, `special` ones of a tokenizer's own among them: what is
    hidden leaves room for more of the text."""

    def of_input(length: int) -> int:
        hidden, spans = hidden_counts(section, length)
        return length - hidden + spans + special

    if (least := of_input(2)) > section.max_length:
        raise UserError(f"task.max_length: {section.max_length}; two tokens, of which one is hidden, take {least}")
    beyond = next(2**power for power in count(2) if of_input(2**power) > section.max_length)
    return bisect_right(range(beyond), section.max_length, lo=2, key=of_input) - 1


def _split(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """`total` in so many random parts of at least 1, each way alike likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def corrupted(
    ids: Sequence[int], section: TaskSection, sentinel_ids: Sequence[int], draw: Sequence[int]
) -> tuple[list[int], list[int]]:
    """(what is left, with a sentinel for each hidden span; each sentinel and its span). `draw` decides everything.

    It begins with what is left, and ends with a hidden span.
    """
    rng = np.random.default_rng(draw)
    hidden, spans = hidden_counts(section, len(ids))
    lengths = np.stack([_split(len(ids) - hidden, spans, rng), _split(hidden, spans, rng)], 1).flatten()
    pieces = np.split(np.asarray(ids), np.cumsum(lengths)[:-1])
    inputs: list[int] = []
    targets: list[int] = []
    for kept, lost, sentinel in zip(pieces[::2], pieces[1::2], sentinel_ids, strict=False):
        inputs += [*kept.tolist(), sentinel]
        targets += [sentinel, *lost.tolist()]
    return inputs, targets


def _encode(tokenizer: PreTrainedTokenizerBase, section: TaskSection):
    """Each text whole, in pieces; a last one of a single token, of which nothing could be hidden, is left out."""
    length = piece_length(section, tokenizer.num_special_tokens_to_add())

    def encode(rows: Rows) -> Rows:
        # verbose: of a text that is longer than the model's inputs, which it may be here
        texts = tokenizer(rows["text"], add_special_tokens=False, verbose=False)["input_ids"]
        return pieces(tokenizer, rows["row"], texts, length)

    return encode


def _counts(encoded: Dataset, texts: int, section: TaskSection) -> str:
    if len(encoded) == 0:
        raise UserError("data: no text has two tokens, so that one of them could be hidden")
    length = max(encoded["tokens"])
    hidden, spans = hidden_counts(section, length)
    words = f"{len(encoded):,} pieces of at most {length} tokens, {hidden} of them hidden in {spans} spans"
    return f"{texts:,} texts; {words}; {sum(encoded['unknown']):,} of {sum(encoded['tokens']):,} tokens unknown"


def _collate(tokenizer: PreTrainedTokenizerBase, section: TaskSection) -> Collate:
    check_padding(tokenizer)
    length = piece_length(section, tokenizer.num_special_tokens_to_add())
    needed, there = hidden_counts(section, length)[1], sentinels(tokenizer)
    if len(there) < needed:
        raise UserError(
            f"model: its tokenizer has {len(there)} of the {needed} tokens that stand for hidden spans, <extra_id_0> "
            f"to <extra_id_{needed - 1}>; list them under model.added_tokens"
        )
    pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    # what stands around a text: nothing and its end for T5's own
    around = tokenizer("")["input_ids"]
    begin = [one for one in around if one in (tokenizer.cls_token_id, tokenizer.bos_token_id)]
    end = around[len(begin) :]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        prepared = []
        for row in rows:
            ids, labels = corrupted(row["input_ids"], section, there, row["draw"])
            ids, labels = [*begin, *ids, *end], [*labels, *end]
            kept = {"row": row["row"]} if "row" in row else {}
            prepared.append({**kept, "input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
        return dict(pad(prepared))

    return collate


class Spans(Writer):
    """Writes what the sentinels of a text stand for, each behind its own."""

    def postprocess(self, model_outputs, **options):
        ends = {self.tokenizer.pad_token_id, self.tokenizer.sep_token_id, self.tokenizer.eos_token_id}
        return self.tokenizer.decode([one for one in model_outputs["ids"][0].tolist() if one not in ends])


def _ask(row: dict[str, Any], number: int, tokenizer: PreTrainedTokenizerBase) -> str:
    text = ask_text(row, number, tokenizer)
    if "<extra_id_0>" not in text:
        raise UserError(f"predict: text {number} has no <extra_id_0> to say what it stands for: {text[:60]!r}")
    return text


USAGE = """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForSeq2SeqLM.from_pretrained("."{trusted})
written = model.generate(**tokenizer("Wheat <extra_id_0> rose", return_tensors="pt"))
print(tokenizer.decode(written[0]))"""

SPAN_CORRUPTION = Task(
    name="span-corruption",
    auto_class="AutoModelForSeq2SeqLM",
    roles=TASK_TYPES["span-corruption"].roles,
    labels=None,
    encode=_encode,
    counts=_counts,
    check=check_length,
    collate=_collate,
    metrics=token_metrics,
    metric_names=("accuracy", "perplexity"),
    reduce=likeliest,
    draws="all",
    ask=_ask,
    pipeline=lambda section: (Spans, {}),
    answer=lambda section, answer: {"predicted": answer},
    usage=USAGE,
    tag="text2text-generation",
)
