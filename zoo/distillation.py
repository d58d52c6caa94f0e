"""Learning from a teacher beside the labels: from its answers, and from the states of its layers.

Answers: Hinton et al. 2015 (arXiv 1503.02531), section 2. States: layer by layer, as the differences of TinyBERT
(arXiv 1909.10351, equation 8), each in units of the teacher's own.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zoo.errors import UserError
from zoo.loading import Processor, load_model, load_processor
from zoo.sections import DistillSection, ModelSection
from zoo.tasks import Task
from zoo.tasks.base import IGNORED

# what a teacher is not asked: it has no loss
_NOT_ASKED = ("labels", "next_sentence_label", "sentence_order_label", "start_positions", "end_positions")
# heads whose native classes keep no logits while they train
WITHOUT_LOGITS = tuple(f"AutoModelFor{head}" for head in ("MaskedLM", "CausalLM", "PreTraining", "MaskedImageModeling"))
_ANSWERS = ("logits", "start_logits", "end_logits", "prediction_logits")


class Distillation:
    """A teacher, and how much of the loss is its."""

    def __init__(self, section: DistillSection, teacher: PreTrainedModel):
        self.section = section
        self.shifts = type(teacher).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        self.chooses = type(teacher).__name__.endswith("ForMultipleChoice")
        self.teacher = teacher.eval().requires_grad_(False)

    def asked(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the teacher gets of a batch."""
        wanted = {name: x for name, x in inputs.items() if name not in _NOT_ASKED}
        return wanted | ({"output_hidden_states": True} if self.section.hidden else {})

    def losses(self, outputs: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """(of labels, of rows): means, as the task's own loss is one, times what they weigh.

        outputs: the student's. inputs: of the batch, with its labels.
        """
        asked = self.asked(inputs)
        with torch.no_grad():
            self.teacher.to(next(x.device for x in inputs.values() if isinstance(x, torch.Tensor)))
            wanted = self.teacher(**asked)
        of_labels = of_rows = torch.zeros((), device=self.teacher.device)
        if self.section.logits:
            made = [name for name in _ANSWERS if outputs.get(name) is not None]
            if not made:
                kind = type(self.teacher).__name__
                raise UserError(f"distill.logits: {kind} makes none while it trains; use distill.logits: 0 and hidden")
            for name in made:
                divergence = self._divergence(*self._real(inputs, outputs[name], wanted[name]))
                if divergence.ndim == 1:
                    of_rows = of_rows + self.section.logits * divergence.mean()
                else:
                    learned = self._learned(inputs, divergence)
                    of_labels = of_labels + self.section.logits * divergence[learned].sum() / max(int(learned.sum()), 1)
        if self.section.hidden:
            of_rows = of_rows + self.section.hidden * _of_states(outputs, wanted, inputs.get("attention_mask"))
        return of_labels, of_rows

    def _divergence(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """(batch,) or (batch, length): of the teacher's probabilities from the student's, at a temperature."""
        t = self.section.temperature
        told, wanted = (F.log_softmax(x.float() / t, -1) for x in (student, teacher))
        # times t^2, so that gradients stay as large at any temperature (section 2)
        return F.kl_div(told, wanted, reduction="none", log_target=True).sum(-1) * t**2

    def _real(self, inputs: dict[str, Any], *logits: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits, those of choices that a row does not have put out of reach."""
        for one in logits:
            if self.chooses:
                # (batch, 2): which is right, and how many there are
                there = torch.arange(one.shape[1], device=one.device) < inputs["labels"][:, 1:]
                one = one.masked_fill(~there, torch.finfo(one.dtype).min / 4)
            yield one

    def _learned(self, inputs: dict[str, Any], like: torch.Tensor) -> torch.Tensor:
        """(batch, length) bool: the places that have a label, or a token."""
        labels = inputs.get("labels")
        if labels is not None and labels.shape == like.shape:
            # the logits of a place are about the token behind it
            return (F.pad(labels[:, 1:], (0, 1), value=IGNORED) if self.shifts else labels) != IGNORED
        mask = inputs.get("attention_mask")
        return torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()


def _of_states(student: Any, teacher: Any, mask: torch.Tensor | None) -> torch.Tensor:
    """The squared difference of each layer's states over the teacher's square, mean of layers and rows."""
    found = []
    for ours, wanted in zip(student["hidden_states"][1:], teacher["hidden_states"][1:], strict=True):
        real = 1.0 if mask is None or mask.shape != ours.shape[:2] else mask[..., None].to(ours.dtype)
        difference, size = ((ours - wanted).square() * real, wanted.square() * real)
        found.append(difference.sum((1, 2)) / size.sum((1, 2)).clamp(min=1e-12))
    return torch.stack(found).mean()


def load_teacher(
    section: DistillSection, student: PreTrainedModel, model: ModelSection, task: Task, processor: Processor
) -> Distillation:
    """Opens the teacher beside its student. Raises UserError where the one cannot learn from the other."""
    assert section.teacher is not None
    if task.learn is not None:
        raise UserError(f"distill: {task.name} has no answers of a head to learn from; remove the section")
    if student.config.is_encoder_decoder:
        raise UserError("distill: a model with an encoder and a decoder learns from no teacher; remove the section")
    if section.logits and task.problem_type in ("regression", "multi_label_classification"):
        raise UserError(
            f"distill.logits: {task.problem_type} has no probabilities that add up to 1; use distill.logits: 0"
        )
    if section.logits and model.implementation == "native" and task.auto_class in WITHOUT_LOGITS:
        raise UserError(
            f"distill.logits: the native head of {task.name} makes none while it trains; use distill.logits: 0 and "
            "distill.hidden"
        )
    opened = ModelSection(
        path=section.teacher, implementation=model.implementation, trust_remote_code=model.trust_remote_code
    )
    if isinstance(processor, PreTrainedTokenizerBase):
        theirs_reads: Any = load_processor(opened, "tokenizer")
        if theirs_reads.get_vocab() != processor.get_vocab():
            raise UserError(f"distill.teacher: {section.teacher} reads texts by another vocabulary than the model")
    teacher = load_model(opened, task.auto_class, whole=True)
    theirs, ours = teacher.config, student.config
    if section.logits and dict(theirs.id2label or {}) != dict(ours.id2label or {}):
        raise UserError(f"distill.teacher: {section.teacher} knows other labels than this task; or distill.logits: 0")
    if section.hidden:
        for name in ("num_hidden_layers", "hidden_size"):
            if getattr(theirs, name) != getattr(ours, name):
                raise UserError(
                    f"distill.hidden: the teacher's {name} is {getattr(theirs, name)}, the model's "
                    f"{getattr(ours, name)}; states are compared layer by layer: use distill.hidden: 0"
                )
    return Distillation(section, teacher)
