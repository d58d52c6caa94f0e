"""Blocks by config: each option against an official class that has it; every option in every family."""

import itertools
import math

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import (
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MptConfig,
    Qwen3Config,
    RoFormerConfig,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from zoo.models import blocked_attention, layer_masks, masks, ragged_attention
from zoo.models.blocks import Block
from zoo.models.modeling_gpt2 import ZooGPT2Config, ZooGPT2LMHeadModel, ZooGPT2Model
from zoo.models.positions import Alibi, Rotary, Sinusoids, rotate
from zoo.models.spec import FEED_FORWARDS, OPTIONS, POSITIONS, BlockSpec

from .test_parity import assert_close
from .test_variants import OPENED
from .tiny import CONFIGS, make_inputs, native_class

SIZE = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 67}
DECODER = {"n_embd": 24, "n_layer": 3, "n_head": 4, "vocab_size": 67, "n_positions": 40, "n_inner": 28}
RMS = {"norm": "rmsnorm", "feed_forward": "swiglu", "positions": "rotary"}


def llama_names(layer, names=(("input_layernorm", "self_attn_norm"), ("post_attention_layernorm", "mlp_norm"))):
    """Official -> ours, of what stands in one layer of Llama's kind."""
    old, new = f"model.layers.{layer}", f"transformer.layers.{layer}"
    yield from ((f"{old}.self_attn.{x}_proj", f"{new}.self_attn.{x}_proj") for x in "qkvo")
    yield from ((f"{old}.self_attn.{x}_norm", f"{new}.self_attn.{x}_norm") for x in "qk")
    mlp = {"gate_proj": "gate", "up_proj": "fc1", "down_proj": "fc2"}
    yield from ((f"{old}.mlp.{x}", f"{new}.mlp.{y}") for x, y in mlp.items())
    yield from ((f"{old}.{x}", f"{new}.{y}") for x, y in names)


def of_llama(weights, **given):
    names = [pair for layer in range(3) for pair in llama_names(layer, **given)]
    names += [("model.embed_tokens", "transformer.wte"), ("model.norm", "transformer.ln_f"), ("lm_head", "lm_head")]
    return {f"{new}.weight": weights[f"{old}.weight"] for old, new in names if f"{old}.weight" in weights}


def of_gemma(weights):
    """It multiplies by 1 + weight, and the embeddings by sqrt(width)."""
    weights = {k: v + 1 if "norm" in k else v for k, v in weights.items()}
    names = (
        ("input_layernorm", "self_attn_norm"), ("post_attention_layernorm", "output_norms.self_attn"),
        ("pre_feedforward_layernorm", "mlp_norm"), ("post_feedforward_layernorm", "output_norms.mlp"),
    )  # fmt: skip
    ours = of_llama(weights, names=names)
    ours["transformer.wte.weight"] = ours["transformer.wte.weight"] * math.sqrt(24)
    return ours


def thirds(weights, old, new, split):
    """Queries, keys and values that the official class keeps in one."""
    return {f"{new}.{x}_proj.{kind}": part for kind in ("weight", "bias") if f"{old}.{kind}" in weights
            for x, part in zip("qkv", split(weights[f"{old}.{kind}"]), strict=True)}  # fmt: skip


def renamed(weights, names):
    return {f"{new}.{kind}": weights[f"{old}.{kind}"] for old, new in names for kind in ("weight", "bias")
            if f"{old}.{kind}" in weights}  # fmt: skip


def of_neox(weights):
    names = {
        "gpt_neox.embed_in": "transformer.wte", "gpt_neox.final_layer_norm": "transformer.ln_f", "lm_head": "lm_head",
    }  # fmt: skip
    ours = renamed(weights, names.items())
    for layer in range(3):
        old, new = f"gpt_neox.layers.{layer}", f"transformer.layers.{layer}"
        names = {
            "input_layernorm": "self_attn_norm", "post_attention_layernorm": "mlp_norm",
            "attention.dense": "self_attn.o_proj", "mlp.dense_h_to_4h": "mlp.fc1", "mlp.dense_4h_to_h": "mlp.fc2",
        }  # fmt: skip
        ours |= renamed(weights, [(f"{old}.{x}", f"{new}.{y}") for x, y in names.items()])
        # of each head in turn
        ours |= thirds(weights, f"{old}.attention.query_key_value", f"{new}.self_attn",
                       lambda w: [x.flatten(0, 1) for x in w.unflatten(0, (4, 3, 6)).unbind(1)])  # fmt: skip
    return ours


