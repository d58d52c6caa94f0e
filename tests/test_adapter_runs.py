"""Recipes with a section `lora`: trained, resumed, saved, opened, measured, asked; and what is refused."""

import json
import shutil

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.commands import zoo
from tests.conftest import read_r8
from tests.test_runs import write_jsonl
from tests.tiny_run import make_recipe
from zoo import adapter_names, evaluation, merging, prediction
from zoo.errors import RunError, UserError
from zoo.model_directory import open_finished
from zoo.quantized import quantised_layers
from zoo.recipe import Recipe
from zoo.recipe_loading import load_recipe
from zoo.train import run

SHORT = {"max_steps": 6, "eval_steps": 3, "save_steps": 3}


@pytest.fixture(scope="module")
def bases(tiny_bert, tmp_path_factory):
    """A tiny official GPT-2 and T5, which read as the BERT does, and texts with summaries."""
    folder = tmp_path_factory.mktemp("bases")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    common = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }
    gpt = GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=tokenizer.cls_token_id)
    t5 = T5Config(**common, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    for name, model in (("gpt", GPT2LMHeadModel(gpt)), ("t5", T5ForConditionalGeneration(t5))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for split, count in (("train", 40), ("test", 8)):
        rows = [
            {"text": text, "asked": text[:20], "summary": " ".join(text.split()[:5])}
            for text, _ in read_r8(split, count)
        ]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def writing_recipe(base, data, task: dict, lora: dict) -> Recipe:
    arguments = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 4, "learning_rate": 3e-2, "seed": 7}
    arguments |= {"eval_strategy": "steps", "load_best_model_at_end": True, "disable_tqdm": True}
    data_section = {"path": str(data), "files": {"train": "train.jsonl", "test": "test.jsonl"}, "validation": 0.2}
    if task["type"] == "instruction-tuning":
        data_section |= {"columns": {"prompt": "asked", "completion": "summary"}}
    fields = {
        "name": "tiny", "model": {"path": str(base)}, "task": task, "train": arguments | SHORT,
        "data": data_section, "lora": lora, "generate": {"max_new_tokens": 6},
    }  # fmt: skip
    return Recipe.model_validate(fields)


def as_before(directory) -> None:
    """What the finished adapter measures is what the run has measured."""
    metrics = json.loads((directory / "metrics.json").read_text())
    again = evaluation.run(directory)
    assert again["test_loss"] == pytest.approx(metrics["test_loss"], rel=1e-5)


@pytest.fixture(scope="module")
def adapter(tiny_bert, r8, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter") / "run"
    recipe = make_recipe(tiny_bert, r8, SHORT)
    changes = {
        "lora": {"r": 4, "lora_dropout": 0.1},
        "finetune": recipe.finetune.model_copy(update={"loraplus_lr_ratio": 4.0}),
    }
    run(recipe.model_copy(update=changes), directory)
    return directory


def test_an_adapter_is_kept_and_opened(adapter):
    as_before(adapter)
    saved = load_file(adapter / "adapter_model.safetensors")
    # queries and values of two layers, two matrices each, and the head, which the base does not have
    assert len(saved) == 2 * 2 * 2 + 2 and not (adapter / "model.safetensors").exists()
    config = PeftConfig.from_pretrained(str(adapter))
    assert (config.r, config.lora_alpha, config.lora_dropout, str(config.task_type)) == (4, 8, 0.1, "SEQ_CLS")
    answers = list(prediction.run(adapter, ["profit rose", "wheat fell"]))
    told = [json.loads(line) for line in (adapter / "predictions.jsonl").read_text().splitlines()]
    assert len(answers) == 2 and set(answers[0]["probabilities"]) == set(told[0]["probabilities"])
    card = (adapter / "README.md").read_text()
    assert "library_name: peft" in card and "zoo predict . 'Wheat shipments rose'" in card


def test_loraplus_has_two_rates(tiny_bert, r8, tmp_path):
    recipe = make_recipe(tiny_bert, r8, SHORT | {"lr_scheduler_type": "constant", "weight_decay": 0.01})
    changes = {"lora": {"r": 4}, "finetune": recipe.finetune.model_copy(update={"loraplus_lr_ratio": 4.0})}
    run(recipe.model_copy(update=changes), tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    groups = torch.load(newest / "optimizer.pt", weights_only=True)["param_groups"]
    assert sorted({group["lr"] for group in groups if group["params"]}) == pytest.approx([3e-3, 12e-3])
    assert {group["weight_decay"] for group in groups if group["params"]} == {0.01, 0.0}


@pytest.mark.parametrize(
    ("base", "task", "lora"),
    [
        ("gpt", {"type": "text-generation", "max_length": 24}, {"type": "prefix_tuning", "num_virtual_tokens": 4}),
        ("t5", {"type": "summarization", "max_length": 32, "max_target_length": 8}, {"type": "ia3"}),
        # the marks of a chat are tokens that the base lacks
        ("gpt", {"type": "instruction-tuning", "max_length": 64}, {"r": 4}),
    ],
)
def test_what_writes_with_an_adapter(base, task, lora, bases, tmp_path):
    run(writing_recipe(bases / base, bases, task, lora), tmp_path / "run")
    as_before(tmp_path / "run")
    answers = [list(prediction.run(tmp_path / "run", ["profit rose"])) for _ in range(2)]
    assert answers[0] == answers[1] and answers[0][0]["predicted"] is not None
    if lora.get("type") == "prefix_tuning":
        with pytest.raises(UserError, match="prefix_tuning changes no layer, so there is nothing to merge"):
            merging.run(tmp_path / "run", tmp_path / "whole")
    else:
        assert merging.run(tmp_path / "run", tmp_path / "whole", texts=3)["difference"] < 1e-5
        as_before(tmp_path / "whole")
    assert json.loads((tmp_path / "run" / "generation_config.json").read_text())["max_new_tokens"] == 6


def test_standard_output_is_for_answers(bases, tmp_path):
    """What is said of tokens that the base lacks, and by a pipeline of models within adapters, stands elsewhere."""
    run(
        writing_recipe(bases / "gpt", bases, {"type": "instruction-tuning", "max_length": 64}, {"r": 4}),
        tmp_path / "run",
    )
    code, out, err = zoo("predict", "run", "profit rose", cwd=tmp_path)
    assert code == 0 and len(out.splitlines()) == 1 and out.endswith("profit rose\n"), out
    assert "tokens beyond its vocabulary" in err and "not supported" not in err


def test_a_prefix_takes_positions(bases, tmp_path):
    """Of the 64 that the model has four are the prefix's."""
    lora = {"type": "prefix_tuning", "num_virtual_tokens": 4}
    recipe = writing_recipe(bases / "gpt", bases, {"type": "text-generation", "max_length": 61}, lora)
    with pytest.raises(UserError, match=r"task\.max_length: 61, but the model has 60 positions"):
        run(recipe, tmp_path / "run")


def test_an_adapter_on_8_bits_is_opened_on_8_bits(tiny_bert, r8, tmp_path):
    changes = {"lora": {"r": 4}, "quantize": {"load_in_8bit": True}}
    run(make_recipe(tiny_bert, r8, SHORT).model_copy(update=changes), tmp_path / "run")
    as_before(tmp_path / "run")
    report = merging.run(tmp_path / "run", tmp_path / "whole", texts=4)
    assert report["difference"] < report["difference_from_quantized"] < 0.1
    adapter_names.run(tmp_path / "run", "official", tmp_path / "official")
    as_before(tmp_path / "official")
    assert quantised_layers(open_finished(tmp_path / "official").model.get_base_model())
    assert quantised_layers(open_finished(tmp_path / "run").model.get_base_model())


def test_a_merged_adapter_is_a_whole_model(adapter, tmp_path):
    report = merging.run(adapter, tmp_path / "whole", texts=5)
    assert report["texts"] == 5 and report["difference"] < 1e-6
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert type(model).__name__ == "BertForSequenceClassification"
    as_before(tmp_path / "whole")
    assert "was merged: on 5 rows no output differs" in (tmp_path / "whole" / "README.md").read_text()


def test_an_adapter_takes_the_names_of_the_official_class_and_back(adapter, tiny_bert, tmp_path):
    """With peft and transformers alone it then computes what it computes here."""
    assert adapter_names.run(adapter, "official", tmp_path / "official") == {"layers": 4}
    as_before(tmp_path / "official")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    stock = PeftModel.from_pretrained(base, str(tmp_path / "official")).eval()
    ids = torch.tensor([[2, 7, 9, 11, 3]])
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits for model in (open_finished(adapter).model.eval(), stock))
    assert torch.allclose(ours, theirs, atol=1e-6)
    adapter_names.run(tmp_path / "official", "native", tmp_path / "native")
    before, after = (load_file(one / "adapter_model.safetensors") for one in (adapter, tmp_path / "native"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(UserError, match="has the names of the native class already"):
        adapter_names.run(adapter, "native", tmp_path / "again")


def test_what_is_not_merged(adapter, tmp_path):
    with pytest.raises(RunError, match=r"more than 0 \(--bound\); keep the adapter apart"):
        merging.run(adapter, tmp_path / "whole", texts=40, bound=0.0)
    assert not (tmp_path / "whole").exists()
    merging.run(adapter, tmp_path / "whole", texts=2)
    with pytest.raises(UserError, match="there is something already"):
        merging.run(adapter, tmp_path / "whole")
    with pytest.raises(UserError, match="has no adapter; it is a whole model already"):
        merging.run(tmp_path / "whole", tmp_path / "again")


def test_an_adapter_of_other_weights_is_refused(tiny_bert, adapter, r8, tmp_path):
    base, run_dir = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny_bert, base)
    recipe = make_recipe(base, r8, SHORT).model_copy(update={"lora": {"r": 4}})
    run(recipe, run_dir)
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if "query.weight" in name)
    save_file(weights | {name: weights[name] + 1e-3}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="its adapter is of other weights than"):
        open_finished(run_dir)
    (run_dir / "base.json").write_text("{")
    with pytest.raises(UserError, match=r"base\.json: cannot be read"):
        open_finished(run_dir)


REFUSED = [
    ("lora: {type: prefx_tuning, r: 4}", "lora.type: unknown method; did you mean prefix_tuning"),
    ("lora: {type: ia3, r: 4}", "lora.r: unknown key; the keys are those of peft.IA3Config"),
    ("lora: {task_type: SEQ_CLS}", "lora.task_type: not for a recipe"),
    ("lora: {r: eight}", "lora.r: expected a whole number"),
    (
        "lora: {r: 4}\nfinetune: {layerwise_decay: 0.9}",
        "finetune.layerwise_decay: of a model with adapters nothing else",
    ),
    ("lora: {r: 4}\nfinetune: {freeze: {layers: 2}}", "finetune.freeze: of a model with adapters nothing else"),
    ("lora: {type: ia3}\nfinetune: {loraplus_lr_ratio: 2.0}", "ia3 has no two matrices"),
    ("finetune: {loraplus_lr_ratio: 2.0}", "it is of adapters, and there is no section lora"),
    ("lora: {r: 4}\nmodel: {size: bert-tiny, path: null, tokenizer: x}", "random weights hold nothing to adapt"),
    ("quantize: {load_in_4bit: true}", "quantize: weights of 8 or 4 bits do not learn; add a section lora"),
    ("lora: {r: 4}\nquantize: {load_in_4bits: true}", "quantize.load_in_4bits: unknown key; did you mean load_in_4bit"),
    ("lora: {r: 4}\nmodel: {added_tokens: [x]}", "their embeddings would be no part of the adapter"),
]


@pytest.mark.parametrize(("written", "says"), REFUSED)
def test_a_section_that_makes_no_sense(written, says, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"extends: bert/finetune-topics\nname: x\n{written}\n")
    with pytest.raises(UserError, match=says):
        load_recipe(str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize("implementation", ["native", "official"])
def test_an_encoder_and_decoder_tells_classes(implementation, bases, r8, tmp_path):
    """The official class hands out its encoder's states beside the logits."""
    recipe = make_recipe(bases / "t5", r8, SHORT, implementation=implementation)
    metrics = run(recipe.model_copy(update={"lora": {"r": 4}}), tmp_path / "run")
    assert 0 < metrics["test_accuracy"] <= 1
    as_before(tmp_path / "run")
