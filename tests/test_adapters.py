"""The section `lora`: methods of peft on every family, in native and official classes; what is refused, and why."""

import re

import peft
import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from tests.models.test_parity import assert_close
from tests.models.tiny import make_inputs, make_pair
from zoo import adapters
from zoo.adapter_names import same_layers
from zoo.errors import RunError, UserError
from zoo.size_counts import on_meta
from zoo.trainer import check_gradients

FAMILIES = {
    "bert": ("BertForSequenceClassification", "text-classification"),
    "roberta": ("RobertaForTokenClassification", "token-classification"),
    "albert": ("AlbertForQuestionAnswering", "question-answering"),
    "distilbert": ("DistilBertForSequenceClassification", "text-classification"),
    "gpt2": ("GPT2LMHeadModel", "text-generation"),
    "t5": ("T5ForConditionalGeneration", "summarization"),
    "vit": ("ViTForImageClassification", "image-classification"),
}
# what a recipe's section says; those of the first begin where the base is
METHODS = {
    "lora": {"r": 3}, "rslora": {"r": 3, "use_rslora": True}, "dora": {"r": 3, "use_dora": True},
    "pissa": {"r": 3, "init_lora_weights": "pissa"}, "ia3": {"type": "ia3"},
    "prefix_tuning": {"type": "prefix_tuning", "num_virtual_tokens": 4},
    "prompt_tuning": {"type": "prompt_tuning", "num_virtual_tokens": 4},
    "p_tuning": {"type": "p_tuning", "num_virtual_tokens": 4},
}  # fmt: skip
PROMPTS = ("prefix_tuning", "prompt_tuning", "p_tuning")
IMPLEMENTATIONS = ("native", "official")


def refusal(family: str, implementation: str, method: str) -> str | None:
    """What is said of a method that a family does not take: the table of docs/adapters.md."""
    if family == "vit" and method in PROMPTS:
        return "has no form for image-classification"
    if method == "prefix_tuning" and (family, implementation) == ("distilbert", "official"):
        return "there is no place for a prefix"
    if method in PROMPTS and family == "albert":
        return "has no form for question-answering"
    if method in PROMPTS[1:] and family == "roberta":
        return "does not count in the places of tags"
    return None


def model_of(family: str, implementation: str, directory) -> transformers.PreTrainedModel:
    return dict(zip(("official", "native"), make_pair(family, FAMILIES[family][0], directory), strict=True))[
        implementation
    ]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_methods(family, implementation, tmp_path):
    """A method that a family takes begins at its base and gets gradients; another is refused in words."""
    head, task = FAMILIES[family]
    inputs = make_inputs(family, head, "right", labels=True)
    for method, section in METHODS.items():
        model = model_of(family, implementation, tmp_path / method)
        before = model(**inputs)
        said = refusal(family, implementation, method)
        if said is not None:
            with pytest.raises(UserError, match=said):
                adapters.adapt(model, section, task)
            continue
        adapted = adapters.adapt(model, section, task).eval()
        after = adapted(**inputs)
        if method not in PROMPTS:
            assert_close(after.loss, before.loss, f"{method} at its beginning")
        after.loss.backward()
        check_gradients(adapted.named_parameters())
        for name, parameter in adapted.get_base_model().named_parameters():
            frozen = not any(part in name for part in ("lora_", "ia3_", "modules_to_save"))
            assert not (frozen and parameter.requires_grad), name
        assert " learn" in adapters.learned(adapted)


def test_counts_are_those_of_the_formula(tmp_path):
    """2 d r (matrices) (layers) (LoRA, arXiv 2106.09685, section 4.2; IA3: a factor a feature that is scaled)."""
    model = model_of("bert", "native", tmp_path)
    head = {"classifier.weight": 0}
    model.new_weights = [*head]
    adapted = adapters.adapt(model, {"r": 3, "target_modules": ["q_proj", "v_proj"]}, "text-classification")
    assert adapted.get_nb_trainable_parameters()[0] == 2 * 24 * 3 * 2 * 3 + (24 * 5 + 5)
    model = model_of("gpt2", "native", tmp_path / "gpt2")
    adapted = adapters.adapt(model, {"type": "ia3"}, "text-generation")
    assert adapted.get_nb_trainable_parameters()[0] == 3 * (24 + 24 + 28)


