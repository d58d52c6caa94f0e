"""Tasks: what a text is for a model, how rows are batched, which head learns them, and how it is measured.

To add one: a `Task` in a file of this folder and its line in TASKS.
"""

from zoo.tasks.base import Task
from zoo.tasks.classification import TEXT_CLASSIFICATION

TASKS: dict[str, Task] = {task.name: task for task in (TEXT_CLASSIFICATION,)}
