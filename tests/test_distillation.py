"""What a student learns of its teacher: the losses, however a step is divided, and what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.models.tiny import make_inputs, make_pair, native_class
from tests.tiny_run import make_recipe
from zoo.distillation import Distillation, load_teacher
from zoo.errors import UserError
from zoo.loading import load_model
from zoo.sections import DistillSection, ModelSection
from zoo.tasks import task_of
from zoo.train import run


@pytest.fixture(scope="module")
def teacher(tiny_bert, r8, tmp_path_factory):
    """A finished run of ten steps."""
    directory = tmp_path_factory.mktemp("teacher") / "run"
    run(make_recipe(tiny_bert, r8, {"max_steps": 10, "eval_steps": 10, "save_steps": 10}), directory)
    return directory


def opened(directory):
    return load_model(ModelSection(path=str(directory)), "AutoModelForSequenceClassification", whole=True).eval()


def batch(rows=4, length=9):
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(length)[None] < torch.tensor([9, 4, 7, 2])[:rows, None]).long()
    ids = torch.randint(5, 60, (rows, length), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 1])[:rows]}


def other(model):
    """A student that differs."""
    student = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return student


def test_the_losses_are_their_formulas(teacher):
    model = opened(teacher)
    student, inputs = other(model), batch()
    distillation = Distillation(DistillSection(teacher="x", logits=2.0, hidden=3.0, temperature=4.0), model)
    asked = distillation.asked(inputs)
    assert set(asked) == {"input_ids", "attention_mask", "output_hidden_states"}
    outputs, wanted = student(**asked), model(**asked)
    of_labels, of_rows = (x.detach() for x in distillation.losses(outputs, inputs))
    outputs = student(**asked)
    p = torch.softmax(wanted.logits / 4, -1)
    divergence = (p * (p.log() - torch.log_softmax(outputs.logits / 4, -1))).sum(-1).mean() * 16
    states = []
    for ours, theirs in zip(outputs.hidden_states[1:], wanted.hidden_states[1:], strict=True):
        for row, count in enumerate(inputs["attention_mask"].sum(1)):
            a, b = ours[row, :count], theirs[row, :count]
            states.append((a - b).square().sum() / b.square().sum())
    expected = float(2 * divergence.detach() + 3 * torch.stack(states).detach().mean())
    assert of_labels == 0 and float(of_rows) == pytest.approx(expected, rel=1e-5)
    assert distillation.losses(wanted, inputs)[1] < 1e-6, "of a student that is its teacher"


def test_tokens_that_have_no_label_teach_nothing(teacher):
    model = opened(teacher)
    distillation = Distillation(DistillSection(teacher="x"), model)
    student, told = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    labels = torch.tensor([[3, -100, 2, -100, -100], [1, -100, -100, -100, -100]])
    divergence = distillation._divergence(student, told)
    learned = distillation._learned({"labels": labels}, divergence)
    assert torch.equal(learned, labels != -100)
    expected = F.kl_div(
        torch.log_softmax(student[learned] / 2, -1), torch.softmax(told[learned] / 2, -1), reduction="batchmean"
    )
    assert divergence[learned].mean() == pytest.approx(float(4 * expected), rel=1e-5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    assert torch.equal(distillation._learned({"attention_mask": mask}, divergence), mask.bool())


def test_the_next_token_is_what_a_causal_teacher_tells(tmp_path):
    _, model = make_pair("gpt2", "GPT2LMHeadModel", tmp_path)
    labels = torch.tensor([[-100, -100, 5, 2, -100]])
    learned = Distillation(DistillSection(teacher="x"), model)._learned({"labels": labels}, torch.zeros(1, 5))
    assert learned.tolist() == [[False, True, True, False, False]]


def test_choices_that_a_row_does_not_have_are_not_learned(tmp_path):
    _, model = make_pair("bert", "BertForMultipleChoice", tmp_path)
    distillation = Distillation(DistillSection(teacher="x"), model)
    student, told = torch.randn(2, 2, 4).unbind()
    inputs = {"labels": torch.tensor([[0, 2], [3, 4]])}
    found = distillation._divergence(*distillation._real(inputs, student, told))
    assert found[0] == pytest.approx(float(distillation._divergence(student[:1, :2], told[:1, :2])), rel=1e-5)
    assert found[1] == pytest.approx(float(distillation._divergence(student[1:], told[1:])), rel=1e-5)


def test_a_step_is_the_same_however_it_is_divided(teacher, tiny_bert, r8, tmp_path):
    """One batch of eight, or two of four, of unequal lengths: the same weights after the same steps."""
    found = []
    for size, times in ((8, 1), (4, 2)):
        train = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times, "max_steps": 4}
        train |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "optim": "sgd"}
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        recipe = make_recipe(tiny_bert, r8, train, config=still)
        section = DistillSection(teacher=str(teacher), hidden=1.0)
        run(recipe.model_copy(update={"distill": section}), tmp_path / str(size))
        found.append(opened(tmp_path / str(size)).state_dict())
    start = load_model(ModelSection(path=str(tiny_bert)), "AutoModelForSequenceClassification", ["a", "b", "c"])
    moved = max(float((found[0][name] - x).abs().max()) for name, x in start.state_dict().items() if "layers" in name)
    apart = max(float((found[0][name] - x).abs().max()) for name, x in found[1].items())
    assert apart < 1e-6 < 1e-4 < moved, (apart, moved)


@pytest.mark.parametrize("lora", [{}, {"r": 4}], ids=["whole", "adapter"])
def test_what_is_evaluated_is_the_task_alone(lora, teacher, tiny_bert, r8, tmp_path):
    recipe = make_recipe(tiny_bert, r8, {"max_steps": 4, "eval_steps": 4, "save_steps": 4})
    section = DistillSection(teacher=str(teacher), logits=50.0)
    metrics = run(recipe.model_copy(update={"distill": section, "lora": lora}), tmp_path / "run")
    assert metrics["train_loss"] > metrics["eval_loss"] and 0.9 < metrics["eval_loss"] < 1.3


def test_refusals(teacher, tiny_bert, r8, tmp_path):
    recipe = make_recipe(tiny_bert, r8, {"max_steps": 4})

    def refused(model=None, **section):
        changed = recipe.model_copy(update={"distill": DistillSection(**{"teacher": str(teacher), **section})})
        if model is not None:
            changed = changed.model_copy(update={"model": model})
        with pytest.raises(UserError) as error:
            run(changed, tmp_path / "refused")
        assert not (tmp_path / "refused" / "metrics.json").exists()
        return str(error.value)

    assert "weights are missing" in refused(teacher=str(tiny_bert)), "it has no head"
    config = {
        "model_type": "bert",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 37,
    }
    small = ModelSection(config=config, tokenizer=str(tiny_bert))
    assert "the teacher's num_hidden_layers is 2, the model's 1" in refused(hidden=1.0, model=small)
    for name, message in (("T5ForConditionalGeneration", "an encoder and a decoder"), ("regression", "add up to 1")):
        task = task_of(recipe.task)
        student = opened(teacher)
        if name == "regression":
            task = replace(task, problem_type=name)
        else:
            student = make_pair("t5", name, tmp_path / "t5")[0]
        with pytest.raises(UserError, match=message):
            load_teacher(DistillSection(teacher=str(teacher)), student, recipe.model, task, None)
    learned = ModelSection(config=config | {"num_hidden_layers": 2}, tokenizer={"type": "bert", "vocab_size": 60})
    assert "by another vocabulary" in refused(model=learned)
    assert "nowhere" in refused(teacher=str(tmp_path / "nowhere"))


def test_a_head_without_logits_says_so(tmp_path):
    """Native masked words make none while they train."""
    model, _ = make_pair("bert", "BertForMaskedLM", tmp_path)
    native = native_class("bert", "BertForMaskedLM").from_pretrained(tmp_path).train()
    inputs = make_inputs("bert", "BertForMaskedLM", "right", labels=True)
    outputs = native(**inputs, output_hidden_states=True)
    with pytest.raises(UserError, match=r"distill\.logits: BertForMaskedLM makes none while it trains"):
        Distillation(DistillSection(teacher="x"), model).losses(outputs, inputs)
    section = DistillSection(teacher="x", logits=0.0, hidden=1.0)
    assert Distillation(section, model).losses(outputs, inputs)[1] > 0
