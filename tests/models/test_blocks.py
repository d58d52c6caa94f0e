"""What a spec says about its block (parameters, FLOPs, bytes) against the real block, and published sizes."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AlbertConfig, BertConfig, DistilBertConfig, GPT2Config, RobertaConfig, T5Config, ViTConfig
from transformers.core_model_loading import revert_weight_conversion

from zoo.models.blocks import Block, BlockSpec
from zoo.models.modeling_bert import block_spec as bert_spec
from zoo.models.modeling_gpt2 import block_spec as gpt2_spec

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
def test_flops_are_those_torch_counts(spec):
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


def test_cache_bytes_of_gpt2_and_gpt3():
    # 2 x layers x width x 2 bytes
    small = GPT2Config()
    assert sum(gpt2_spec(small, i).cache_bytes_per_token() for i in range(small.n_layer)) == 36_864
    large = GPT2Config(n_embd=12288, n_layer=96, n_head=96)
    assert sum(gpt2_spec(large, i).cache_bytes_per_token() for i in range(96)) == 4_718_592


def test_training_flops_of_gpt2():
    # PaLM, arXiv 2204.02311, appendix B: 6 N + 12 L H Q T, here with the weights that multiply (embeddings apart)
    config = GPT2Config()
    matrices = 12 * 12 * 768**2
    blocks = sum(3 * gpt2_spec(config, i).flops_per_token(1024) for i in range(config.n_layer))
    assert blocks == 6 * matrices + 12 * 12 * 768 * 1024
    # nanoGPT's figure counts biases, norms and wte as well: 6 x 123,653,376 + the same attention term
    rest = 124_439_808 - 1024 * 768 - matrices
    assert blocks + 6 * rest == 855_166_464


def bert(layers, width):
    return BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width
    )  # fmt: skip


def roberta(layers, width):
    return RobertaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width,
        max_position_embeddings=514, type_vocab_size=1,
    )  # fmt: skip


def albert(layers, width, heads):
    return AlbertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width
    )


def gpt2(layers, width, heads):
    return GPT2Config(n_layer=layers, n_embd=width, n_head=heads)


def t5(layers, d_model, d_ff, heads, **kwargs):
    return T5Config(d_model=d_model, d_ff=d_ff, num_layers=layers, num_heads=heads, **kwargs)


LM, T5LM, VIT = "GPT2LMHeadModel", "T5ForConditionalGeneration", "ViTForImageClassification"
V11 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def vit(width, heads, layers=12, patch=16, image=224):
    return ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
        patch_size=patch, image_size=image, num_labels=1000,
    )  # fmt: skip


SIZES = {
    # Turc et al. 2019, arXiv 1908.08962, table 1: 4.4, 11.3, 29.1, 41.7 M; Devlin et al. 2018, section 3: 110, 340 M
    "bert-tiny": ("bert", "BertModel", bert(2, 128), 4_385_920),
    "bert-mini": ("bert", "BertModel", bert(4, 256), 11_170_560),
    "bert-small": ("bert", "BertModel", bert(4, 512), 28_763_648),
    "bert-medium": ("bert", "BertModel", bert(8, 512), 41_373_184),
    "bert-base": ("bert", "BertModel", bert(12, 768), 109_482_240),
    "bert-base mlm": ("bert", "BertForMaskedLM", bert(12, 768), 109_514_298),
    "bert-base pretraining": ("bert", "BertForPreTraining", bert(12, 768), 110_106_428),
    "bert-large": ("bert", "BertModel", bert(24, 1024), 335_141_888),
    "bert-large pretraining": ("bert", "BertForPreTraining", bert(24, 1024), 336_226_108),
    # Liu et al. 2019, section 3.1, 5.1: 125, 355 M
    "roberta-base": ("roberta", "RobertaModel", roberta(12, 768), 124_645_632),
    "roberta-base mlm": ("roberta", "RobertaForMaskedLM", roberta(12, 768), 124_697_433),
    "roberta-large": ("roberta", "RobertaModel", roberta(24, 1024), 355_359_744),
    "roberta-large mlm": ("roberta", "RobertaForMaskedLM", roberta(24, 1024), 355_412_057),
    # Lan et al. 2019, table 1: 12, 18 M
    "albert-base": ("albert", "AlbertModel", albert(12, 768, 12), 11_683_584),
    "albert-large": ("albert", "AlbertModel", albert(24, 1024, 16), 17_683_968),
    # Sanh et al. 2019, table 3: 66 M
    "distilbert": ("distilbert", "DistilBertModel", DistilBertConfig(), 66_362_880),
    "distilbert mlm": ("distilbert", "DistilBertForMaskedLM", DistilBertConfig(), 66_985_530),
    # Radford et al. 2019, table 2, corrected in the release: 124, 355, 774, 1558 M
    "gpt2": ("gpt2", LM, gpt2(12, 768, 12), 124_439_808),
    "gpt2-medium": ("gpt2", LM, gpt2(24, 1024, 16), 354_823_168),
    "gpt2-large": ("gpt2", LM, gpt2(36, 1280, 20), 774_030_080),
    "gpt2-xl": ("gpt2", LM, gpt2(48, 1600, 25), 1_557_611_200),
    # Raffel et al. 2019, section 3.7: 60, 220, 770 M, 3 and 11 B; v1.1: the T5X model list, 77, 250, 800 M
    "t5-small": ("t5", T5LM, t5(6, 512, 2048, 8), 60_506_624),
    "t5-base": ("t5", T5LM, t5(12, 768, 3072, 12), 222_903_552),
    "t5-large": ("t5", T5LM, t5(24, 1024, 4096, 16), 737_668_096),
    "t5-3b": ("t5", T5LM, t5(24, 1024, 16384, 32, d_kv=128), 2_851_598_336),
    "t5-11b": ("t5", T5LM, t5(24, 1024, 65536, 128, d_kv=128), 11_307_321_344),
    "t5-v1.1-small": ("t5", T5LM, t5(8, 512, 1024, 6, **V11), 76_961_152),
    "t5-v1.1-base": ("t5", T5LM, t5(12, 768, 2048, 12, **V11), 247_577_856),
    # Touvron et al. 2020 (arXiv 2012.12877), table 1: 5, 22, 86 M; Dosovitskiy et al. 2020, table 1: 86, 307 M
    "vit-ti/16": ("vit", VIT, vit(192, 3), 5_717_416),
    "vit-s/16": ("vit", VIT, vit(384, 6), 22_050_664),
    "vit-b/16": ("vit", VIT, vit(768, 12), 86_567_656),
    "vit-b/32": ("vit", VIT, vit(768, 12, patch=32), 88_224_232),
    "vit-l/16": ("vit", VIT, vit(1024, 16, layers=24), 304_326_632),
    "vit-b/16 at 384": ("vit", VIT, vit(768, 12, image=384), 86_859_496),
    "t5-v1.1-large": ("t5", T5LM, t5(24, 1024, 2816, 16, **V11), 783_150_080),
}


def native_config(family, official, config):
    return native_class(family, official).config_class.from_dict(config.to_dict())


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    family, official, config, count = SIZES[name]
    with torch.device("meta"):
        model = native_class(family, official)(native_config(family, official, config))
    assert model.num_parameters() == count


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
