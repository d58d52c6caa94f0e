"""LoRA on native models against LoRA on the official ones, and NF4 weights under it."""

import re

import peft
import pytest
import torch
import transformers
from transformers import BitsAndBytesConfig

from .test_parity import assert_close
from .tiny import SKELETON, make_inputs, make_pair, native_class

# what to adapt, officially and here, and where a module of ours stands in the official model
TARGETS = {
    "bert": (["query", "value"], ["q_proj", "v_proj"], [
        (r"bert\.layers\.(\d+)\.self_attn\.q_proj", r"bert.encoder.layer.\1.attention.self.query"),
        (r"bert\.layers\.(\d+)\.self_attn\.v_proj", r"bert.encoder.layer.\1.attention.self.value"),
    ]),
    "gpt2": (["attn.c_proj", "c_fc"], ["o_proj", "fc1"], [
        (r"transformer\.layers\.(\d+)\.self_attn\.o_proj", r"transformer.h.\1.attn.c_proj"),
        (r"transformer\.layers\.(\d+)\.mlp\.fc1", r"transformer.h.\1.mlp.c_fc"),
    ]),
    "t5": (["q", "v"], ["q_proj", "v_proj"], [
        (r"(encoder|decoder)\.layers\.(\d+)\.self_attn\.([qv])_proj", r"\1.block.\2.layer.0.SelfAttention.\3"),
        (r"decoder\.layers\.(\d+)\.cross_attn\.([qv])_proj", r"decoder.block.\1.layer.1.EncDecAttention.\2"),
    ]),
}  # fmt: skip
SIZES = {
    "bert": {"hidden_size": 64, "intermediate_size": 96, "hidden_dropout_prob": 0.0,
             "attention_probs_dropout_prob": 0.0},
    "gpt2": {"n_embd": 64, "n_inner": 96, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 96, "dropout_rate": 0.0},
}  # fmt: skip
# heads stay as they are; so does what the official T5 keeps in fp32
SKIPPED = {"bert": (["classifier", "pooler"],) * 2, "gpt2": (["lm_head"],) * 2,
           "t5": (["lm_head", "wo"], ["lm_head", "fc2"])}  # fmt: skip

families = pytest.mark.parametrize(("family", "head"), SKELETON, ids=[family for family, _ in SKELETON])


def adapt(model, targets):
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=3, init_lora_weights=False))


def official_name(family, name):
    for pattern, replacement in TARGETS[family][2]:
        name = re.sub(pattern, replacement, name)
    return name


def adapters(model):
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def adapted_pair(family, head, directory):
    """Both with the same adapters."""
    model, native = make_pair(family, head, directory, **SIZES[family])
    theirs, ours = adapt(model, TARGETS[family][0]), adapt(native, TARGETS[family][1])
    with torch.no_grad():
        for name, parameter in adapters(ours).items():
            parameter.copy_(adapters(theirs)[official_name(family, name)])
    assert {official_name(family, name) for name in adapters(ours)} == set(adapters(theirs))
    return theirs, ours


@families
@pytest.mark.parametrize("ragged", ["on", "off"])
def test_a_step_moves_the_adapters_as_on_the_official_class(family, head, ragged, tmp_path):
    theirs, ours = (m.double() for m in adapted_pair(family, head, tmp_path))
    ours.base_model.model.set_ragged(ragged)
    inputs = make_inputs(family, head, "right", labels=True)
    for step in range(2):
        losses = []
        for m in (theirs, ours):
            m.train().zero_grad()
            loss = m(**inputs).loss
            loss.backward()
            losses.append(loss.detach())
        assert_close(losses[1], losses[0], f"loss at step {step}")
        gradients = {name: p.grad for name, p in adapters(theirs).items()}
        for name, parameter in adapters(ours).items():
            expected = gradients[official_name(family, name)]
            assert expected.abs().max() > 0
            assert_close(parameter.grad, expected, f"{name} at step {step}")
        for m in (theirs, ours):
            torch.optim.SGD(adapters(m).values(), lr=0.1).step()
    frozen = [name for name, p in ours.named_parameters() if "lora_" not in name]
    assert all(p.grad is None for name, p in ours.named_parameters() if name in frozen)


@families
def test_adapters_reload_and_merge_into_the_official_class(family, head, tmp_path):
    theirs, ours = adapted_pair(family, head, tmp_path / "base")
    inputs = make_inputs(family, head, "none")
    expected = theirs.eval()(**inputs).logits
    ours.save_pretrained(tmp_path / "adapter")
    base = native_class(family, head).from_pretrained(tmp_path / "base")
    assert_close(
        peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(**inputs).logits, expected, "reloaded"
    )
    ours.merge_and_unload().save_pretrained(tmp_path / "merged", official=True)
    merged = getattr(transformers, head).from_pretrained(tmp_path / "merged").eval()
    assert_close(merged(**inputs).logits, expected, "merged")


def quantised(cls, directory, skipped):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=skipped,
    )
    return cls.from_pretrained(directory, quantization_config=config, device_map="cpu").eval()


def four_bit_layers(model):
    return [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]


@families
def test_nf4_is_as_near_as_the_official_nf4(family, head, tmp_path):
    model, _ = make_pair(family, head, tmp_path, **SIZES[family])
    theirs = quantised(type(model), tmp_path, SKIPPED[family][0])
    ours = quantised(native_class(family, head), tmp_path, SKIPPED[family][1])
    ours.set_ragged("on")
    inputs = make_inputs(family, head, "right")
    real = slice(None) if family != "gpt2" else inputs["attention_mask"].bool()
    exact, official, native = (m(**inputs).logits.float()[real] for m in (model, theirs, ours))
    errors = [((x - exact).norm() / exact.norm()).item() for x in (official, native)]
    assert 0 < errors[1] < 0.5
    if family == "gpt2":
        # q, k and v are one matrix there, lying on its side, so other weights share a block
        assert len(four_bit_layers(ours)) == 3 * 6
        assert errors[1] < 1.5 * max(errors[0], 0.05)
    else:
        assert len(four_bit_layers(ours)) == len(four_bit_layers(theirs)) > 0
        assert_close(native, official, "NF4 logits")


@families
def test_lora_on_nf4_trains_and_the_weights_reload(family, head, tmp_path):
    make_pair(family, head, tmp_path / "base", **SIZES[family])
    native = quantised(native_class(family, head), tmp_path / "base", SKIPPED[family][1])
    inputs = make_inputs(family, head, "right", labels=True)
    real = slice(None) if family != "gpt2" else inputs["attention_mask"].bool()
    logits = native(**inputs).logits
    native.save_pretrained(tmp_path / "nf4")
    reloaded = native_class(family, head).from_pretrained(tmp_path / "nf4", device_map="cpu").eval()
    assert four_bit_layers(reloaded) == four_bit_layers(native)
    assert_close(reloaded(**inputs).logits[real], logits[real], "reloaded")
    for model in (native, reloaded):
        adapted = adapt(model, TARGETS[family][1]).train()
        losses = []
        optimizer = torch.optim.SGD(adapters(adapted).values(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            loss = adapted(**inputs).loss
            loss.backward()
            for name, parameter in adapters(adapted).items():
                assert torch.isfinite(parameter.grad).all(), name
                assert parameter.grad.abs().max() > 0, name
            optimizer.step()
            losses.append(loss.item())
        assert losses[1] < losses[0]
