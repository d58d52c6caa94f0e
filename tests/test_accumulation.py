"""A step's loss and gradients are those of one large batch, for every head and loss, native and official."""

import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from pydantic import ValidationError
from transformers import AutoTokenizer, Seq2SeqTrainingArguments, TrainingArguments

from tests.models.tiny import VOCAB, config_for, native_class, randomise
from zoo.errors import UserError
from zoo.recipe import Recipe
from zoo.sections import TaskSection
from zoo.tasks import task_of
from zoo.tasks.base import IGNORED
from zoo.tasks.classification import weighted_loss
from zoo.tasks.sentence_pairs import NEXT_SENTENCE_PREDICTION, SENTENCE_ORDER_PREDICTION
from zoo.trainer import WritingTrainer, ZooTrainer

# two batches of four make a step, and its last row stands alone
ROWS, BATCH, LENGTHS = 7, 4, (9, 4, 12, 7, 3, 5, 12)
DROPOUTS = (
    *(
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "classifier_dropout_prob",
        "dropout",
        "seq_classif_dropout",
    ),
    *("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout_rate", "classifier_dropout"),
)
ONE, SEVERAL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
WEIGHTED = weighted_loss(TaskSection(type="text-classification", class_weights="balanced"), [0, 1, 1, 2, 3, 4, 4], 5)
SMOOTH = {"label_smoothing_factor": 0.2}
CASES = {
    "one label": ("bert", "BertForSequenceClassification", ONE, {}, None),
    "one label, smoothed": ("roberta", "RobertaForSequenceClassification", ONE, SMOOTH, None),
    "one label, weighted": ("distilbert", "DistilBertForSequenceClassification", ONE, {}, WEIGHTED),
    "labels": ("bert", "BertForSequenceClassification", SEVERAL, {}, None),
    "a number": ("bert", "BertForSequenceClassification", REGRESSION, {}, None),
    "tags": ("bert", "BertForTokenClassification", None, {}, None),
    "tags, smoothed": ("bert", "BertForTokenClassification", None, SMOOTH, None),
    "masked": ("bert", "BertForMaskedLM", None, {}, None),
    "masked, smoothed": ("distilbert", "DistilBertForMaskedLM", None, SMOOTH, None),
    "next sentence": ("bert", "BertForPreTraining", None, {}, None),
    "order": ("albert", "AlbertForPreTraining", None, {}, None),
    "causal": ("gpt2", "GPT2LMHeadModel", None, {}, None),
    "causal, smoothed": ("gpt2", "GPT2LMHeadModel", None, SMOOTH, None),
    "written": ("t5", "T5ForConditionalGeneration", None, {}, None),
    "written, smoothed": ("t5", "T5ForConditionalGeneration", None, SMOOTH, None),
    "image": ("vit", "ViTForImageClassification", ONE, {}, None),
    "image, smoothed": ("vit", "ViTForImageClassification", ONE, SMOOTH, None),
}


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Each training collects garbage among all modules there are, which takes longer than its step."""
    gc.freeze()
    yield
    gc.unfreeze()


def make(family: str, official: str, implementation: str, problem: str | None):
    native = native_class(family, official)
    changes = {name: 0.0 for name in DROPOUTS if hasattr(config_for(family, official), name)}
    changes |= {"problem_type": problem} | ({"id2label": {0: "LABEL_0"}} if problem == REGRESSION else {})
    fields = config_for(family, official, **changes).to_dict()
    fields["model_type"] = native.config_class.model_type
    model = randomise(native(native.config_class.from_dict(fields)))
    if implementation == "native":
        return model
    return randomise(getattr(transformers, official)(config_for(family, official, **changes)))


def rows(family: str, official: str, problem: str | None) -> list[dict]:
    draw = torch.Generator().manual_seed(1)
    made = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(3, VOCAB, (length,), generator=draw)
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "row": torch.tensor(number)}
        if family == "vit":
            row = {"pixel_values": torch.randn(2, 12, 12, generator=draw), "row": torch.tensor(number)}
        if problem == SEVERAL:
            row["labels"] = torch.randint(2, (5,), generator=draw).float()
        elif problem is not None:
            row["labels"] = torch.tensor(float(number) if problem == REGRESSION else number % 5)
        else:
            row["labels"] = torch.randint(5, (length,), generator=draw) if "Token" in official else ids.clone()
            if "GPT2" not in official:
                row["labels"][1 : 1 + length // 2] = IGNORED
        if "PreTraining" in official:
            row["next_sentence_label" if family == "bert" else "sentence_order_label"] = torch.tensor(number % 2)
        made.append(row)
    # of some rows nothing is learned
    if "Token" in official:
        made[2]["labels"][:] = IGNORED
    return made


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    fill = {"input_ids": 1, "attention_mask": 0, "labels": IGNORED}
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    values = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        name: pad(tensors, padding_value=fill[name]) if name in fill and tensors[0].ndim == 1 else torch.stack(tensors)
        for name, tensors in values.items()
    }


def step(model, data: list[dict], directory, batch: int, official: str, problem, train: dict, loss) -> tuple:
    """(the loss of one step, the gradients) of all rows."""
    writes = "T5" in official
    arguments = (Seq2SeqTrainingArguments if writes else TrainingArguments)(
        output_dir=str(directory), per_device_train_batch_size=batch, gradient_accumulation_steps=-(-ROWS // batch),
        max_steps=1, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1,
        save_strategy="no", remove_unused_columns=False, report_to="none", disable_tqdm=True, **train,
    )  # fmt: skip
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    trainer = (WritingTrainer if writes else ZooTrainer)(
        model=model, args=arguments, train_dataset=data, data_collator=collate, compute_loss_func=loss
    )
    tasks = {"BertForPreTraining": NEXT_SENTENCE_PREDICTION, "AlbertForPreTraining": SENTENCE_ORDER_PREDICTION}
    trainer.row_loss = tasks[official].row_loss if official in tasks else None
    trained = trainer.train()
    return trained.training_loss, {name: before[name] - tensor for name, tensor in model.named_parameters()}


def expected(model, batch: dict[str, torch.Tensor], official: str, problem, train: dict, loss) -> torch.Tensor:
    """The mean over all rows, or labels, of one batch that holds all of them."""
    batch = {name: tensor for name, tensor in batch.items() if name != "row"}
    if train:
        labels = batch["labels"]
        if "T5" in official:
            batch |= {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=labels)}
        logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        if "GPT2" in official:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=train["label_smoothing_factor"])
    outputs = model.train()(**batch)
    return outputs.loss if loss is None else loss(outputs, batch["labels"])


# of official classes, one of each kind of loss
OFFICIAL = ("labels", "tags, smoothed", "masked", "order", "causal, smoothed", "written", "image")


@pytest.mark.parametrize(
    ("case", "implementation"), [(case, "native") for case in CASES] + [(case, "official") for case in OFFICIAL]
)
def test_a_step_is_one_large_batch(tmp_path, case, implementation):
    family, official, problem, train, loss = CASES[case]
    data = rows(family, official, problem)
    model = make(family, official, implementation, problem)
    wanted = expected(model, collate(data), official, problem, train, loss)
    wanted.backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    # a row alone, too, of which nothing is learned
    for batch in (BATCH, 1) if case == "tags" else (BATCH,):
        again = make(family, official, implementation, problem)
        found, differences = step(again, data, tmp_path, batch, official, problem, train, loss)
        assert found == pytest.approx(wanted.item(), abs=2e-6)
        for name, gradient in gradients.items():
            assert (gradient - differences[name]).abs().max() < 2e-6 * max(1.0, gradient.abs().max()), name


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"type": "text-classification", "problem_type": REGRESSION}, "text-classification with regression"),
        ({"type": "next-sentence-prediction"}, "next-sentence-prediction"),
    ],
)
def test_what_has_no_labels_to_smooth(task, says):
    fields = {"name": "a", "model": {"path": "b"}, "task": task, "data": {"path": "c"}, "train": SMOOTH}
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(fields)
    [(keys, text)] = caught.value.errors()[0]["ctx"]["found"]
    assert keys == ("train", "label_smoothing_factor") and text.startswith(f"{says} has no label alone to smooth")


def test_a_single_token_is_no_text_to_generate(tiny_bert):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    section = TaskSection(type="text-generation", max_length=4)
    task = task_of(section)
    length = len(tokenizer("oil prices")["input_ids"])
    made = task.encode(tokenizer, TaskSection(type="text-generation", max_length=length - 1))(
        {"text": ["oil prices"], "row": [3]}
    )
    assert [len(ids) for ids in made["input_ids"]] == [length - 1]
    with pytest.raises(UserError, match="max_length: 1, but a token is learned from those before it"):
        task.encode(tokenizer, TaskSection(type="text-generation", max_length=1))
