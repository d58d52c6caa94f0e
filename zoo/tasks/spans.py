"""Spans of tagged tokens, and how many were found: what seqeval and conlleval count; IOB1, IOB2 and IOBES alike.

seqeval itself is published as source that older versions of pip cannot build; the tests compare with it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

Span = tuple[str, int, int]  # kind, first token, token after the last


def spans(tags: Sequence[str]) -> list[Span]:
    """A span begins at B or S, after O, E or S, and where the kind changes; a tag without prefix is taken as inside."""
    found: list[Span] = []
    begin, before = 0, ("O", "")
    for position, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-") if "-" in tag else ("O" if tag == "O" else "I", "", tag)
        new = prefix in ("B", "S") or before[0] in ("O", "E", "S") or kind != before[1]
        if before[0] != "O" and (prefix == "O" or new):
            found.append((before[1], begin, position))
        if prefix != "O" and new:
            begin = position
        before = (prefix, kind)
    return found


def scores(gold: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support of each kind of span, and of all together under ""; 0 where there are none."""
    there, said, right = Counter[str](), Counter[str](), Counter[str]()
    for wanted, given in zip(gold, predicted, strict=True):
        first, second = set(spans(wanted)), set(spans(given))
        for counted, held in ((there, first), (said, second), (right, first & second)):
            counted.update(kind for kind, _, _ in held)
            counted[""] += len(held)
    return {kind: _scored(right[kind], said[kind], there[kind]) for kind in sorted({"", *there, *said})}


def _scored(right: int, said: int, there: int) -> dict[str, float]:
    precision, recall = right / said if said else 0.0, right / there if there else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "support": there}