def of_mpt(weights):
    ours = renamed(weights, [("transformer.wte", "transformer.wte"), ("transformer.norm_f", "transformer.ln_f"),
                             ("lm_head", "lm_head")])  # fmt: skip
    for layer in range(3):
        old, new = f"transformer.blocks.{layer}", f"transformer.layers.{layer}"
        names = {"norm_1": "self_attn_norm", "norm_2": "mlp_norm", "attn.out_proj": "self_attn.o_proj",
                 "ffn.up_proj": "mlp.fc1", "ffn.down_proj": "mlp.fc2"}  # fmt: skip
        ours |= renamed(weights, [(f"{old}.{x}", f"{new}.{y}") for x, y in names.items()])
        ours |= thirds(weights, f"{old}.attn.Wqkv", f"{new}.self_attn", lambda w: w.chunk(3))
    return ours


OFFICIAL = {
    "llama": (LlamaConfig(**SIZE, intermediate_size=28, num_key_value_heads=2), of_llama,
              {**RMS, "num_key_value_heads": 2}, 1e-6),
    "qwen3": (Qwen3Config(**SIZE, intermediate_size=28, num_key_value_heads=1, head_dim=6), of_llama,
              {**RMS, "num_key_value_heads": 1, "qk_norm": True}, 1e-6),
    "gemma2": (Gemma2Config(**SIZE, intermediate_size=28, num_key_value_heads=4, head_dim=6, query_pre_attn_scalar=6,
                            attn_logit_softcapping=None, final_logit_softcapping=None,
                            layer_types=["full_attention"] * 3, hidden_activation="gelu"), of_gemma,
               {**RMS, "feed_forward": "geglu", "norm_place": "sandwich"}, 1e-6),
    "gpt_neox": (GPTNeoXConfig(**SIZE, intermediate_size=28, rotary_pct=1.0, use_parallel_residual=True), of_neox,
                 {"feed_forward": "gelu", "positions": "rotary", "parallel": True}, 1e-5),
    "mpt": (MptConfig(d_model=24, n_layers=3, n_heads=4, vocab_size=67), of_mpt,
            {"feed_forward": "gelu", "positions": "alibi"}, 1e-5),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("ragged", ["off", "on"])
def test_a_gpt2_with_the_blocks_of_another_model_is_that_model(name, ragged):
    """Its logits, on right-padded texts, and what it generates from the same weights."""
    config, convert, block, eps = OFFICIAL[name]
    torch.manual_seed(0)
    official = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in official.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    inner = 96 if name == "mpt" else 28
    mine = ZooGPT2LMHeadModel(
        ZooGPT2Config(
            **{**DECODER, "n_inner": inner}, layer_norm_epsilon=eps, block=block, tie_word_embeddings=False,
            eos_token_id=None,
        )
    ).eval()  # fmt: skip
    weights = convert(official.state_dict())
    missing, unexpected = mine.load_state_dict(weights, strict=False)
    # ours have biases everywhere, which are zero before they are trained
    assert not unexpected and not [name for name in missing if not name.endswith("bias")]
    mine.set_ragged(ragged)
    ids = torch.randint(3, 67, (3, 11))
    mask = torch.ones_like(ids)
    mask[1, 7:] = mask[2, 4:] = 0
    with torch.no_grad():
        expected, found = (model(input_ids=ids, attention_mask=mask).logits for model in (official, mine))
    assert_close(found[mask.bool()], expected[mask.bool()], name)
    # packed in its first pass
    mine.set_ragged("auto" if ragged == "on" else "off")
    made = [model.generate(ids[:1], max_new_tokens=6, do_sample=False, pad_token_id=0) for model in (official, mine)]
    assert torch.equal(*made)


def test_an_encoder_with_rotary_positions_turns_as_roformer_does():
    """RoFormer pairs neighbouring features: the same scores, from the same weights in another order."""
    config = RoFormerConfig(**SIZE, intermediate_size=28, embedding_size=24, hidden_act="gelu", type_vocab_size=3)
    torch.manual_seed(0)
    official = transformers.RoFormerModel(config).eval()
    native = native_class("bert", "BertModel")
    mine = native(
        native.config_class(**SIZE, intermediate_size=28, hidden_act="gelu", type_vocab_size=3,
                            block={"positions": "rotary"}),
        add_pooling_layer=False,
    ).eval()  # fmt: skip
    # evens, then odds, of each head
    order = torch.arange(24).view(4, 3, 2).transpose(1, 2).flatten()
    weights = {}
    for name, weight in official.state_dict().items():
        name = name.replace("encoder.layer.", "layers.")
        for old, new in (
            ("attention.self.query", "self_attn.q_proj"), ("attention.self.key", "self_attn.k_proj"),
            ("attention.self.value", "self_attn.v_proj"), ("attention.output.dense", "self_attn.o_proj"),
            ("attention.output.LayerNorm", "self_attn_norm"), ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"), ("output.LayerNorm", "mlp_norm"),
        ):  # fmt: skip
            name = name.replace(old, new)
        weights[name] = weight[order] if ".q_proj." in name or ".k_proj." in name else weight
    weights = {name: weight for name, weight in weights.items() if "embed_positions" not in name}
    mine.load_state_dict(weights)
    ids = torch.randint(3, 67, (2, 11))
    with torch.no_grad():
        assert_close(mine(ids).last_hidden_state, official(ids).last_hidden_state, "roformer")


def test_rotary_is_llamas_and_a_score_depends_on_the_distance_alone():
    heads, positions = torch.randn(2, 4, 9, 6), torch.arange(9).unsqueeze(0)
    config = LlamaConfig(hidden_size=24, num_attention_heads=4)
    cos, sin = LlamaRotaryEmbedding(config)(heads, positions)
    turned = rotate(heads, Rotary(6, 10_000.0)(positions))
    torch.testing.assert_close(turned, apply_rotary_pos_emb(heads, heads, cos, sin)[0])
    # packed: (tokens, heads, head_dim)
    packed = rotate(heads[0].transpose(0, 1), Rotary(6, 10_000.0)(positions[0]))
    torch.testing.assert_close(packed.transpose(0, 1), turned[0])
    query, key = (torch.randn(1, 1, 1, 6, dtype=torch.float64) for _ in range(2))

    def score(q_pos, kv_pos):
        at = [Rotary(6, 10_000.0)(torch.tensor([[position]])) for position in (q_pos, kv_pos)]
        return (rotate(query, at[0]) * rotate(key, at[1])).sum()

    assert math.isclose(score(5, 2), score(105, 102), rel_tol=1e-4)
    assert not math.isclose(score(5, 2), score(5, 3), rel_tol=1e-2)


@pytest.mark.parametrize("heads", [1, 4, 6, 12])
def test_alibi_is_that_of_the_paper(heads):
    bias = Alibi(heads)(torch.arange(7), torch.arange(7))
    assert bias.shape == (1, heads, 7, 7)
    # of the last query; the official bias leaves out what is the same for all keys
    official = build_mpt_alibi_tensor(heads, 7)[:, 0]
    torch.testing.assert_close(bias[0, :, -1], official)
    if heads == 4:
        assert Alibi(4).slopes().tolist() == [2**-2, 2**-4, 2**-6, 2**-8]
    assert torch.equal(bias, bias.transpose(2, 3)) and bool((bias.diagonal(dim1=2, dim2=3) == 0).all())


def test_sinusoids_are_those_of_the_paper():
    found = Sinusoids(6)(torch.tensor([[0, 3, 1000]]))
    for column, position in enumerate((0, 3, 1000)):
        expected = [f(position / 10_000 ** (2 * i / 6)) for i in range(3) for f in (math.sin, math.cos)]
        torch.testing.assert_close(found[0, column], torch.tensor(expected))


def test_tokens_are_not_drowned_by_sinusoids():
    """Vectors of tokens, which begin at a deviation of 0.02, count sqrt(width) times as much (section 3.4)."""
    config = ZooGPT2Config(n_embd=24, n_head=2, n_layer=0, vocab_size=9, block={"positions": "sinusoidal"})
    model, ids = ZooGPT2Model(config).eval(), torch.tensor([[5, 2, 7]])
    expected = model.ln_f(24**0.5 * model.wte(ids) + Sinusoids(24)(torch.arange(3)))
    torch.testing.assert_close(model(ids).last_hidden_state, expected)


SPECS = [
    BlockSpec(24, 4, 6, 28, "relu", norm=norm, norm_place=place, qk_norm=qk_norm, cross_attention=cross,
              num_key_value_heads=kv_heads)
    for norm, place, qk_norm, cross, kv_heads in itertools.product(
        ["layernorm", "rmsnorm"], ["pre", "sandwich"], [False, True], [False, True], [None, 1]
    )
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS, ids=range(len(SPECS)))
def test_parameters_are_those_of_the_block(spec):
    assert spec.num_parameters() == sum(p.numel() for p in Block(CONFIGS["bert"], spec, 0).parameters())


# every option once, in company; and what a family cannot have
BLOCKS = {
    "pre": {"norm_place": "pre"},
    "post": {"norm_place": "post"},
    "sandwich": {"norm_place": "sandwich", "norm": "layernorm", "qk_norm": True},
    "modern": {**RMS, "norm_place": "pre", "num_key_value_heads": 2, "qk_norm": True},
    "parallel": {"norm_place": "pre", "parallel": True, "feed_forward": "reglu", "num_key_value_heads": 1},
    "alibi": {"positions": "alibi", "feed_forward": "geglu"},
    "buckets": {"positions": "buckets", "feed_forward": "silu", "norm": "rmsnorm"},
    "sinusoidal": {"positions": "sinusoidal", "feed_forward": "relu"},
    "learned": {"positions": "learned", "feed_forward": "gelu"},
    "none": {"positions": "none", "qk_norm": True},
    "rotary": {"positions": "rotary", "rope_theta": 500.0, "norm_place": "post"},
}
REFUSED = {
    ("t5", "learned"): "no table of positions", ("t5", "parallel"): "waits for what the cross-attention reads",
    ("t5", "modern"): "features turn in pairs, and a head has 7", ("t5", "rotary"): "features turn in pairs",
    **{("vit", name): "lie on a grid" for name in ("modern", "rotary", "alibi", "buckets")},
}  # fmt: skip
assert {x for block in BLOCKS.values() for x in block} == set(OPTIONS)
assert {block.get("positions", "none") for block in BLOCKS.values()} == set(POSITIONS)
assert {block.get("feed_forward") for block in BLOCKS.values()} - {None} == set(FEED_FORWARDS)


def tiny(family, **fields):
    """A tiny model of a family, from random weights, its biases too."""
    native = native_class(family, OPENED[family][0])
    own = CONFIGS[family].to_dict()
    own.pop("model_type")
    torch.manual_seed(0)
    model = native(native.config_class.from_dict({**own, **fields}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("family", OPENED)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_runs_in_every_family_or_is_refused_in_words(family, name, tmp_path):
    """The same by eager, sdpa and packed, however padded; trained, saved, and opened again."""
    if (family, name) in REFUSED:
        with pytest.raises(StrictDataclassClassValidationError, match=REFUSED[family, name]):
            tiny(family, block=BLOCKS[name])
        return
    model = tiny(family, block=BLOCKS[name])
    official = OPENED[family][0]
    for padding in ("left", "holes") if family != "vit" else ("none",):
        inputs = make_inputs(family, official, padding)
        real = slice(None) if family in ("t5", "vit") else inputs["attention_mask"].bool()
        found = {}
        for implementation, ragged in (("eager", "off"), ("sdpa", "off"), ("sdpa", "on")):
            model.set_attn_implementation(implementation)
            model.set_ragged(ragged)
            with torch.no_grad():
                found[implementation, ragged] = model(**inputs).logits[real]
        first = found["eager", "off"]
        for way, logits in found.items():
            assert_close(logits, first, f"{way}, {padding}")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    again.set_ragged("on")
    assert again.config.block == BLOCKS[name]
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits[real], found["sdpa", "on"])
    labelled = make_inputs(family, official, padding, labels=True)
    again.train()(**labelled).loss.backward()
    untouched = [name for name, p in again.named_parameters() if p.grad is None and "pooler" not in name]
    assert not untouched
    with pytest.raises(ValueError, match="has no official form"):
        model.save_pretrained(tmp_path / "official", official=True)


# with other attentions, from as few tokens on as there are here
COMPANY = {
    "rotary, local": ({**RMS, "num_key_value_heads": 2, "qk_norm": True}, "local", {"window": 2}),
    "alibi, longformer": ({"positions": "alibi"}, "longformer", {"window": 1}),
    "buckets, strided": ({"positions": "buckets"}, "strided", {"stride": 3}),
    "alibi, cycle": ({"positions": "alibi"}, ["local", "full"], {"window": 2}),
    "rotary, performer": ({**RMS, "num_key_value_heads": 2}, "performer", {"features": 16}),
    "none, linear": ({"positions": "none", "qk_norm": True, "num_key_value_heads": 1}, "linear", {}),
}


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("name", COMPANY)
def test_blocks_and_attentions_go_together(family, name, monkeypatch):
    """The same masked, in blocks, and packed; the same cached as at once."""
    block, attention, kwargs = COMPANY[name]
    named = attention if isinstance(attention, str) else attention[0]
    more = {"d_kv": 6} if family == "t5" else {}
    model = tiny(family, block=block, attention=attention, attention_kwargs={named: kwargs}, **more)
    official = OPENED[family][0]
    inputs = make_inputs(family, official, "left", labels=True)
    real = slice(None) if family == "t5" else inputs["attention_mask"].bool()

    def run(ragged):
        model.set_ragged(ragged)
        model.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        return output.logits[real].detach(), {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }

    found = {"masked": run("off")}
    for module in (layer_masks, blocked_attention, masks, ragged_attention):
        monkeypatch.setattr(module, "BLOCKED_FROM", 2)
    found |= {"in blocks": run("off"), "packed": run("on")}
    logits, gradients = found["masked"]
    for way, (others, other_gradients) in found.items():
        assert_close(others, logits, way)
        assert gradients.keys() == other_gradients.keys()
        for parameter, gradient in gradients.items():
            assert_close(other_gradients[parameter], gradient, f"{way}: {parameter}")


@pytest.mark.parametrize("family", ["gpt2", "t5", "bert"])
@pytest.mark.parametrize("name", BLOCKS)
def test_each_cached_step_equals_the_whole_pass(family, name):
    if (family, name) in REFUSED:
        return
    fields = {"is_decoder": True} if family == "bert" else {}
    model = tiny(family, block=BLOCKS[name], eos_token_id=None, **fields)
    if family == "bert":
        model = native_class("bert", "BertLMHeadModel")(model.config).eval()
    ids = make_inputs("gpt2", "GPT2LMHeadModel", "none")["input_ids"]
    made = model.generate(ids, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        if family == "t5":
            logits, before = model(input_ids=ids, decoder_input_ids=made.sequences).logits, 0
        else:
            logits, before = model(input_ids=made.sequences).logits, ids.shape[1] - 1
    for step, cached in enumerate(made.logits):
        assert_close(cached, logits[:, before + step], f"step {step}")


def test_a_bias_is_made_for_the_pairs_of_blocks_alone(monkeypatch):
    """No (length, length) of it in a long text with a pattern."""
    model = tiny("bert", block={"positions": "alibi"}, attention="local", attention_kwargs={"local": {"window": 8}})
    made = []
    whole = Alibi.forward
    monkeypatch.setattr(Alibi, "forward", lambda *a: made.append(whole(*a)) or made[-1])
    length = 2 * masks.BLOCKED_FROM
    with torch.no_grad():
        model(torch.randint(3, 60, (1, length)))
    assert made and sum(bias.numel() for bias in made) < 3 * 4 * length * length / 4


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_bias_in_a_wide_grid_of_short_texts(family):
    """The grid is wide enough for blocks, the texts are not: every way computes the same."""
    block = {"positions": "alibi"} if family == "bert" else {}
    model = tiny(family, block=block, attention="local", attention_kwargs={"local": {"window": 8}})
    model = getattr(model, "encoder", model)
    ids, mask = torch.full((2, masks.BLOCKED_FROM + 8), 1), torch.zeros(2, masks.BLOCKED_FROM + 8, dtype=torch.long)
    ids[:, :40], mask[:, :40] = torch.randint(3, 60, (2, 40)), 1
    with torch.no_grad():
        model.set_ragged("off")
        wide = model(input_ids=ids, attention_mask=mask)[0]
        model.set_ragged("on")
        assert_close(wide[:, :40], model(input_ids=ids, attention_mask=mask)[0][:, :40], "packed")
        assert_close(wide[:, :40], model(input_ids=ids[:, :40])[0], "without padding")
