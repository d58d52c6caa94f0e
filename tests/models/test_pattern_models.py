"""Every pattern in a model of each kind of stack: the same by mask and by blocks, padded, packed and cached."""

import pytest
import torch

from zoo.models import attention_variants, blocked_attention, layer_masks, masks, ragged_attention

from .test_parity import assert_close
from .test_patterns import KWARGS
from .test_variants import NO_DROPOUT, TOKEN_HEADS, open_variant
from .tiny import CONFIGS, PADDING, make_inputs, make_pair

# narrow enough to hide something of eleven tokens
NARROW = {
    "local": {"window": 2}, "dilated": {"window": 1, "dilation": 3}, "block": {"size": 4}, "strided": {"stride": 3},
    "fixed": {"stride": 4}, "longformer": {"window": 1}, "sinks": {"window": 2, "sinks": 1},
    "bigbird": {"block_size": 2, "window_blocks": 0, "random_blocks": 1},
}  # fmt: skip
assert NARROW.keys() == KWARGS.keys()

families = pytest.mark.parametrize(("family", "official"), TOKEN_HEADS, ids=[family for family, _ in TOKEN_HEADS])
patterns = pytest.mark.parametrize("name", NARROW)


def variant(name):
    return {"attention": ["full", name] if name == "local" else name, "attention_kwargs": {name: NARROW[name]}}


@pytest.fixture
def blocked(monkeypatch):
    """Blocks from two tokens on; how many documents they were used for."""
    for module in (layer_masks, blocked_attention, masks, ragged_attention):
        monkeypatch.setattr(module, "BLOCKED_FROM", 2)
    calls = []
    attend = ragged_attention.blocked_attention
    monkeypatch.setattr(ragged_attention, "blocked_attention", lambda *a, **k: calls.append(1) or attend(*a, **k))
    return calls


def run(native, inputs, ragged, implementation="sdpa"):
    native.set_attn_implementation(implementation)
    native.set_ragged(ragged)
    native.zero_grad()
    output = native(**inputs)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in native.named_parameters() if p.grad is not None}
    with torch.no_grad():
        logits = native(**{name: x for name, x in inputs.items() if name != "labels"}).logits
    return logits, output.loss.detach(), gradients


@families
@patterns
@pytest.mark.parametrize("padding", [padding for padding in PADDING if padding != "right"])
def test_mask_blocks_padded_and_packed_agree(family, official, name, padding, tmp_path, request):
    if family == "t5" and padding == "an all-pad row":
        pytest.skip("padded, a decoder attends evenly to the padding of a text without tokens; packed, to nothing")
    make_pair(family, official, tmp_path, **NO_DROPOUT[family])
    native = open_variant(family, official, tmp_path, variant(name))
    inputs = make_inputs(family, official, padding, labels=True)
    real = slice(None) if family == "t5" else inputs["attention_mask"].bool()
    logits, loss, gradients = run(native, inputs, "off", "eager")
    found = {"mask": run(native, inputs, "off"), "packed": run(native, inputs, "on")}
    blocked = request.getfixturevalue("blocked")
    found["blocks"] = run(native, inputs, "off")
    used = len(blocked)
    found["packed in blocks"] = run(native, inputs, "on")
    assert used and len(blocked) > used
    for way, (others, other_loss, other_gradients) in found.items():
        assert_close(others[real], logits[real], way)
        assert_close(other_loss, loss, way)
        assert gradients.keys() == other_gradients.keys()
        for parameter, gradient in gradients.items():
            assert_close(other_gradients[parameter], gradient, f"{way}: {parameter}")


