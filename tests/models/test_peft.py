"""peft's methods on encoders and ViT: LoRA everywhere, prefix and prompt tuning where there are keys or words."""

import peft
import pytest
import torch
import transformers

from .test_parity import assert_close
from .tiny import HEADS, config_for, make_inputs, make_pair, native_class

TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
WITH_PREFIX = [(f, name) for f, name in HEADS if f in ("bert", "roberta") and name.endswith(tuple(TASKS))]
# what peft does not find in the configs of these
WIDTHS = {"albert": {"token_dim": 10}, "distilbert": {"token_dim": 24, "num_attention_heads": 4}}
WITH_PROMPT = [(family, name) for family, name in HEADS if family in WIDTHS and name.endswith(tuple(TASKS))]
OTHERS = [
    ("albert", "AlbertForSequenceClassification"),
    ("distilbert", "DistilBertForSequenceClassification"),
    ("vit", "ViTForImageClassification"),
]


def task_of(official: str) -> str:
    return next(task for ending, task in TASKS.items() if official.endswith(ending))


def tuned(model, make, **fields):
    torch.manual_seed(0)
    return peft.get_peft_model(model, make(num_virtual_tokens=4, **fields)).eval()


@pytest.mark.parametrize(("family", "official"), WITH_PREFIX, ids=[name for _, name in WITH_PREFIX])
def test_prefix_tuning_reads_its_keys_in_each_head(family, official, tmp_path):
    """peft asks the official classes' encoders and pools by itself; ours take the keys and pool as they always do."""
    model, native = make_pair(family, official, tmp_path)
    inputs = make_inputs(family, official, "right")
    plain = native(**inputs)[0]
    theirs, ours = (
        tuned(m, peft.PrefixTuningConfig, task_type=task_of(official))(**inputs)[0] for m in (model, native)
    )
    real = inputs["attention_mask"].bool()
    if official.endswith("SequenceClassification"):
        real = real[:, 0]
    assert ours.shape == plain.shape
    assert_close(ours[real], theirs[real], "answer")
    assert (ours - plain)[real].abs().max() > 1e-3


def test_prefix_tuning_of_distilbert_is_that_of_a_bert_with_its_weights(tmp_path):
    """The official class takes no keys; a BERT without segments, of the same weights, does."""
    _, native = make_pair("distilbert", "DistilBertForTokenClassification", tmp_path / "distilbert")
    same = {"hidden_act": "relu", "layer_norm_eps": 1e-12}
    bert = native_class("bert", "BertForTokenClassification")
    twin = bert(bert.config_class.from_dict(config_for("bert", "BertForTokenClassification", **same).to_dict()))
    state = {name.replace("distilbert.", "bert."): tensor for name, tensor in native.state_dict().items()}
    segments = "bert.embeddings.token_type_embeddings.weight"
    twin.load_state_dict({**state, segments: torch.zeros(3, 24)})
    twin.save_pretrained(tmp_path / "bert", official=True)
    model = transformers.BertForTokenClassification.from_pretrained(tmp_path / "bert")
    inputs = make_inputs("distilbert", "DistilBertForTokenClassification", "right")
    fields = {"task_type": "TOKEN_CLS", **WIDTHS["distilbert"]}
    theirs, ours = (tuned(m, peft.PrefixTuningConfig, **fields)(**inputs).logits for m in (model, native))
    real = inputs["attention_mask"].bool()
    assert_close(ours[real], theirs[real], "logits")


def test_layers_that_are_shared_have_no_place_for_a_prefix(tmp_path):
    _, native = make_pair("albert", "AlbertForSequenceClassification", tmp_path)
    adapted = tuned(native, peft.PrefixTuningConfig, task_type="SEQ_CLS")
    with pytest.raises(ValueError, match=r"a layer that runs more than once \(ALBERT\) has no place for cached keys"):
        adapted(**make_inputs("albert", "AlbertForSequenceClassification"))


@pytest.mark.parametrize("make", [peft.PromptTuningConfig, peft.PromptEncoderConfig])
@pytest.mark.parametrize(("family", "official"), WITH_PROMPT, ids=[name for _, name in WITH_PROMPT])
def test_prompt_tuning_equals_the_official_class(family, official, make, tmp_path):
    model, native = make_pair(family, official, tmp_path)
    inputs = make_inputs(family, official, "right")
    hidden = {"encoder_hidden_size": 8} if make is peft.PromptEncoderConfig else {}
    fields = {"task_type": task_of(official), **WIDTHS[family], **hidden}
    theirs, ours = (tuned(m, make, **fields)(**inputs)[0] for m in (model, native))
    real = torch.nn.functional.pad(inputs["attention_mask"], (4, 0), value=1).bool()
    assert_close(*((ours, theirs) if ours.shape[:2] != real.shape else (ours[real], theirs[real])), "answer")


@pytest.mark.parametrize(("family", "official"), OTHERS, ids=[family for family, _ in OTHERS])
def test_lora_packed_padded_and_merged_into_the_official_class(family, official, tmp_path):
    model, native = make_pair(family, official, tmp_path)
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj", "fc1"], r=3, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(native, lora).eval()
    inputs = make_inputs(family, official, "right", labels=True)
    gradients = {}
    for mode in ("off", "on"):
        native.set_ragged(mode)
        adapted.zero_grad()
        output = adapted(**inputs)
        output.loss.backward()
        gradients[mode] = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad}
    for name, gradient in gradients["off"].items():
        assert gradient.abs().max() > 0, name
        assert_close(gradients["on"][name], gradient, name)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged", official=True)
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    whole = make_inputs(family, official, "none")
    if family == "vit":
        del whole["attention_mask"]  # which the official class drops no patches by
    assert_close(merged(**whole).logits, adapted(**whole).logits, "merged")
    assert (merged(**whole).logits - model(**whole).logits).abs().max() > 1e-3
