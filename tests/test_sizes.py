"""Published sizes: their parameters by name, what is counted of them, and configs made from them."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import zoo.size_counts
from zoo.errors import UserError
from zoo.fresh import fresh_config
from zoo.models import FAMILIES
from zoo.size_counts import T5_LENGTH, counted, layers, max_length, on_meta
from zoo.sizes import SIZES

SHIPPED = json.loads(Path(zoo.size_counts.__file__).with_name("sizes.json").read_text())

# shared/design/reference-values.md, "Parameter counts": size, class, count; beside them what the papers say
PUBLISHED = [
    # Turc et al. 2019, arXiv 1908.08962, table 1: 4.4, 11.3, 29.1, 41.7 M; Devlin et al. 2018, section 3: 110, 340 M
    ("bert-tiny", "BertModel", 4_385_920),
    ("bert-mini", "BertModel", 11_170_560),
    ("bert-small", "BertModel", 28_763_648),
    ("bert-medium", "BertModel", 41_373_184),
    ("bert-base", "BertModel", 109_482_240),
    ("bert-base", "BertForMaskedLM", 109_514_298),
    ("bert-base", "BertForPreTraining", 110_106_428),
    ("bert-large", "BertModel", 335_141_888),
    ("bert-large", "BertForPreTraining", 336_226_108),
    # Liu et al. 2019, section 3.1, 5.1: 125, 355 M
    ("roberta-base", "RobertaModel", 124_645_632),
    ("roberta-base", "RobertaForMaskedLM", 124_697_433),
    ("roberta-large", "RobertaModel", 355_359_744),
    ("roberta-large", "RobertaForMaskedLM", 355_412_057),
    # Lan et al. 2019, table 1: 12, 18 M
    ("albert-base", "AlbertModel", 11_683_584),
    ("albert-large", "AlbertModel", 17_683_968),
    # Sanh et al. 2019, table 3: 66 M
    ("distilbert-base", "DistilBertModel", 66_362_880),
    ("distilbert-base", "DistilBertForMaskedLM", 66_985_530),
    # Radford et al. 2019, table 2, corrected in the release: 124, 355, 774, 1558 M
    ("gpt2", "GPT2LMHeadModel", 124_439_808),
    ("gpt2-medium", "GPT2LMHeadModel", 354_823_168),
    ("gpt2-large", "GPT2LMHeadModel", 774_030_080),
    ("gpt2-xl", "GPT2LMHeadModel", 1_557_611_200),
    # Raffel et al. 2019, section 3.7: 60, 220, 770 M, 3 and 11 B; v1.1: the T5X model list, 77, 250, 800 M
    ("t5-small", "T5ForConditionalGeneration", 60_506_624),
    ("t5-base", "T5ForConditionalGeneration", 222_903_552),
    ("t5-large", "T5ForConditionalGeneration", 737_668_096),
    ("t5-3b", "T5ForConditionalGeneration", 2_851_598_336),
    ("t5-11b", "T5ForConditionalGeneration", 11_307_321_344),
    ("t5-v1_1-small", "T5ForConditionalGeneration", 76_961_152),
    ("t5-v1_1-base", "T5ForConditionalGeneration", 247_577_856),
    ("t5-v1_1-large", "T5ForConditionalGeneration", 783_150_080),
    # Touvron et al. 2020 (arXiv 2012.12877), table 1: 5, 22, 86 M; Dosovitskiy et al. 2020, table 1: 86, 307 M
    ("vit-tiny-patch16-224", "ViTForImageClassification", 5_717_416),
    ("vit-small-patch16-224", "ViTForImageClassification", 22_050_664),
    ("vit-base-patch16-224", "ViTForImageClassification", 86_567_656),
    ("vit-base-patch32-224", "ViTForImageClassification", 88_224_232),
    ("vit-large-patch16-224", "ViTForImageClassification", 304_326_632),
    ("vit-base-patch16-384", "ViTForImageClassification", 86_859_496),
]
# the same file, the GPT-3 family, in millions; Brown et al. 2020, table 2.1, rounds them to its names
GPT3 = {
    "125m": 125.2, "350m": 355.9, "760m": 760.3, "1.3b": 1315.7, "2.7b": 2651.6, "6.7b": 6658.4, "13b": 12853.4,
    "175b": 174_604.3,
}  # fmt: skip


@pytest.mark.parametrize(("name", "official", "count"), PUBLISHED)
def test_published_parameters(name, official, count):
    family, _ = SIZES[name]
    with torch.device("meta"):
        model = getattr(FAMILIES[family][0], f"Zoo{official}")(fresh_config(name))
    assert model.num_parameters() == count


def test_parameters_of_gpt3():
    sizes = {name.removeprefix("gpt3-"): SHIPPED[name]["parameters"] for name in SIZES if name.startswith("gpt3-")}
    assert {name: round(count / 1e6, 1) for name, count in sizes.items()} == GPT3
    for name in GPT3:
        config = fresh_config(f"gpt3-{name}")
        assert (config.n_positions, config.attention) == (2048, ["full", "local"])


@pytest.mark.parametrize("name", SIZES)
def test_what_is_shipped_is_what_is_counted(name):
    """If not: python -m zoo.size_counts"""
    assert SHIPPED[name] == counted(name)


def test_nothing_else_is_shipped():
    assert list(SHIPPED) == list(SIZES)
    assert {family for family, _ in SIZES.values()} == set(FAMILIES)


# of each family what differs, in small
SHRUNK = {
    "bert-tiny": {"vocab_size": 50},
    "roberta-base": {"vocab_size": 50, "num_hidden_layers": 2},
    "albert-base": {"vocab_size": 50, "num_hidden_layers": 3},
    "distilbert-base": {"vocab_size": 50, "n_layers": 2},
    "gpt3-125m": {"vocab_size": 50, "n_layer": 3},
    "t5-small": {"vocab_size": 50, "num_layers": 2, "num_decoder_layers": 3},
    "t5-v1_1-small": {"vocab_size": 50, "num_layers": 2, "num_decoder_layers": 1},
    "vit-tiny-patch32-384": {"num_hidden_layers": 2},
}


@pytest.mark.parametrize("name", SHRUNK)
def test_flops_are_those_torch_counts(name):
    model = on_meta(name, **SHRUNK[name]).eval()
    model.set_attn_implementation("eager")
    length = tokens = max_length(model.config)
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "attention_mask": None}
    if name.startswith("t5"):
        inputs["decoder_input_ids"], tokens = ids, 2 * length
    if name.startswith("vit"):
        inputs = {"pixel_values": torch.zeros(1, 3, 384, 384, device="meta")}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    assert counter.get_total_flops() // tokens == zoo.size_counts.flops_per_token(model)


def test_lengths():
    # ViT's tokens: shared/design/reference-values.md, "Attention"
    vit = {"patch16-224": 197, "patch16-384": 577, "patch16-512": 1025, "patch14-224": 257}
    lengths = {name: max_length(fresh_config(f"vit-base-{name}")) for name in vit}
    assert lengths == vit
    expected = {"bert-base": 512, "roberta-base": 512, "gpt2": 1024, "gpt3-175b": 2048, "t5-11b": T5_LENGTH}
    assert {name: max_length(fresh_config(name)) for name in expected} == expected


def test_training_flops_of_gpt2():
    # shared/design/reference-values.md: 6 N + 12 L d s at 1,024 tokens, N without positions, biases and norms with it
    vectors = sum(p.numel() for p in on_meta("gpt2").parameters() if p.ndim == 1)
    assert 3 * SHIPPED["gpt2"]["flops_per_token"] + 6 * vectors == 855_166_464


@pytest.mark.parametrize(("name", "tokens", "flops"), [("gpt3-175b", 300e9, 3.14e23), ("bert-base", 250e9, 1.64e20)])
def test_training_flops_of_papers(name, tokens, flops):
    # Brown et al. 2020, table D.1: 6 a parameter, attention not counted
    spec_flops = 3 * SHIPPED[name]["flops_per_token"]
    config = fresh_config(name)
    attention = 12 * config.num_hidden_layers * config.hidden_size * max_length(config)
    assert (spec_flops - attention) * tokens == pytest.approx(flops, rel=0.01)


def test_bytes():
    # shared/design/reference-values.md: the cache at 16 bits; Adam, 16 bytes a parameter
    assert SHIPPED["gpt2"]["cache_bytes_per_token"] == 36_864
    assert SHIPPED["gpt3-175b"]["cache_bytes_per_token"] == 4_718_592
    assert (
        SHIPPED["bert-base"]["cache_bytes_per_token"] == SHIPPED["vit-base-patch16-224"]["cache_bytes_per_token"] == 0
    )
    assert SHIPPED["gpt2"]["train_bytes"] == 16 * 124_439_808 and SHIPPED["gpt2"]["serve_bytes"] == 4 * 124_439_808
    # ZeRO, arXiv 1910.02054, figure 1: 7.5 B parameters, 120 GB
    assert zoo.size_counts.TRAIN_BYTES * 7.5e9 == 120e9


def test_heads_of_gpt3():
    # Brown et al. 2020, table 2.1, with 16 heads instead of 24 for 1.3 B
    dims = {name: layers(fresh_config(f"gpt3-{name}"))[0].head_dim for name in GPT3}
    expected = dict.fromkeys(GPT3, 128) | {"125m": 64, "350m": 64, "760m": 96, "2.7b": 80}
    assert dims == expected


# Configs


def test_a_fresh_config_takes_changes():
    config = fresh_config("bert-tiny", vocab_size=99, id2label={0: "a", 1: "b", 2: "c"})
    assert (config.model_type, config.vocab_size, config.hidden_size, config.num_labels) == ("zoo_bert", 99, 128, 3)
    assert fresh_config("vit-tiny-patch16-224").num_labels == 1000
    assert fresh_config("vit-tiny-patch16-224", id2label={0: "a", 1: "b", 2: "c"}).num_labels == 3
    assert fresh_config("vit-tiny-patch16-224", num_labels=7).num_labels == 7
    full = fresh_config("gpt3-125m", attention="full")
    assert (full.attention, full.attention_kwargs) == ("full", {})
    assert SIZES["gpt3-125m"][1]["attention_kwargs"] == {"local": {"window": 256}}, "nothing changes the table"


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("bert-bas", {}, "model bert-bas: no size or native family; did you mean bert-base?"),
        ("xyz", {}, "model xyz: no size or native family; zoo ls models shows all; or use implementation: official"),
        ("gpt2", {"n_layers": 3}, "model.config.n_layers: ZooGPT2Config has no such field; did you mean n_layer?"),
        ("gpt2", {"n_head": 7}, "n_embd 768 is not a multiple of n_head 7"),
        ("gpt2", {"n_layer": "3"}, "model gpt2: its config is refused: .*n_layer"),
        ("bert-base", {"attention": "lokal"}, "no variant is called 'lokal'"),
    ],
)
def test_what_is_refused(name, changes, says):
    with pytest.raises(UserError, match=says):
        fresh_config(name, **changes)