@patterns
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("by", ["masks", "blocks"])
def test_each_cached_step_equals_the_whole_pass(name, cache, by, tmp_path, request):
    make_pair("gpt2", "GPT2LMHeadModel", tmp_path, eos_token_id=None)
    native = open_variant("gpt2", "GPT2LMHeadModel", tmp_path, variant(name))
    inputs = make_inputs("gpt2", "GPT2LMHeadModel", "left")
    with torch.no_grad():
        made = native.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=8, do_sample=False,
            cache_implementation=cache, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        if by == "blocks":
            request.getfixturevalue("blocked")
        grown = made.sequences.shape[1] - inputs["input_ids"].shape[1]
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, grown), value=1)
        positions = masks.document_positions(mask)
        logits = native(input_ids=made.sequences, attention_mask=mask, position_ids=positions).logits
    for step, cached in enumerate(made.logits):
        assert_close(cached, logits[:, inputs["input_ids"].shape[1] - 1 + step], f"step {step}")


@pytest.mark.parametrize(("family", "official"), TOKEN_HEADS[:2])
@patterns
@pytest.mark.usefixtures("blocked")
def test_a_token_moves_what_sees_it_and_nothing_else(family, official, name, tmp_path):
    """Of one layer exactly the states of the queries that see it."""
    make_pair(family, official, tmp_path, num_hidden_layers=1)
    native = open_variant(family, official, tmp_path, {"attention": name, "attention_kwargs": {name: NARROW[name]}})
    causal = family == "gpt2"
    ids = torch.randint(3, 60, (1, 20), generator=torch.Generator().manual_seed(0))
    other, place = ids.clone(), 6
    other[0, place] += 1
    with torch.no_grad():
        before, after = (native.base_model(input_ids=x).last_hidden_state[0] for x in (ids, other))
    moved = (before - after).abs().amax(-1) > 0
    pattern = attention_variants.pattern_of(native.config, name, causal, 0)
    heads = torch.arange(native.config.num_attention_heads)[:, None]
    expected = pattern(torch.arange(20)[None], torch.tensor([[place]]), heads).any(0)
    assert torch.equal(moved, expected) and not expected.all()


@pytest.mark.parametrize("heads", [1, 3])
def test_heads_in_turn_may_be_odd_in_number(heads, tmp_path):
    make_pair("bert", "BertForMaskedLM", tmp_path, num_attention_heads=heads, **NO_DROPOUT["bert"])
    native = open_variant("bert", "BertForMaskedLM", tmp_path, variant("strided"))
    inputs = make_inputs("bert", "BertForMaskedLM", "right", labels=True)
    (logits, *_), (others, *_) = run(native, inputs, "off"), run(native, inputs, "on")
    real = inputs["attention_mask"].bool()
    assert_close(others[real], logits[real], "logits")


@pytest.mark.parametrize("attention", ["bigbird", ["full", "full", "full", "full", "full", "full", "bigbird"]])
def test_layers_of_a_group_are_counted_one_by_one(attention, tmp_path):
    """An ALBERT runs num_hidden_layers * inner_group_num blocks, each by a mask of its own."""
    assert CONFIGS["albert"].inner_group_num == 2 and CONFIGS["albert"].num_hidden_layers == 5
    make_pair("albert", "AlbertForMaskedLM", tmp_path)
    fields = {"attention": attention, "attention_kwargs": {"bigbird": NARROW["bigbird"]}}
    native = open_variant("albert", "AlbertForMaskedLM", tmp_path, fields)
    inputs = make_inputs("albert", "AlbertForMaskedLM", "right", labels=True)
    (logits, *_), (others, *_) = run(native, inputs, "off"), run(native, inputs, "on")
    real = inputs["attention_mask"].bool()
    assert_close(others[real], logits[real], "logits")


@pytest.mark.parametrize("name", ["strided", "bigbird"])
def test_flex_attention_has_no_pattern_for_each_head(name, tmp_path):
    """Its blocks would be those of the first head."""
    make_pair("bert", "BertForMaskedLM", tmp_path)
    native = open_variant("bert", "BertForMaskedLM", tmp_path, variant(name))
    native.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="one pattern for all heads"):
        native(**make_inputs("bert", "BertForMaskedLM"))
