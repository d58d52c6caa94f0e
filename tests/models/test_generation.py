"""Generation by GPT-2 and T5, token for token that of the official class; and what is left in the cache."""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, set_seed

from .test_parity import assert_close
from .tiny import make_inputs, make_pair, native_class, randomise

FAMILIES = {"gpt2": "GPT2LMHeadModel", "t5": "T5ForConditionalGeneration"}
families = pytest.mark.parametrize("family", FAMILIES)
paddings = pytest.mark.parametrize("padding", ["none", "left"])
COMMON = {"max_new_tokens": 9, "eos_token_id": None, "pad_token_id": 1}
WAYS = {
    "greedy": {"do_sample": False},
    "greedy, with an end": {"do_sample": False, "eos_token_id": list(range(3, 40))},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9, "num_return_sequences": 2},
    "penalties": {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


def pair(family, directory, **changes):
    model, native = make_pair(family, FAMILIES[family], directory, **changes)
    return lively(model), lively(native)


def lively(model):
    """With all weights at 0.1 one token wins everywhere; so does the last one where T5's tied embeddings are large."""
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(8)
        if model.config.is_encoder_decoder:
            head = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(4))
            model.lm_head.weight = torch.nn.Parameter(head)
    return model


def prompt(family, padding="none", rows=3):
    inputs = make_inputs(family, FAMILIES[family], padding)
    return {name: x[:rows] for name, x in inputs.items() if not name.startswith("decoder")}


def assert_same_generation(model, native, inputs, **kwargs):
    results = []
    for m in (model, native):
        set_seed(5)
        results.append(m.generate(**inputs, **{**COMMON, **kwargs}, output_logits=True, return_dict_in_generate=True))
    theirs, ours = results
    assert torch.equal(ours.sequences, theirs.sequences)
    for step, (a, b) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        assert_close(a, b, f"step {step}")
    return ours.sequences


@families
@paddings
@pytest.mark.parametrize("way", WAYS)
def test_token_for_token(family, padding, way, tmp_path):
    model, native = pair(family, tmp_path)
    # looking up the prompt takes one text at a time
    inputs = prompt(family, padding, rows=1 if way == "prompt lookup" else 3)
    tokens = assert_same_generation(model, native, inputs, **WAYS[way])
    assert len(tokens.unique()) > 4 or "end" in way, "the texts are not one token over and over"


@families
def test_all_ways_of_caching_agree(family, tmp_path):
    _, native = pair(family, tmp_path)
    inputs = prompt(family, "left")
    ways = [{}, {"use_cache": False}, {"cache_implementation": "static"}]
    tokens = [native.generate(**inputs, **COMMON, do_sample=False, **way) for way in ways]
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])


@families
def test_inputs_embeds(family, tmp_path):
    model, native = pair(family, tmp_path)
    inputs = prompt(family, "left")
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    assert_same_generation(model, native, {"inputs_embeds": embeds, **inputs}, do_sample=False)


@families
def test_an_assistant_proposes_tokens(family, tmp_path):
    model, native = pair(family, tmp_path / "model")
    depth = {"gpt2": {"n_layer": 1}, "t5": {"num_layers": 1, "num_decoder_layers": 1}}[family]
    assistant, native_assistant = make_pair(family, FAMILIES[family], tmp_path / "assistant", **depth)
    lively(assistant)
    lively(native_assistant)
    inputs = prompt(family, rows=1)
    tokens = [
        m.generate(**inputs, **COMMON, do_sample=False, assistant_model=a)
        for m, a in ((model, assistant), (native, native_assistant), (native, assistant))
    ]
    alone = native.generate(**inputs, **COMMON, do_sample=False)
    for proposed in tokens:
        assert torch.equal(proposed, alone)


