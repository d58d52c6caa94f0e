"""Packed execution: equal to the official class at real tokens, zeros elsewhere, and no padding in any linear layer."""

import dataclasses

import peft
import pytest
import torch
import transformers

from zoo.models import ragged as zoo_ragged

from .test_parity import assert_close, official_gradients
from .tiny import HEADS, PADDING, SKELETON, make_inputs, make_pair, native_class, rows_entering

paddings = pytest.mark.parametrize("padding", PADDING)
skeleton = pytest.mark.parametrize("family, official", SKELETON, ids=[family for family, _ in SKELETON])

# these read column 0, so a batch with padding there runs padded unless told "on", which then refuses
POOLED = ("ForPreTraining", "NextSentencePrediction", "SequenceClassification", "MultipleChoice")
ENCODERS = ("bert", "roberta", "albert", "distilbert")
ENCODER_ALONE = ("T5EncoderModel", "T5ForTokenClassification")


def can_pack(family: str, official: str, padding: str) -> bool:
    with_pooler = official in ("BertModel", "RobertaModel", "AlbertModel")
    pooled = with_pooler or (family in ENCODERS and official.endswith(POOLED))
    return not (pooled and padding in ("left", "an all-pad row"))


def compare_at_real_tokens(ours, theirs, mask: torch.Tensor, what: str):
    if ours.shape[:2] == mask.shape:
        assert_close(ours[mask], theirs[mask], what)
        # nothing is left at padding but zeros, or for the ends of a span the lowest number there is
        low = torch.finfo(ours.dtype).min
        assert ((ours[~mask] == 0) | (ours[~mask] == low)).all(), what
    else:
        assert_close(ours, theirs, what)


@paddings
@pytest.mark.parametrize("family, official", HEADS, ids=[name for _, name in HEADS])
def test_outputs_and_hidden_states(family, official, padding, tmp_path):
    model, native = make_pair(family, official, tmp_path)
    inputs = make_inputs(family, official, padding)
    if not can_pack(family, official, padding):
        native.set_ragged("on")
        with pytest.raises(ValueError, match="first slot of a row"):
            native(**inputs)
        native.set_ragged("auto")
        for name, value in model(**inputs).items():
            assert_close(native(**inputs)[name], value, name)
        return
    native.set_ragged("on")
    mask = inputs["attention_mask"].bool().flatten(0, -2)
    with torch.no_grad():
        ours = native(**inputs, output_hidden_states=True)
        theirs = model(**inputs, output_hidden_states=True)
    # a row without any key attends evenly to everything in the official class; its text is not real
    rows = mask.any(-1)
    for name, value in theirs.items():
        values = value if isinstance(value, tuple) else (value,)
        for index, (a, b) in enumerate(
            zip(ours[name] if isinstance(value, tuple) else (ours[name],), values, strict=True)
        ):
            if isinstance(a, torch.Tensor):
                what = f"{name}[{index}]"
                decoder = family == "t5" and official not in ENCODER_ALONE and not name.startswith("encoder")
                if decoder or (official == "GPT2ForSequenceClassification" and name == "logits"):
                    # a decoder's inputs are not padded, nor is what is said of a text
                    assert_close(a[rows], b[rows], what)
                else:
                    compare_at_real_tokens(a, b, mask, what)


@paddings
@pytest.mark.parametrize("family, official", HEADS, ids=[name for _, name in HEADS])
def test_every_linear_layer_and_norm_sees_real_tokens_only(family, official, padding, tmp_path):
    _, native = make_pair(family, official, tmp_path)
    inputs = make_inputs(family, official, padding)
    if not can_pack(family, official, padding):
        return
    native.set_ragged("on")
    rows = rows_entering(native, lambda: native(**inputs))
    real, batch = int(inputs["attention_mask"].sum()), inputs["attention_mask"].flatten(0, -2).shape[0]
    decoder = inputs.get("decoder_input_ids", inputs.get("input_ids", inputs["attention_mask"])).numel()
    for name, count in rows.items():
        name = name.removeprefix("transformer.") if family == "t5" else name
        runs = next((runs for group, runs in ALBERT_RUNS.items() if group in name), 1)
        if family == "t5" and is_in_decoder(name):
            expected = decoder
        elif is_once_a_text(name) or (official.endswith(ONE_CLASS) and name == "classifier"):
            expected = batch
        elif family in ENCODERS and official.endswith(POOLED[1:]) and is_shortened(name):
            expected = (runs - 1) * real + batch
        elif official == "ViTForImageClassification" and (is_shortened(name) or name == "vit.layernorm"):
            # keys are made of the states behind the norm
            expected = real + batch if name.endswith("self_attn_norm") else batch
        else:
            expected = runs * real
        assert count == expected, f"{name}: {count} rows, {expected} expected"