def test_a_key_that_is_null_is_left_out(tmp_path):
    learned = set()
    for section in ({"r": 3}, {"r": 3, "target_modules": None}):
        adapted = adapters.adapt(model_of("bert", "native", tmp_path), section, "text-classification")
        learned.add(adapters.learned(adapted))
    assert len(learned) == 1 and "beside q_proj, v_proj" in learned.pop()


def test_published_counts():
    """GPT-3 with r = 1 on queries and values: the paper's 4.7M; RoBERTa base with r = 8: its 0.3M (table 2)."""
    for size, rank, expected in (("gpt3-175b", 1, 4_718_592), ("roberta-base", 8, 294_912)):
        model = on_meta(size)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=[*model.peft_targets["lora"]]))
        assert adapted.get_nb_trainable_parameters()[0] == expected, size


def test_what_a_checkpoint_lacked_is_learned_whole(tmp_path):
    model = model_of("bert", "native", tmp_path)
    model.new_weights = [
        "classifier.weight",
        "classifier.bias",
        "bert.pooler.dense.weight",
        "bert.layers.0.self_attn.kernel.x",
    ]
    assert adapters.new_modules(model) == {"classifier", "bert.pooler", "bert.layers.0.self_attn.kernel"}
    model.new_weights = model.new_weights[:3]
    adapted = adapters.adapt(model, {"r": 2}, "multiple-choice")
    learned = {name for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name}
    assert {name.split(".modules_to_save.")[0].removeprefix("base_model.model.") for name in learned} == {
        "classifier", "bert.pooler",
    }  # fmt: skip


WRONG = [
    ({"target_modules": ["query"]}, "'query' matches no layer; there are"),
    ({"target_modules": ["q_porj"]}, "did you mean q_proj"),
    ({"target_modules": "layers.(.*"}, "is no regular expression"),
    ({"target_modules": "layers.[0-9].nothing"}, "matches no layer"),
    ({"r": 25}, "25 is more than the 24 of bert.layers.0.self_attn.q_proj"),
    ({"r": 0}, "refused by peft: .*should be a positive integer"),
    ({"init_lora_weights": "psisa"}, "refused by peft"),
]


@pytest.mark.parametrize(("section", "says"), WRONG, ids=[str(section) for section, _ in WRONG])
def test_what_a_model_cannot_be_adapted_by(section, says, tmp_path):
    with pytest.raises(UserError, match=says):
        adapters.adapt(model_of("bert", "native", tmp_path), section, "text-classification")


def test_a_prefix_has_no_place_in_layers_that_run_again(tmp_path):
    _, model = make_pair("albert", "AlbertForSequenceClassification", tmp_path)
    with pytest.raises(UserError, match="albert runs one layer many times, so there is no place for a prefix"):
        adapters.adapt(model, METHODS["prefix_tuning"], "text-classification")
    adapters.adapt(model, METHODS["prompt_tuning"], "text-classification")


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_in_the_other_class(family, tmp_path):
    """All that LoRA adapts, but GPT-2's queries and values, which the official class has in one matrix."""
    official, native = make_pair(family, FAMILIES[family][0], tmp_path)
    for one, other in ((native, official), (official, native)):
        layers = {name for name, module in one.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
        found = {name: same for name, same in same_layers(one, other).items() if name in layers}
        joined = {
            name for name in layers - found.keys() if family == "gpt2" and re.search(r"[qkv]_proj$|c_attn$", name)
        }
        assert layers - found.keys() == joined and len(set(found.values())) == len(found)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("family", "head"), [("roberta", "Roberta"), ("albert", "Albert")])
def test_what_stands_in_front_of_a_text_to_be_classified(family, head, implementation, tmp_path):
    """Of the two families that learn tags and answers above."""
    head = f"{head}ForSequenceClassification"
    inputs = make_inputs(family, head, "right", labels=True)
    for method in PROMPTS if family == "roberta" else PROMPTS[1:]:
        pair = make_pair(family, head, tmp_path / method)
        model = pair[("official", "native").index(implementation)]
        adapted = adapters.adapt(model, METHODS[method], "text-classification")
        adapted(**inputs).loss.backward()
        check_gradients(adapted.named_parameters())


def test_no_gradient_anywhere_is_an_error(tmp_path):
    model = model_of("bert", "native", tmp_path)
    adapted = adapters.adapt(model, {"r": 2}, "text-classification")
    with pytest.raises(RunError, match=r"nothing learns: no gradient reaches any of 14 trained parameters"):
        check_gradients(adapted.named_parameters())
    assert isinstance(adapted, peft.PeftModel) and torch.is_grad_enabled()
