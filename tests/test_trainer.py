"""Resume and the choice of the best checkpoint restore every tensor, of every family and of adapters."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import Trainer, TrainingArguments

from tests.models.tiny import SKELETON, VOCAB, config_for, native_class, randomise
from zoo.trainer import ZooTrainer
from zoo.weights import assert_same_adapter

ROWS, LENGTH = 24, 9


def build(family: str, official: str, seed: int = 0, adapter: bool = False):
    native = native_class(family, official)
    fields = config_for(family, official).to_dict() | {"model_type": native.config_class.model_type}
    model = randomise(native(native.config_class.from_dict(fields)), seed)
    if not adapter:
        return model
    torch.manual_seed(seed)
    head = ["classifier"] if family == "bert" else None
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "fc1"], r=2, modules_to_save=head))


def rows(official: str) -> list[dict]:
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCAB, (ROWS, LENGTH), generator=draw).tolist()
    labels = [n % 5 for n in range(ROWS)] if official.endswith("SequenceClassification") else ids
    return [
        {"input_ids": one, "attention_mask": [1] * LENGTH, "labels": label, "row": n}
        for n, (one, label) in enumerate(zip(ids, labels, strict=True))
    ]


def train(model, official: str, directory: Path, trainer_class=ZooTrainer, resume: Path | None = None, **changes):
    arguments = {
        "max_steps": 8, "per_device_train_batch_size": 6, "learning_rate": 1e-2, "save_steps": 2, "eval_steps": 2,
        "eval_strategy": "steps", "logging_steps": 3, "disable_tqdm": True, "report_to": "none", "seed": 3,
        "remove_unused_columns": trainer_class is Trainer,
    }  # fmt: skip
    settings = TrainingArguments(output_dir=str(directory), **arguments | changes)
    data = rows(official)
    trainer = trainer_class(model=model, args=settings, train_dataset=data, eval_dataset=data[:6])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> int:
    assert first.keys() == second.keys()
    return sum(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize(("family", "official"), SKELETON)
def test_resume_ends_with_the_same_weights(tmp_path, family, official, adapter):
    """The dropout is on, and the checkpoint lies in the middle of an epoch."""
    base = build(family, official, adapter=adapter)
    end = state(train(base, official, tmp_path).model)
    again = build(family, official, seed=0 if adapter else 1, adapter=adapter)
    if adapter:
        for parameter in again.parameters():
            # the base is the recipe's; what is learned must come from the checkpoint
            if parameter.requires_grad:
                parameter.data.normal_()
    train(again, official, tmp_path / "again", resume=tmp_path / "checkpoint-6")
    assert equal(state(again), end) == len(end)


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize(("family", "official"), SKELETON)
def test_the_best_model_is_restored_whole(tmp_path, family, official, adapter):
    seen = {}

    class Noting(ZooTrainer):
        def _save_checkpoint(self, model, trial):
            seen[self.state.global_step] = state(self.model)
            super()._save_checkpoint(model, trial)

    # the worst loss, so that it is not the last
    choice = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    model = build(family, official, adapter=adapter)
    trainer = train(model, official, tmp_path, Noting, **choice)
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = max(losses, key=losses.__getitem__)
    assert best != 8
    held = state(model)
    assert equal(held, seen[best]) == len(held) and equal(held, seen[8]) < len(held)


def test_adapter_tensors_are_in_the_checkpoint(tmp_path):
    model = build("bert", "BertForSequenceClassification", adapter=True)
    train(model, "BertForSequenceClassification", tmp_path)
    assert_same_adapter(model, tmp_path / "checkpoint-8")
    assert len(get_peft_model_state_dict(model)) == 3 * 2 * 2 + 2


def test_why_the_stock_trainer_will_not_do(tmp_path, caplog):
    """It loads the saved names as they are: those that our classes rename are lost, with a warning."""
    model = build("bert", "BertForSequenceClassification")
    official = "BertForSequenceClassification"
    saved = state(train(model, official, tmp_path).model)
    for trainer_class, restored in ((Trainer, 9), (ZooTrainer, len(saved))):
        other = build("bert", official, seed=1)
        trainer = train(other, official, tmp_path / trainer_class.__name__, trainer_class, max_steps=1)
        other.load_state_dict(build("bert", official, seed=2).state_dict())
        trainer._load_from_checkpoint(str(tmp_path / "checkpoint-8"))
        assert equal(state(other), saved) == restored, trainer_class
    assert len(saved) == 57


def test_evaluation_leaves_no_row_out(tmp_path):
    """`dataloader_drop_last` is of training; stock, the same arguments evaluate 4 of 6 rows and say nothing."""
    official = "BertForSequenceClassification"
    changes = {"dataloader_drop_last": True, "per_device_eval_batch_size": 4, "max_steps": 1}
    for trainer_class, seen in ((ZooTrainer, 6), (Trainer, 4)):
        trainer = train(build("bert", official), official, tmp_path / trainer_class.__name__, trainer_class, **changes)
        assert len(trainer.predict(rows(official)[:6]).predictions) == seen
        assert len(trainer.get_train_dataloader()) == ROWS // 6