ONE_CLASS = ("SequenceClassification", "MultipleChoice", "ImageClassification")
# five layers in two groups
ALBERT_RUNS = {"groups.0.": 3, "groups.1.": 2}


def is_in_decoder(name: str) -> bool:
    decoder = name.startswith(("decoder", "lm_head", "qa_outputs"))
    return decoder and not name.endswith(("cross_attn.k_proj", "cross_attn.v_proj"))


def is_once_a_text(name: str) -> bool:
    """Poolers, and heads that read one token of each text."""
    return name.endswith(("pooler", "pooler.dense", "seq_relationship", "score")) or name.startswith(ONCE_A_TEXT)


ONCE_A_TEXT = ("sop_classifier", "pre_classifier", "classification_head", "classifier.dense", "classifier.out_proj")


def is_shortened(name: str) -> bool:
    """Whether a layer is part of the last block, of which a pooling head reads the first token alone."""
    last = "groups.1.layers.1." in name or (".layers.2." in name)
    return last and not name.endswith(("k_proj", "v_proj"))


def test_recorded_hidden_states_keep_the_last_layer_whole(tmp_path):
    _, native = make_pair("bert", "BertForSequenceClassification", tmp_path)
    inputs = make_inputs("bert", "BertForSequenceClassification", "right")
    short, whole = native(**inputs), native(**inputs, output_hidden_states=True)
    assert_close(short.logits, whole.logits, "logits")
    assert whole.hidden_states[-1].shape == (3, 11, 24)
    assert whole.hidden_states[-1][0].abs().min() > 0


@skeleton
@pytest.mark.parametrize("padding", ["right", "holes"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(family, official, padding, reentrant, tmp_path):
    """With dropout on: the recomputed pass must draw the same masks."""
    _, native = make_pair(family, official, tmp_path)
    native.set_ragged("on")
    inputs = make_inputs(family, official, padding, labels=True)
    gradients = []
    for checkpointing in (False, True):
        native.train().zero_grad()
        if checkpointing:
            native.gradient_checkpointing_enable({"use_reentrant": reentrant})
            native.enable_input_require_grads()
        torch.manual_seed(11)
        native(**inputs).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in native.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, name)


@skeleton
@paddings
def test_lora_equals_padded(family, official, padding, tmp_path):
    _, native = make_pair(family, official, tmp_path)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "fc1"], r=3, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(native, config).eval()
    inputs = make_inputs(family, official, padding, labels=True)
    losses, gradients = {}, {}
    for mode in ("off", "auto"):
        native.set_ragged(mode)
        adapted.zero_grad()
        # rows without a text differ: padded, their queries attend to padding
        loss = adapted(**inputs).loss
        loss.backward()
        losses[mode] = loss.detach()
        gradients[mode] = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad}
    if padding == "an all-pad row" and family == "t5":
        return
    assert_close(losses["auto"], losses["off"], "loss")
    for name, gradient in gradients["off"].items():
        assert_close(gradients["auto"][name], gradient, name)
    assert any("lora_B" in name and gradient.abs().max() > 0 for name, gradient in gradients["auto"].items())


