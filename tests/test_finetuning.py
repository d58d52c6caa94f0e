"""The section finetune: learning rates by layer, parts that stay as they are, layers that join from the top."""

import gc
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from tests.conftest import read_r8
from tests.models.tiny import config_for, randomise
from tests.test_runs import RUNS, files, recipe, write_jsonl
from tests.test_trainer import build, equal, rows, state
from zoo.errors import UserError
from zoo.finetuning import apply
from zoo.recipe_loading import load_recipe
from zoo.sections import FinetuneSection
from zoo.train import run
from zoo.trainer import ZooTrainer

BERT = "BertForSequenceClassification"
RATE, DECAY = 1e-2, 0.6
# of each family: embeddings, then what a layer's name holds before its number, official and native
FAMILIES = {
    "bert": ("BertForMaskedLM", "embeddings", r"\.(?:layer|layers)\.(\d)\."),
    "roberta": ("RobertaForSequenceClassification", "embeddings", r"\.(?:layer|layers)\.(\d)\."),
    "distilbert": ("DistilBertForTokenClassification", "embeddings", r"\.(?:layer|layers)\.(\d)\."),
    "gpt2": ("GPT2LMHeadModel", r"\.wte|\.wpe", r"\.(?:h|layers)\.(\d)\."),
    "t5": ("T5ForConditionalGeneration", "^shared", r"(?:block|layers)\.(\d)\."),
    "vit": ("ViTForImageClassification", "embeddings", r"\.layers\.(\d)\."),
}


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Each training collects garbage among all modules there are, which takes longer than its steps."""
    gc.freeze()
    yield
    gc.unfreeze()


def model_of(family: str, official: str, implementation: str):
    if implementation == "native":
        return build(family, official)
    return randomise(getattr(transformers, official)(config_for(family, official)))


def section(**keys) -> FinetuneSection:
    return FinetuneSection.model_validate(keys)


def trainer(model, directory: Path, keys: dict, official: str = BERT, **changes) -> ZooTrainer:
    arguments = {
        "max_steps": 8, "per_device_train_batch_size": 6, "learning_rate": RATE, "weight_decay": 0.1, "save_steps": 2,
        "logging_steps": 1, "disable_tqdm": True, "report_to": "none", "seed": 3, "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    settings = TrainingArguments(output_dir=str(directory), **arguments | changes)
    apply(model, section(**keys))
    made = ZooTrainer(model=model, args=settings, train_dataset=rows(official))
    made.tune(section(**keys))
    made.create_optimizer()
    return made


@pytest.mark.parametrize("implementation", ["native", "official"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_learning_rate_of_each_parameter(tmp_path, family, implementation):
    official, embeddings, layers = FAMILIES[family]
    model = model_of(family, official, implementation)
    made = trainer(model, tmp_path, {"layerwise_decay": DECAY})
    of = {id(p): group for group in made.optimizer.param_groups for p in group["params"]}
    assert (
        sum(len(group["params"]) for group in made.optimizer.param_groups) == len(list(model.parameters())) == len(of)
    )
    assert made.optimizer.param_groups[0]["lr"] == RATE, "the rate that is logged"
    decayed, seen = made.get_decay_parameter_names(model), set()
    for name, parameter in model.named_parameters():
        top = 2 if name.startswith("decoder") else 3
        number = re.search(layers, name)
        if number is None and "relative_attention_bias" in name:
            number = re.match("(0)", "0")
        below = 4 if re.search(embeddings, name) else 0 if number is None else top - int(number[1])
        seen.add(below)
        assert of[id(parameter)]["lr"] == pytest.approx(RATE * DECAY**below, rel=1e-12), name
        assert of[id(parameter)]["weight_decay"] == (0.1 if name in decayed else 0.0), name
    assert seen == {0, 1, 2, 3, 4}


def test_the_schedule_keeps_the_ratios(tmp_path):
    made = trainer(build("bert", BERT), tmp_path, {"layerwise_decay": DECAY}, warmup_steps=3, save_strategy="no")
    seen = []

    class Noting(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append([group["lr"] for group in made.optimizer.param_groups])

    made.add_callback(Noting())
    made.train()
    factors = [n / 3 for n in range(3)] + [(8 - n) / 5 for n in range(3, 8)]
    distances = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for factor, rates in zip(factors, seen, strict=True):
        assert rates == pytest.approx([RATE * factor * DECAY**distance for distance in distances])


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("family", "official", "implementation", "freeze", "left"),
    [
        (
            "bert",
            "BertForMaskedLM",
            "native",
            {"embeddings": True, "layers": 2},
            r"layers\.2\.|^cls(?!.*r\.weight)",
        ),
        ("bert", "BertForMaskedLM", "official", {"layers": 3}, r"embeddings|^cls"),
        ("gpt2", "GPT2LMHeadModel", "native", {"embeddings": True, "layers": 1}, r"layers\.[12]\.|ln_f"),
        ("albert", "AlbertForSequenceClassification", "native", {"embeddings": True}, "groups|pooler|classifier"),
    ],
)
def test_what_is_frozen_stays_as_it_was(tmp_path, family, official, implementation, freeze, left):
    """Weight decay and recomputed activations included."""
    model = model_of(family, official, implementation)
    before = state(model)
    changes = {"max_steps": 2, "save_strategy": "no", "gradient_checkpointing": True}
    trainer(model, tmp_path, {"freeze": freeze}, official, **changes).train()
    # a bias of the keys has no gradient, but for rounding
    moved = {name for name in changed(before, state(model)) if "key.bias" not in name and "k_proj.bias" not in name}
    wanted = {name for name in before if re.search(left, name) and "key.bias" not in name and "k_proj.bias" not in name}
    assert moved == wanted and 0 < len(wanted) < len(before)


def unfrozen(directory: Path, every: int | str, resume: Path | None = None, seed: int = 0) -> tuple[dict, dict]:
    """(step -> the parts that its update changed, the weights at the end); an epoch has four steps."""
    model = build("bert", BERT, seed=seed)
    keys = {"gradual_unfreezing": every, "layerwise_decay": DECAY, "freeze": {"layers": 1}}
    made = trainer(model, directory, keys)
    steps, before = {}, {}

    class Noting(TrainerCallback):
        def on_step_begin(self, args, state_, control, **kwargs):
            before.update(state(model))

        def on_step_end(self, args, state_, control, **kwargs):
            names = changed(before, state(model))
            steps[state_.global_step] = {re.match(r"(?:bert\.)?(layers\.\d|\w+)", name)[1] for name in names}

    made.add_callback(Noting())
    made.train(resume_from_checkpoint=None if resume is None else str(resume))
    return steps, state(model)


@pytest.mark.parametrize("every", [2, "epoch"])
def test_layers_join_from_the_top_and_a_resumed_run_ends_alike(tmp_path, every):
    steps, end = unfrozen(tmp_path, every)
    parts = [{"classifier", "pooler"}, {"layers.2"}, {"layers.1"}, set(), {"embeddings"}]
    for step, moved in steps.items():
        reached = (step - 1) // (4 if every == "epoch" else every)
        assert moved == set().union(*parts[: reached + 1]), step
    assert len(steps) == 8
    for step in (2, 4, 6):
        again, held = unfrozen(tmp_path / "again", every, tmp_path / f"checkpoint-{step}", seed=1)
        assert again == {number: moved for number, moved in steps.items() if number > step}
        # those that never moved are in the checkpoint
        assert equal(end, held) == len(end)


ROBERTA = ("roberta", "RobertaForSequenceClassification")


@pytest.mark.parametrize(
    ("family", "official", "keys", "says"),
    [
        (*ROBERTA, {"freeze": {"layers": 4}}, "finetune.freeze.layers: 4, but the model has 3 layers$"),
        ("t5", "T5ForConditionalGeneration", {"freeze": {"layers": 3}}, "the model has 2 layers in its decoder"),
        (
            "gpt2",
            "GPT2LMHeadModel",
            {"freeze": {"embeddings": True, "layers": 3}},
            "nothing is left to train",
        ),
        ("albert", "AlbertForMaskedLM", {"freeze": {"layers": 1}}, "freeze.layers: the 5 layers of this model share"),
        ("albert", "AlbertForMaskedLM", {"layerwise_decay": 0.9}, "layerwise_decay: the 5 layers of this model share"),
        ("albert", "AlbertForMaskedLM", {"gradual_unfreezing": 2}, "gradual_unfreezing: the 5 layers of this model"),
    ],
)
@pytest.mark.parametrize("implementation", ["native", "official"])
def test_what_a_model_cannot_do(family, official, keys, says, implementation):
    with pytest.raises(UserError, match=says):
        apply(model_of(family, official, implementation), section(**keys))


def test_what_is_trained_is_said():
    model = build("bert", "BertForMaskedLM")
    keys = {"freeze": {"embeddings": True, "layers": 1}, "layerwise_decay": 0.5, "gradual_unfreezing": "epoch"}
    layer, head = 4 * (24 * 24 + 24) + 2 * 24 * 28 + 28 + 24 + 4 * 24, 24 * 24 + 24 + 2 * 24 + 67
    embeddings = (67 + 40 + 3 + 2) * 24
    assert apply(model, section(**keys)) == [
        f"trained: {2 * layer + head:,} of {3 * layer + head + embeddings:,} parameters (layers 1-2, head)",
        "the output layer is tied to the embeddings, and stays as they are",
        "learning rate: 0.25 of the head's at the lowest of these",
        "unfrozen from the top: the head at once, then a layer more with each epoch",
    ]
    assert apply(build("bert", BERT), section()) == []
    [note] = apply(build("t5", "T5ForConditionalGeneration"), section(freeze={"layers": 1}))
    assert note.endswith("(embeddings, layers 1-2 of the encoder, layer 1 of the decoder, head)")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{layerwise_decay: 1.5}", "finetune.layerwise_decay: expected less than or equal to 1, got 1.5"),
        ("{layerwise_decay: 0}", "finetune.layerwise_decay: expected greater than 0, got 0"),
        ("{freeze: {layer: 2}}", "finetune.freeze.layer: unknown key; did you mean layers?"),
        ("{freeze: {layers: -1}}", "finetune.freeze.layers: expected greater than or equal to 0, got -1"),
        ("{freeze: [embeddings]}", "finetune.freeze: expected a mapping (key: value), got the list ['embeddings']"),
        ("{gradual_unfreezing: 0}", "finetune.gradual_unfreezing: expected greater than 0, got 0"),
        (
            "{gradual_unfreezing: epochs}",
            "finetune.gradual_unfreezing: expected 'epoch', got the string 'epochs'; did you mean epoch?",
        ),
        ("{layer_decay: 0.9}", "finetune.layer_decay: unknown key; did you mean layerwise_decay?"),
    ],
)
def test_bad_keys(tmp_path, text, says):
    file = tmp_path / "r.yaml"
    base = "name: a\nmodel: {path: b}\ntask: {type: text-classification}\ndata: {path: c}\n"
    file.write_text(f"{base}finetune: {text}\n")
    with pytest.raises(UserError) as caught:
        load_recipe(str(file))
    assert str(caught.value) == f"{file}:5: {says}"


def test_a_run(tiny_bert, tmp_path, capsys):
    for split, count in (("train", 24), ("test", 9)):
        write_jsonl(tmp_path / f"topics-{split}.jsonl", [{"text": x, "label": y} for x, y in read_r8(split, count)])
    made = recipe(tiny_bert, RUNS["one label"][0], files(tmp_path, "topics"), max_steps=2, eval_steps=2, save_steps=2)
    keys = {"layerwise_decay": 0.8, "freeze": {"embeddings": True, "layers": 1}, "gradual_unfreezing": 1}
    made = made.model_copy(update={"finetune": section(**keys)})
    run(made, tmp_path / "run")
    assert "(layer 1, head)" in capsys.readouterr().out
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")) == made
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_bert, tmp_path / "run"))
    moved = {name for name in before if not torch.equal(before[name], after[f"bert.{name}"])}
    assert {name[:15] for name in moved} == {"encoder.layer.1", "pooler.dense.we", "pooler.dense.bi"}
