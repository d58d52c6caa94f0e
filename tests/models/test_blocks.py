"""What a spec says about its block (parameters, FLOPs, bytes) against the real block; losses at the start."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, GPT2Config, RobertaConfig, T5Config
from transformers.core_model_loading import revert_weight_conversion

import zoo.models.linear
from zoo.models.blocks import Block
from zoo.models.modeling_bert import block_spec as bert_spec
from zoo.models.spec import BlockSpec

from .tiny import native_class

GRID = [
    BlockSpec(
        hidden_size=24, num_heads=6, head_dim=5, ffn_size=36, activation="relu", gated=gated, bias=bias, norm=norm,
        cross_attention=cross, num_key_value_heads=kv_heads,
    )
    for gated, bias, norm, cross, kv_heads in itertools.product(
        [False, True], [False, True], ["layernorm", "rmsnorm"], [False, True], [None, 2]
    )
]  # fmt: skip
EAGER = SimpleNamespace(_attn_implementation="eager")
specs = pytest.mark.parametrize("spec", GRID, ids=range(len(GRID)))


@specs
def test_parameters_are_those_of_the_block(spec):
    block = Block(EAGER, spec, 0)
    assert spec.num_parameters() == sum(p.numel() for p in block.parameters())
    linear = [m.weight.numel() for m in block.modules() if isinstance(m, torch.nn.Linear)]
    assert spec.matrix_parameters() == sum(linear)


@specs
def test_flops_are_those_torch_counts(spec, monkeypatch):
    # torch counts the products of one of its two libraries only
    monkeypatch.setattr(zoo.models.linear, "onednn_is_faster", lambda: False)
    length, batch = 10, 3
    block, states = Block(EAGER, spec, 0), torch.randn(3, length, 24)
    for memory_length in (length, 5, 30) if spec.cross_attention else (0,):
        memory = torch.randn(3, memory_length, 24) if memory_length else None
        with FlopCounterMode(display=False) as counter:
            block(states, encoder_hidden_states=memory)
        assert counter.get_total_flops() == batch * length * spec.flops_per_token(length, memory_length)


@specs
def test_cached_values_are_the_key_and_value_projections(spec):
    attention = Block(EAGER, spec, 0).self_attn
    token = torch.randn(1, 1, 24)
    values = attention.k_proj(token).numel() + attention.v_proj(token).numel()
    assert spec.cache_bytes_per_token(bytes_per_value=2) == 2 * values


def test_activation_bytes_of_megatron():
    # Korthikanti et al. 2022, arXiv 2205.05198, equation 2: s b h (34 + 5 a s / h)
    for h, a, s, b in ((768, 12, 512, 1), (1024, 16, 128, 8), (6144, 64, 2048, 4)):
        spec = BlockSpec(h, num_heads=a, head_dim=h // a, ffn_size=4 * h, activation="gelu")
        assert spec.activation_bytes(s, b) == s * b * (34 * h + 5 * a * s)
    assert bert_spec(BertConfig()).activation_bytes(512) == 27.75 * 2**20


def bert(layers, width):
    return BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width
    )  # fmt: skip


def roberta(layers, width):
    return RobertaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width,
        max_position_embeddings=514, type_vocab_size=1,
    )  # fmt: skip


def gpt2(layers, width, heads):
    return GPT2Config(n_layer=layers, n_embd=width, n_head=heads)


def t5(layers, d_model, d_ff, heads, **kwargs):
    return T5Config(d_model=d_model, d_ff=d_ff, num_layers=layers, num_heads=heads, **kwargs)


def native_config(family, official, config):
    return native_class(family, official).config_class.from_dict(config.to_dict())


# ln V + 0.30 for BERT and GPT-2; T5 v1.0 starts at 11.02: shared/design/reference-values.md, "Objectives"
FIRST_LOSSES = {
    "bert": ("BertForMaskedLM", bert(2, 768), 30_522, 0.30),
    "roberta": ("RobertaForMaskedLM", roberta(2, 768), 50_265, 0.30),
    "gpt2": ("GPT2LMHeadModel", gpt2(2, 768, 12), 50_257, 0.30),
    "t5": ("T5ForConditionalGeneration", t5(6, 512, 2048, 8, decoder_start_token_id=0), 32_128, 0.70),
}


@pytest.mark.parametrize("family", FIRST_LOSSES)
def test_first_loss_is_near_that_of_guessing(family):
    official, config, vocab, slack = FIRST_LOSSES[family]
    torch.manual_seed(0)
    native = native_class(family, official)(native_config(family, official, config)).eval()
    assert native.config.vocab_size == vocab
    with torch.device("meta"):
        model = getattr(transformers, official)(config).eval()
    model.load_state_dict(revert_weight_conversion(native, native.state_dict()), strict=True, assign=True)
    ids = torch.randint(vocab, (2, 32))
    labels = ids if family == "gpt2" else torch.randint(vocab, (2, 32))
    inputs = {"input_ids": ids, "labels": labels}
    if family in ("bert", "roberta"):
        # buffers of the official class, which has none on meta
        inputs |= {"position_ids": torch.arange(32)[None], "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        loss, expected = native(**inputs).loss, model(**inputs).loss
    assert abs(loss - expected) < 1e-5
    assert -0.05 < loss - math.log(vocab) < slack
