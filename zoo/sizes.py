"""The published sizes of the families by name: what their official configs say beside the defaults.

`size_counts` writes what each costs into sizes.json; `fresh.fresh_config` makes a config of one.
"""

from typing import Any


def _bert(layers: int, width: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
    }


def _roberta(layers: int, width: int) -> dict[str, Any]:
    # positions are counted on from the padding id, which is 1: 512 tokens have 514
    return {**_bert(layers, width), "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}


def _albert(layers: int, width: int, heads: int) -> dict[str, Any]:
    # version 2: no dropout
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _gpt2(layers: int, width: int, heads: int) -> dict[str, Any]:
    return {"n_layer": layers, "n_embd": width, "n_head": heads}


def _gpt3(layers: int, width: int, heads: int) -> dict[str, Any]:
    # Dense and locally banded layers take turns (section 2.1). The paper does not say how wide the band is: the 256 is
    # ours.
    return {
        **_gpt2(layers, width, heads),
        "n_positions": 2048,
        "attention": ["full", "local"],
        "attention_kwargs": {"local": {"window": 256}},
    }


def _t5(layers: int, width: int, heads: int, ffn: int, head_dim: int = 64) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "d_model": width,
        "num_heads": heads,
        "d_ff": ffn,
        "d_kv": head_dim,
        "decoder_start_token_id": 0,
    }


def _t5_v1_1(layers: int, width: int, heads: int, ffn: int) -> dict[str, Any]:
    return {**_t5(layers, width, heads, ffn), "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


# Dosovitskiy et al. 2020 (arXiv 2010.11929), table 1; tiny and small: Touvron et al. 2020 (arXiv 2012.12877), table 1.
# (layers, width, heads)
_VIT = {
    "tiny": (12, 192, 3),
    "small": (12, 384, 6),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
    "huge": (32, 1280, 16),
}


def _vit(layers: int, width: int, heads: int, patch: int, image: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "patch_size": patch,
        "encoder_stride": patch,
        "image_size": image,
        "pooler_output_size": width,
        "num_labels": 1000,
    }


# name -> (family, fields of its config)
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    # Turc et al. 2019 (arXiv 1908.08962), table 1: on the hub google/bert_uncased_L-2_H-128_A-2 and so on
    "bert-tiny": ("bert", _bert(2, 128)),
    "bert-mini": ("bert", _bert(4, 256)),
    "bert-small": ("bert", _bert(4, 512)),
    "bert-medium": ("bert", _bert(8, 512)),
    # Devlin et al. 2018 (arXiv 1810.04805), section 3
    "bert-base": ("bert", _bert(12, 768)),
    "bert-large": ("bert", _bert(24, 1024)),
    # Liu et al. 2019 (arXiv 1907.11692), sections 3.1 and 5
    "roberta-base": ("roberta", _roberta(12, 768)),
    "roberta-large": ("roberta", _roberta(24, 1024)),
    # Lan et al. 2019 (arXiv 1909.11942), table 1
    "albert-base": ("albert", _albert(12, 768, 12)),
    "albert-large": ("albert", _albert(24, 1024, 16)),
    "albert-xlarge": ("albert", _albert(24, 2048, 16)),
    "albert-xxlarge": ("albert", _albert(12, 4096, 64)),
    # Sanh et al. 2019 (arXiv 1910.01108): the defaults
    "distilbert-base": ("distilbert", {"n_layers": 6, "dim": 768, "n_heads": 12, "hidden_dim": 3072}),
    # Radford et al. 2019, table 2
    "gpt2": ("gpt2", _gpt2(12, 768, 12)),
    "gpt2-medium": ("gpt2", _gpt2(24, 1024, 16)),
    "gpt2-large": ("gpt2", _gpt2(36, 1280, 20)),
    "gpt2-xl": ("gpt2", _gpt2(48, 1600, 25)),
    # Brown et al. 2020 (arXiv 2005.14165), table 2.1
    "gpt3-125m": ("gpt2", _gpt3(12, 768, 12)),
    "gpt3-350m": ("gpt2", _gpt3(24, 1024, 16)),
    "gpt3-760m": ("gpt2", _gpt3(24, 1536, 16)),
    # the paper's 24 heads of 128 do not make up a width of 2048; 16 do
    "gpt3-1.3b": ("gpt2", _gpt3(24, 2048, 16)),
    "gpt3-2.7b": ("gpt2", _gpt3(32, 2560, 32)),
    "gpt3-6.7b": ("gpt2", _gpt3(32, 4096, 32)),
    # the paper's width of 5140 is a misprint: 40 heads of 128
    "gpt3-13b": ("gpt2", _gpt3(40, 5120, 40)),
    "gpt3-175b": ("gpt2", _gpt3(96, 12288, 96)),
    # Raffel et al. 2019 (arXiv 1910.10683), section 3.7
    "t5-small": ("t5", _t5(6, 512, 8, 2048)),
    "t5-base": ("t5", _t5(12, 768, 12, 3072)),
    "t5-large": ("t5", _t5(24, 1024, 16, 4096)),
    "t5-3b": ("t5", _t5(24, 1024, 32, 16384, head_dim=128)),
    "t5-11b": ("t5", _t5(24, 1024, 128, 65536, head_dim=128)),
    # the same authors' release of 2020: gated, and the head is not the embeddings
    "t5-v1_1-small": ("t5", _t5_v1_1(8, 512, 6, 1024)),
    "t5-v1_1-base": ("t5", _t5_v1_1(12, 768, 12, 2048)),
    "t5-v1_1-large": ("t5", _t5_v1_1(24, 1024, 16, 2816)),
    "t5-v1_1-xl": ("t5", _t5_v1_1(24, 2048, 32, 5120)),
    "t5-v1_1-xxl": ("t5", _t5_v1_1(24, 4096, 64, 10240)),
    **{
        f"vit-{name}-patch{patch}-{image}": ("vit", _vit(*shape, patch, image))
        for name, shape in _VIT.items()
        for patch in (14, 16, 32)
        for image in (224, 384, 512)
        if image % patch == 0
    },
}
