"""Exact match and F1 of answers to questions (SQuAD: Rajpurkar 2016, section 6; without an answer: Rajpurkar 2018)."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

SQUAD = ("exact_match", "f1")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """In lower case, without punctuation (of ASCII), articles and runs of spaces."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def exact(gold: str, predicted: str) -> float:
    return float(normalised(gold) == normalised(predicted))


def f1(gold: str, predicted: str) -> float:
    """Of the words, each as often as it stands there; without words on a side, 1 where neither has any."""
    wanted, given = normalised(gold).split(), normalised(predicted).split()
    if not wanted or not given:
        return float(wanted == given)
    shared = sum((Counter(wanted) & Counter(given)).values())
    return 2 * shared / (len(wanted) + len(given))


def squad(gold: Sequence[Sequence[str]], predicted: Sequence[str]) -> dict[str, float]:
    """Means over questions, from 0 to 1, of the best score that an answer has with any of its gold ones.

    gold: the answers to each question; none of them where it has no answer, which "" says.
    """

    def mean(score: Callable[[str, str], float]) -> float:
        # an answer of articles alone leaves nothing to compare with
        several = ([text for text in texts if normalised(text)] or [""] for texts in gold)
        best = [max(score(text, said) for text in texts) for texts, said in zip(several, predicted, strict=True)]
        return float(np.mean(best))

    return {"exact_match": mean(exact), "f1": mean(f1)}
