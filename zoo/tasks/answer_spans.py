"""Windows of a context, each behind the whole question; what a model learns of them; the best spans over all."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import softmax
from transformers import PreTrainedTokenizerBase

from zoo.errors import UserError
from zoo.sections import TaskSection
from zoo.task_types import DEFAULT_ANSWER_LENGTH, DEFAULT_N_BEST
from zoo.tasks.base import Rows

OUTSIDE = [-1, -1]  # the offsets of a token that is not of the context
# columns of encoded rows that metrics read, and no batch holds
KEPT = ("offsets", "none", "context", "answers")


def room(tokenizer: PreTrainedTokenizerBase, max_length: int, question: str) -> int:
    """Tokens that a window has for its context. Raises UserError where the question leaves none."""
    tokens = len(tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"])
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if tokens + special >= max_length:
        raise UserError(
            f"{question[:60]!r} has {tokens} tokens and {special} are special, which leaves no room for a context in "
            f"{max_length} (task.max_length); shorten it, or give more"
        )
    return max_length - tokens - special


def windows(tokenizer: PreTrainedTokenizerBase, section: TaskSection, question: str, context: str) -> list[Rows]:
    """What a model reads of one context, and `offsets`: of each token, where in the context it begins and ends.

    Windows overlap by `stride` tokens, a third of `max_length` unless set, and at most by half of what a long question
    leaves them. Raises UserError.
    """
    stride = section.max_length // 3 if section.stride is None else section.stride
    encoding = tokenizer(
        question, context, truncation="only_second", max_length=section.max_length, return_offsets_mapping=True,
        stride=min(stride, room(tokenizer, section.max_length, question) // 2), return_overflowing_tokens=True,
    )  # fmt: skip
    names = [name for name in encoding if name not in ("offset_mapping", "overflow_to_sample_mapping")]
    found = []
    for number, pairs in enumerate(encoding["offset_mapping"]):
        of = encoding.sequence_ids(number)
        # a token that stands for no letter can neither begin nor end an answer
        letters = [one == 1 and begin < end for one, (begin, end) in zip(of, pairs, strict=True)]
        offsets = [list(pair) if inside else OUTSIDE for inside, pair in zip(letters, pairs, strict=True)]
        found.append({name: encoding[name][number] for name in names} | {"offsets": offsets})
    return found


def no_answer(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int]) -> int:
    """The position that stands for "no answer here": the class token's, or the first."""
    return list(input_ids).index(tokenizer.cls_token_id) if tokenizer.cls_token_id in input_ids else 0


def positions(offsets: Sequence[Sequence[int]], answers: dict[str, list]) -> tuple[int, int] | None:
    """First and last token of the first answer that a window holds whole; None where it holds none."""
    inside = [(token, begin, end) for token, (begin, end) in enumerate(offsets) if end > 0]
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        begin, end = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
        if inside and inside[0][1] <= begin and end <= inside[-1][2]:
            first = next(token for token, _, stop in inside if stop > begin)
            last = next(token for token, at, _ in reversed(inside) if at < end)
            if first <= last:
                return first, last
    return None


def encode_rows(tokenizer: PreTrainedTokenizerBase, section: TaskSection):
    """As `Task.encode` has it: a row for each window, with the columns of KEPT beside what a model reads."""
    if not tokenizer.is_fast:
        raise UserError("model: its tokenizer does not say where its tokens stand in a text; use one that is fast")
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if section.max_length <= special + (section.stride or 0):
        raise UserError(
            f"task.max_length: {section.max_length}, but {special} tokens are special and {section.stride or 0} "
            "overlap (task.stride); give more"
        )

    def encode(rows: Rows) -> Rows:
        made = []
        for row, question, context, answers in zip(
            *(rows[name] for name in ("row", "question", "context", "answers")), strict=True
        ):
            if not answers["text"] and not section.version_2_with_negative:
                raise UserError(
                    f"data: row {row}: {question[:60]!r} has no answer; set task.version_2_with_negative: true to "
                    "learn which questions have none, or remove the row"
                )
            try:
                read = windows(tokenizer, section, question, context)
            except UserError as error:
                raise UserError(f"data: row {row}: the question {error}") from error
            for number, window in enumerate(read):
                none = no_answer(tokenizer, window["input_ids"])
                first, last = positions(window["offsets"], answers) or (none, none)
                # text and answers of a row stand with its first window alone
                first_one = {"context": context, "answers": answers}
                kept = {"none": none, **(first_one if number == 0 else dict.fromkeys(first_one))}
                unknown = window["input_ids"].count(tokenizer.unk_token_id)
                counted = {"unknown": unknown, "tokens": len(window["input_ids"])}
                made.append({**window, **kept, **counted, "start_positions": first, "end_positions": last, "row": row})
        return {name: [window[name] for window in made] for name in made[0]}

    return encode


def candidates(
    start: np.ndarray, end: np.ndarray, offsets: np.ndarray, count: int, longest: int
) -> list[tuple[float, int, int]]:
    """The best spans of a window as (score, first letter, letter after the last), the best first.

    Of all spans of up to `longest` tokens of the context; a span scores its start's and its end's logit. start, end:
    (tokens); offsets: (tokens, 2).
    """
    inside = offsets[:, 1] > 0
    starts, ends = np.where(inside, start, -np.inf), np.where(inside, end, -np.inf)
    # of each start, the ends from its own token on: (tokens, longest)
    ahead = np.lib.stride_tricks.sliding_window_view(np.append(ends, np.full(longest - 1, -np.inf)), longest)
    scores = (starts[:, None] + ahead).ravel()
    best = np.argpartition(-scores, min(count, len(scores) - 1))[: count + 1]
    found = []
    for place in best[np.argsort(-scores[best], kind="stable")][:count]:
        first, length = divmod(int(place), longest)
        if scores[place] > -np.inf:
            found.append((float(scores[place]), int(offsets[first, 0]), int(offsets[first + length, 1])))
    return found


def best_answers(
    section: TaskSection, context: str, read: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, int]]
) -> dict[str, Any]:
    """The answer, as a record and a prediction have it, from (start logits, end logits, offsets, the position that
    stands for no answer) of each window.

    `n_best` has the best spans of all windows; scores are a softmax over these. With `version_2_with_negative` one of
    them is "": it scores what the window that is least sure of it says.
    """
    count, longest = section.n_best_size or DEFAULT_N_BEST, section.max_answer_length or DEFAULT_ANSWER_LENGTH
    spans: dict[tuple[int, int], float] = {}
    for start, end, offsets, _ in read:
        for score, begin, stop in candidates(start, end, offsets, count, longest):
            text = context[begin:stop]
            if text.strip():
                # some tokenizers count the space before a word to it
                span = (begin + len(text) - len(text.lstrip()), begin + len(text.rstrip()))
                spans[span] = max(score, spans.get(span, score))
    found: list[tuple[float, Any, Any]] = [(score, *span) for span, score in spans.items()]
    if section.version_2_with_negative or not found:
        found.append((float(min(start[none] + end[none] for start, end, _, none in read)), None, None))
    found = sorted(found, key=lambda one: -one[0])[:count]
    probabilities = softmax([score for score, _, _ in found]).tolist()
    best = [
        {"text": "" if begin is None else context[begin:stop], "start": begin, "end": stop, "score": probability}
        for (_, begin, stop), probability in zip(found, probabilities, strict=True)
    ]
    return {"predicted": best[0]["text"], **{key: best[0][key] for key in ("start", "end", "score")}, "n_best": best}
