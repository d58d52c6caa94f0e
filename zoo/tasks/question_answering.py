"""Extractive question answering: which span of a context answers a question, if any does (BERT, arXiv 1810.04805, 4.2
and 4.3). A long context is read in windows that overlap; the question stands whole before each."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import EvalPrediction, Pipeline, PreTrainedTokenizerBase

from zoo.errors import RunError, UserError
from zoo.labels import LABEL_KINDS
from zoo.sections import TaskSection
from zoo.task_types import TASK_TYPES
from zoo.tasks.answer_spans import KEPT, OUTSIDE, best_answers, encode_rows, no_answer, room, windows
from zoo.tasks.base import Collate, Task, ask_text, check_length, check_padding
from zoo.tasks.squad import SQUAD, squad

AT_ONCE = 16  # windows of one context that `zoo predict` reads together


def _counts(encoded: Dataset, texts: int, section: TaskSection) -> str:
    answered, held = set(), set()
    columns = ("row", "answers", "offsets", "start_positions")
    for row, answers, offsets, start in zip(*(encoded[name] for name in columns), strict=True):
        answered |= {row} if answers and answers["text"] else set()
        held |= {row} if offsets[start] != OUTSIDE else set()
    words = f"{texts:,} questions, {texts - len(answered):,} of them without an answer; {len(encoded):,} windows of "
    words += f"{section.max_length} tokens; {sum(encoded['unknown']):,} of {sum(encoded['tokens']):,} tokens unknown"
    lost = len(answered - held)
    return f"{words}; {lost:,} with no answer that a window holds whole" if lost else words


def _collate(tokenizer: PreTrainedTokenizerBase, section: TaskSection) -> Collate:
    check_padding(tokenizer)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        read = [{name: value for name, value in row.items() if name not in KEPT} for row in rows]
        # behind the tokens, whatever the tokenizer likes: positions and offsets count from the first
        return dict(tokenizer.pad(read, padding_side="right", return_tensors="pt"))

    return collate


def _reduce(logits: tuple, labels: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """(start logits, end logits): some models say more."""
    return logits[0], logits[1]


def _pool(section: TaskSection, prediction: EvalPrediction, rows: Any) -> EvalPrediction:
    """The answer to each question, and the texts of its gold ones, from the windows of its context."""
    logits: Any = prediction.predictions
    answers, gold, place = [], [], 0
    for _, group in groupby(rows.select_columns([*KEPT, "row"]), key=lambda window: window["row"]):
        group_of, read = list(group), []
        for window in group_of:
            offsets = np.array(window["offsets"])
            start, end = (side[place, : len(offsets)].astype(np.float32) for side in logits)
            read.append((start, end, offsets, window["none"]))
            place += 1
        answers.append(best_answers(section, group_of[0]["context"], read))
        gold.append(group_of[0]["answers"]["text"])
    return EvalPrediction(answers, gold)  # type: ignore[arg-type] # of rows, not of tensors


def _metrics(section: TaskSection, labels: Sequence[str], processor: Any):
    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        answers: Any = prediction.predictions
        gold: Any = prediction.label_ids
        return squad(gold, [answer["predicted"] for answer in answers])

    return metrics


def _records(section: TaskSection, labels: Sequence[str], processor: Any):
    def records(prediction: EvalPrediction) -> Iterator[dict[str, Any]]:
        for gold, answer in zip(prediction.label_ids, prediction.predictions, strict=True):
            yield {"gold": gold, **answer}

    return records


class Answers(Pipeline):
    """Answers a question from all windows of its context."""

    _load_tokenizer = True  # type: ignore[assignment]
    tokenizer: Any
    model: Any

    def _sanitize_parameters(self, section=None, **options):
        return {"section": section}, {}, {"section": section}

    def preprocess(self, input_, **options):
        return {"context": input_["context"], "read": windows(self.tokenizer, options["section"], **input_)}

    def _forward(self, input_tensors, **options):
        context, read = input_tensors["context"], input_tensors["read"]
        answers = []
        for part in (read[n : n + AT_ONCE] for n in range(0, len(read), AT_ONCE)):
            tokens = [{name: value for name, value in window.items() if name != "offsets"} for window in part]
            batch = self.tokenizer.pad(tokens, padding_side="right", return_tensors="pt").to(self.device)
            output = self.model(**batch)
            for window, *logits in zip(part, output.start_logits, output.end_logits, strict=True):
                start, end = (side[: len(window["offsets"])].float().cpu().numpy() for side in logits)
                none = no_answer(self.tokenizer, window["input_ids"])
                answers.append((start, end, np.array(window["offsets"]), none))
        return {"context": context, "answers": answers}

    def postprocess(self, model_outputs, **options):
        if not all(np.isfinite(side).all() for window in model_outputs["answers"] for side in window[:2]):
            raise RunError("predict: the model's answer is not finite: its weights or its config are damaged")
        return best_answers(options["section"], model_outputs["context"], model_outputs["answers"])


def _ask(row: dict[str, Any], number: int, tokenizer: PreTrainedTokenizerBase) -> Any:
    if "context" not in row:
        raise UserError(f"predict: question {number} stands alone; give a --file with the columns question and context")
    asked = ask_text(row, number, tokenizer)
    try:
        # what is saved with the model as the longest that it reads
        room(tokenizer, tokenizer.model_max_length, row["question"])
    except UserError as error:
        raise UserError(f"predict: question {number}: {error}") from error
    return asked


USAGE = """from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForQuestionAnswering.from_pretrained("."{trusted})
# question and context, which fit into one window; zoo predict reads longer ones
inputs = tokenizer("What rose?", "Wheat shipments rose in May.", return_tensors="pt")
output = model(**inputs)
spans = (output.start_logits.softmax(-1).T * output.end_logits.softmax(-1)).triu()
start, end = divmod(int(spans.argmax()), len(spans))
print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))"""

QUESTION_ANSWERING = Task(
    name="question-answering",
    auto_class="AutoModelForQuestionAnswering",
    roles=TASK_TYPES["question-answering"].roles,
    labels=LABEL_KINDS["answers"],
    encode=encode_rows,
    counts=_counts,
    check=check_length,
    collate=_collate,
    metrics=_metrics,
    metric_names=SQUAD,
    records=_records,
    pool=_pool,
    reduce=_reduce,
    asked=("question", "context"),
    ask=_ask,
    pipeline=lambda section: (Answers, {"section": section, "batch_size": 1}),
    answer=lambda section, answer: answer,
    usage=USAGE,
)
