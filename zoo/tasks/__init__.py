"""Tasks: what a row is for a model, how rows are batched, which head learns them, and how it is measured.

To add one: a `Task` in a file of this folder, its line in TASKS, and its name in `zoo/task_types.py`.
"""

from zoo.sections import TaskSection
from zoo.tasks.base import COUNTED, LOWER_IS_BETTER, Task
from zoo.tasks.fill_mask import FILL_MASK
from zoo.tasks.image_classification import IMAGE_CLASSIFICATION
from zoo.tasks.instruction_tuning import INSTRUCTION_TUNING
from zoo.tasks.masked_images import MASKED_IMAGE_MODELING
from zoo.tasks.multiple_choice import MULTIPLE_CHOICE
from zoo.tasks.question_answering import QUESTION_ANSWERING
from zoo.tasks.sentence_pairs import NEXT_SENTENCE_PREDICTION, SENTENCE_ORDER_PREDICTION
from zoo.tasks.sentence_similarity import SENTENCE_SIMILARITY
from zoo.tasks.span_corruption import SPAN_CORRUPTION
from zoo.tasks.summarization import SUMMARIZATION
from zoo.tasks.text_classification import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from zoo.tasks.text_generation import TEXT_GENERATION
from zoo.tasks.token_classification import TOKEN_CLASSIFICATION
from zoo.tasks.translation import TRANSLATION

__all__ = ["COUNTED", "LOWER_IS_BETTER", "TASKS", "Task", "task_of"]

# type -> its task, or its tasks by problem_type, the usual one first
TASKS: dict[str, list[Task]] = {
    "text-classification": [SINGLE_LABEL, MULTI_LABEL, REGRESSION],
    "multiple-choice": [MULTIPLE_CHOICE],
    "token-classification": [TOKEN_CLASSIFICATION],
    "fill-mask": [FILL_MASK],
    "next-sentence-prediction": [NEXT_SENTENCE_PREDICTION],
    "sentence-order-prediction": [SENTENCE_ORDER_PREDICTION],
    "text-generation": [TEXT_GENERATION],
    "instruction-tuning": [INSTRUCTION_TUNING],
    "span-corruption": [SPAN_CORRUPTION],
    "summarization": [SUMMARIZATION],
    "translation": [TRANSLATION],
    "sentence-similarity": [SENTENCE_SIMILARITY],
    "question-answering": [QUESTION_ANSWERING],
    "image-classification": [IMAGE_CLASSIFICATION],
    "masked-image-modeling": [MASKED_IMAGE_MODELING],
}


def task_of(section: TaskSection) -> Task:
    """The task that a recipe names."""
    tasks = TASKS[section.type]
    return next((task for task in tasks if task.problem_type == section.problem_type), tasks[0])
