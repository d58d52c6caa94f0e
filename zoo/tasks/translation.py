"""A text in another language, measured by BLEU (Papineni et al. 2002) and chrF (Popovic 2015) as sacrebleu has them."""

from collections.abc import Sequence

import numpy as np
from sacrebleu import corpus_bleu, corpus_chrf

from zoo.task_types import TASK_TYPES
from zoo.tasks.base import Task
from zoo.tasks.text_to_text import text_to_text

TRANSLATED = ("bleu", "chrf", "exact_match")


def translated(gold: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """BLEU and chrF of the whole, from 0 to 100; the share of texts that are the gold ones to the letter."""
    return {
        "bleu": corpus_bleu(predicted, [gold]).score,
        "chrf": corpus_chrf(predicted, [gold]).score,
        "exact_match": float(np.mean([one == other for one, other in zip(gold, predicted, strict=True)])),
    }


TRANSLATION = Task(
    name="translation",
    auto_class="AutoModelForSeq2SeqLM",
    roles=TASK_TYPES["translation"].roles,
    **text_to_text(translated, TRANSLATED),
)
