"""Rows made of other rows (`data.derive`): what a corpus was annotated for, read as another task's data.

Nothing here imports torch or transformers. To add one: a function of a row to rows, and its line in DERIVED.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Derived:
    """Rows of each row that has `columns`. The summary is what a card says of them."""

    summary: str
    columns: tuple[str, ...]
    rows: Callable[[Row], Iterator[dict[str, Any]]]


ASPECTS = {
    "challenge": "What challenge does the paper address?",
    "approach": "What approach does it take?",
    "outcome": "What is the outcome?",
}


def _aclsum_questions(row: Row) -> Iterator[dict[str, Any]]:
    """Question, context and answers in SQuAD's form. Of introductions, which are long, there is none."""
    for part in ("abstract", "conclusion"):
        sentences = row["sentences"][part]
        starts = [sum(len(sentence) + 1 for sentence in sentences[:number]) for number in range(len(sentences))]
        for aspect, question in ASPECTS.items():
            marks = row["highlights"][aspect][part]
            found = [(text, start) for text, start, mark in zip(sentences, starts, marks, strict=True) if mark]
            answers = {"text": [text for text, _ in found], "answer_start": [start for _, start in found]}
            yield {"question": question, "context": " ".join(sentences), "answers": answers}


DERIVED = {
    "aclsum-questions": Derived(
        "Three questions to each abstract and each conclusion of ACLSum, after challenge, approach and outcome. The "
        "answers are the sentences that annotators have marked for a summary of that aspect, each by itself; where "
        "they have marked none, there is no answer. Nobody has asked, or answered, these questions.",
        ("sentences", "highlights"),
        _aclsum_questions,
    ),
}