@paddings
def test_a_conversation_goes_on_with_its_cache(padding, tmp_path):
    model, native = pair("gpt2", tmp_path)
    results = []
    for m in (model, native):
        inputs, cache = prompt("gpt2", padding), DynamicCache(config=m.config)
        tokens = m.generate(**inputs, **COMMON, do_sample=False, past_key_values=cache)
        more = torch.tensor([[5, 9, 7]] * 3)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, tokens.shape[1] - 11 + 3).long()], 1)
        tokens = torch.cat([tokens, more], 1)
        results.append(m.generate(tokens, attention_mask=mask, **COMMON, do_sample=False, past_key_values=cache))
    assert torch.equal(*results)
    without = native.generate(tokens, attention_mask=mask, **COMMON, do_sample=False)
    assert torch.equal(results[1], without)


def assert_same_keys(ours, theirs, real, what):
    """Keys and values (batch, heads, slots, dim) of the real slots, and zeros at all others."""
    for layer, (a, b) in enumerate(zip(ours.layers, theirs.layers, strict=True)):
        for name in ("keys", "values"):
            x, y = (getattr(c, name).transpose(1, 2) for c in (a, b))
            assert x.shape == y.shape
            assert_close(x[real], y[real], f"{what} {name} of layer {layer}")
            assert (x[~real] == 0).all()


@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
def test_gpt2_cache_after_a_packed_prefill(padding, tmp_path):
    model, native = pair("gpt2", tmp_path)
    native.set_ragged("on")
    inputs = prompt("gpt2", padding)
    caches = [m(**inputs, use_cache=True).past_key_values for m in (model, native)]
    assert caches[1].get_seq_length() == caches[0].get_seq_length() == 11
    assert_same_keys(caches[1], caches[0], inputs["attention_mask"].bool(), "self")


@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
def test_t5_caches_after_a_packed_prefill(padding, tmp_path):
    model, native = pair("t5", tmp_path)
    native.set_ragged("on")
    inputs = prompt("t5", padding)
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1, 0, 1, 1, 0]])
    inputs |= {"decoder_input_ids": torch.randint(3, 60, (3, 5)), "decoder_attention_mask": mask}
    caches = [m(**inputs, use_cache=True).past_key_values for m in (model, native)]
    assert all(isinstance(cache, EncoderDecoderCache) for cache in caches)
    assert_same_keys(caches[1].self_attention_cache, caches[0].self_attention_cache, mask.bool(), "self")
    real = inputs["attention_mask"].bool()
    assert_same_keys(caches[1].cross_attention_cache, caches[0].cross_attention_cache, real, "cross")
    assert caches[1].is_updated == caches[0].is_updated


@families
def test_encoder_outputs_logits_to_keep_and_tuples(family, tmp_path):
    model, native = pair(family, tmp_path)
    if family == "t5":
        inputs, ids = prompt("t5", "right"), torch.randint(3, 60, (3, 5))
        expected = model(**inputs, decoder_input_ids=ids).logits
        for encoded in (native.encoder(**inputs), tuple(native.encoder(**inputs, return_dict=False))):
            mask = inputs["attention_mask"]
            logits = native(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=ids).logits
            assert_close(logits, expected, "logits")
        return
    inputs = prompt("gpt2", "left")
    for kept in (1, 4, torch.tensor([0, 5, 10])):
        expected = model(**inputs, logits_to_keep=kept).logits
        real = inputs["attention_mask"].bool()[:, slice(-kept, None) if isinstance(kept, int) else kept]
        for mode in ("on", "off"):
            native.set_ragged(mode)
            logits = native(**inputs, logits_to_keep=kept).logits
            assert logits.shape == expected.shape
            assert_close(logits[real], expected[real], f"{kept}, {mode}")


def test_t5_without_a_start_token_says_so():
    zoo = native_class("t5", FAMILIES["t5"])
    native = randomise(zoo(zoo.config_class(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)))
    with pytest.raises(ValueError, match="needs decoder_start_token_id"):
        native(input_ids=torch.tensor([[3, 4]]), labels=torch.tensor([[5, 6]]))