@skeleton
def test_prefix_tuning_runs_padded_and_equals_the_official_class(family, official, tmp_path):
    """Its prefix is in the cache before the first token, so `auto` must not pack."""
    # peft takes the width of a head for hidden_size / heads
    model, native = make_pair(family, official, tmp_path, **({"d_kv": 6} if family == "t5" else {}))
    inputs = make_inputs(family, official, "right")
    tasks = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
    outputs = []
    for base in (model, native):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(base, peft.PrefixTuningConfig(task_type=tasks[family], num_virtual_tokens=4))
        outputs.append(adapted.eval()(**inputs).logits)
    assert_close(outputs[1], outputs[0], "logits")


def test_an_adapter_for_each_row_runs_padded(tmp_path):
    _, native = make_pair("bert", "BertForSequenceClassification", tmp_path)
    adapted = peft.get_peft_model(native, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    inputs = make_inputs("bert", "BertForSequenceClassification", "right")
    names = ["default", "__base__", "default"]
    plain, mixed = adapted.eval()(**inputs).logits, adapted(**inputs, adapter_names=names).logits
    assert_close(mixed[[0, 2]], plain[[0, 2]], "rows with the adapter")
    with adapted.disable_adapter():
        assert_close(mixed[1], adapted(**inputs).logits[1], "the row without it")
    native.set_ragged("on")
    with pytest.raises(ValueError, match="adapter_names"):
        adapted(**inputs, adapter_names=names)


def test_only_the_prefill_of_a_generation_is_packed(tmp_path):
    model, native = make_pair("gpt2", "GPT2LMHeadModel", tmp_path)
    inputs = make_inputs("gpt2", "GPT2LMHeadModel", "left")
    counts: list[int] = []
    native.transformer.layers[0].mlp.fc1.register_forward_pre_hook(
        lambda module, args: counts.append(args[0].numel() // args[0].shape[-1])
    )
    kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    tokens = native.generate(**inputs, **kwargs)
    assert torch.equal(tokens, model.generate(**inputs, **kwargs))
    assert counts == [int(inputs["attention_mask"].sum())] + [3] * 5


@skeleton
def test_export_and_compile_run_padded(family, official, tmp_path):
    model, native = make_pair(family, official, tmp_path)
    inputs = make_inputs(family, official, "right")
    native.config.use_cache = False
    for stack in ("encoder", "decoder") if family == "t5" else ():
        getattr(native, stack).config.use_cache = False
    exported = torch.export.export(native, (), {**inputs, "return_dict": True}, strict=False).module()
    expected = model(**inputs).logits
    assert_close(exported(**inputs, return_dict=True).logits, expected, "exported")
    native.set_ragged("on")
    with pytest.raises(ValueError, match="exported, traced or compiled"):
        torch.export.export(native, (), {**inputs, "return_dict": True}, strict=False)


@pytest.mark.parametrize("family, official", HEADS, ids=[name for _, name in HEADS])
def test_unpacked_attention_on_packed_tokens(family, official, tmp_path, monkeypatch):
    """Where no per-sequence kernel is used (other devices), linear layers stay packed and attention is padded."""
    model, native = make_pair(family, official, tmp_path)
    native.set_ragged("on")
    original = zoo_ragged.Packing.from_mask.__func__

    def from_mask(cls, mask):
        return dataclasses.replace(original(cls, mask), per_sequence=False)

    monkeypatch.setattr(zoo_ragged.Packing, "from_mask", classmethod(from_mask))
    full = zoo_ragged.Packing.full.__func__
    monkeypatch.setattr(
        zoo_ragged.Packing, "full", classmethod(lambda *args: dataclasses.replace(full(*args), per_sequence=False))
    )
    inputs = make_inputs(family, official, "right")
    mask = inputs["attention_mask"].bool().flatten(0, -2)
    theirs, ours = model(**inputs), native(**inputs)
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            compare_at_real_tokens(ours[name], value, mask, name)


def test_span_loss_is_that_of_unpadded_samples(tmp_path):
    model, native = make_pair("bert", "BertForQuestionAnswering", tmp_path)
    native.set_ragged("on")
    inputs = make_inputs("bert", "BertForQuestionAnswering", "right", labels=True)
    losses = []
    for row, length in enumerate(inputs["attention_mask"].sum(-1).tolist()):
        sample = {k: v[row : row + 1] if v.ndim == 1 else v[row : row + 1, :length] for k, v in inputs.items()}
        losses.append(model(**sample).loss)
    assert_close(native(**inputs).loss, torch.stack(losses).mean(), "loss")


def test_padding_adds_nothing_to_the_gradient(tmp_path):
    """The same texts with more padding around give the same loss and gradients."""
    _, native = make_pair("bert", "BertForTokenClassification", tmp_path)
    native.set_ragged("on")
    inputs = make_inputs("bert", "BertForTokenClassification", "right", labels=True)
    wide = {}
    for name, value in inputs.items():
        fill = {"labels": -100, "attention_mask": 0}.get(name, 1)
        wide[name] = torch.nn.functional.pad(value, (0, 6), value=fill)
    results = []
    for batch in (inputs, wide):
        native.zero_grad()
        output = native(**batch)
        output.loss.backward()
        results.append((output.loss.detach(), official_gradients(native)))
    assert_close(results[1][0], results[0][0], "loss")
    for name, gradient in results[0][1].items():
        assert_close(results[1][1][name], gradient, name)


def test_eager_and_wide_masks_are_refused_only_when_packing_is_demanded(tmp_path):
    _, native = make_pair("bert", "BertForMaskedLM", tmp_path)
    inputs = make_inputs("bert", "BertForMaskedLM", "right")
    padded = native(**inputs).logits
    wide = inputs["attention_mask"][:, None, None, :].bool().expand(3, 1, 11, 11)
    real = inputs["attention_mask"].bool()
    assert_close(native(**{**inputs, "attention_mask": wide}).logits[real], padded[real], "4-D mask")
    native.set_ragged("on")
    for change, match in (
        ({"attention_mask": wide}, "4 dimensions"),
        ({"output_attentions": True}, "attention weights"),
        ({"attention_mask": torch.zeros_like(inputs["attention_mask"])}, "no row has a real token"),
    ):
        with pytest.raises(ValueError, match=match):
            native(**{**inputs, **change})
    native.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation is 'eager'"):
        native(**inputs)
    with pytest.raises(ValueError, match="'auto', 'on' or 'off'"):
        native.set_ragged("yes")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@skeleton
def test_half_precision(family, official, dtype, tmp_path):
    model, native = make_pair(family, official, tmp_path)
    inputs = make_inputs(family, official, "right", labels=True)
    expected = model(**inputs).logits
    native = native_class(family, official).from_pretrained(tmp_path, dtype=dtype)
    native.set_ragged("on")
    real = inputs["attention_mask"].bool()
    ours = native.eval()(**inputs).logits.float()
    pairs = (ours[real], expected[real]) if ours.shape[:2] == real.shape else (ours, expected)
    assert (pairs[0] - pairs[1]).abs().max() < 0.05 * expected.abs().max()
    loss = native.train()(**inputs).loss
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in native.parameters() if p.grad is not None)


@skeleton
def test_autocast_trains(family, official, tmp_path):
    _, native = make_pair(family, official, tmp_path)
    native.set_ragged("on")
    inputs = make_inputs(family, official, "right", labels=True)
    expected = native(**inputs).loss.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = native.train()(**inputs).loss
    loss.backward()
    assert abs(loss.item() - expected) < 0.5
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in native.parameters())


def test_four_bit_weights_take_packed_tokens(tmp_path):
    _, native = make_pair("bert", "BertForMaskedLM", tmp_path, hidden_size=64, intermediate_size=64)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["decoder"])
    quantised = native_class("bert", "BertForMaskedLM").from_pretrained(tmp_path, quantization_config=config)
    inputs = make_inputs("bert", "BertForMaskedLM", "right")
    real = inputs["attention_mask"].bool()
    logits = {}
    for mode in ("off", "on"):
        quantised.set_ragged(mode)
        logits[mode] = quantised(**inputs).logits.float()[real]
    assert type(quantised.bert.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    assert (logits["on"] - logits["off"]).abs().max() < 0.02 * logits["off"].abs().max()
