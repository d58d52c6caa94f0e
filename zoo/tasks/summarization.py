"""A shorter text for a text, measured by ROUGE (Lin 2004)."""

from collections.abc import Sequence

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from zoo.task_types import TASK_TYPES
from zoo.tasks.base import Task
from zoo.tasks.text_to_text import text_to_text

ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge(gold: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """Mean F1 of the words, pairs of words and longest common subsequences that the texts share, stemmed."""
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    scores = [scorer.score(one, other) for one, other in zip(gold, predicted, strict=True)]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in ROUGE}


SUMMARIZATION = Task(
    name="summarization",
    auto_class="AutoModelForSeq2SeqLM",
    roles=TASK_TYPES["summarization"].roles,
    **text_to_text(rouge, ROUGE),
)
