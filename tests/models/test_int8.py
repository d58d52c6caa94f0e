"""Weights of 8 bits: how far they are from those they were made from, tied, saved, opened; and what is refused."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn

from zoo.models import int8
from zoo.models.int8 import Int8Linear, rounded
from zoo.quantized import int8_model

from .tiny import VOCAB, config_for, make_inputs, make_pair, native_class

MADE = {
    "bert": "BertForSequenceClassification", "roberta": "RobertaForMaskedLM", "albert": "AlbertForMaskedLM",
    "distilbert": "DistilBertForTokenClassification", "gpt2": "GPT2LMHeadModel", "t5": "T5ForConditionalGeneration",
    "vit": "ViTForImageClassification",
}  # fmt: skip


def test_no_weight_moves_by_more_than_its_row_allows():
    weight = torch.randn(7, 40) * torch.logspace(-3, 3, 7)[:, None]
    weight[3] = 0.0
    values, scale = rounded(weight)
    off = (values * scale[:, None] - weight).abs()
    assert values.dtype == torch.int8 and bool((off <= weight.abs().amax(1, keepdim=True) / 254 * 1.0001).all())
    assert bool((values.abs().amax(1)[[0, 6]] == 127).all()) and not values[3].any()


@pytest.mark.parametrize("rows", [(0,), (1,), (3,), (2, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_near_its_weight(rows, bias, monkeypatch):
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 24, bias=bias), torch.randn(*rows, 64)
    made = Int8Linear(64, 24, bias, smooth=False)
    made.fill(layer)
    with torch.no_grad():
        expected, found = layer(x), made(x)
        assert found.shape == expected.shape and (found - expected).norm() <= 0.02 * expected.norm()
        # where torch has no engine for it, the restored weight multiplies: only the weight is rounded
        monkeypatch.setattr(int8, "_ENGINES", ())
        assert (made(x) - expected).norm() <= 0.01 * expected.norm()
        assert made(x.double()).dtype == torch.float64


def test_smoothing_leaves_steps_for_the_small_features():
    """One feature a hundred times the others takes nearly all of the 256 steps, unless it is divided first."""
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 24), torch.randn(50, 64)
    x[:, 5] *= 100
    with torch.no_grad():
        layer.weight[:, 5] *= 0.01
        off = {}
        for smooth in (False, True):
            made = Int8Linear(64, 24, True, smooth)
            made.fill(layer, x.abs().amax(0))
            off[smooth] = float((made(x) - layer(x)).norm() / layer(x).norm())
            torch.testing.assert_close(made.restored(), layer.weight, atol=2e-3, rtol=0)
    assert off[True] < off[False] / 5


@pytest.mark.parametrize("family", MADE)
def test_a_model_is_near_and_opens_again(family, tmp_path):
    _, source = make_pair(family, MADE[family], tmp_path / "source")
    source.eval()
    model, inputs = int8_model(source, "dynamic", {}), make_inputs(family, MADE[family])
    with torch.no_grad():
        expected, found = source(**inputs).logits, model(**inputs).logits
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()
    model.save_pretrained(tmp_path / "made")
    again, info = type(source).from_pretrained(tmp_path / "made", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, found)
    kinds = {type(module) for name, module in again.named_modules() if any(part.isdigit() for part in name.split("."))}
    assert Int8Linear in kinds and nn.Linear not in kinds
    with pytest.raises(ValueError, match="weights of 8 bits has no official form"):
        model.save_pretrained(tmp_path / "official", official=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"block": {"norm": "rmsnorm", "norm_place": "pre", "feed_forward": "swiglu", "positions": "rotary"}},
        {"block": {"positions": "alibi", "qk_norm": True, "num_key_value_heads": 2}},
        {"attention": "linformer", "attention_kwargs": {"linformer": {"rank": 4}}},
        {"attention": "performer", "attention_kwargs": {"performer": {"features": 16}}},
        {"attention": ["full", "nystrom"], "attention_kwargs": {"nystrom": {"landmarks": 3}}},
    ],
    ids=str,
)
def test_blocks_and_kernels_stay(fields, tmp_path):
    native = native_class("bert", MADE["bert"])
    config = config_for("bert", MADE["bert"]).to_dict() | fields
    source = native._from_config(native.config_class.from_dict(config | {"model_type": "zoo_bert"})).eval()
    model, inputs = int8_model(source, "dynamic", {}), make_inputs("bert", MADE["bert"])
    with torch.no_grad():
        expected, found = source(**inputs).logits, model(**inputs).logits
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(native.from_pretrained(tmp_path).eval()(**inputs).logits, found)


def test_tied_tables_stay_one(tmp_path):
    _, source = make_pair("gpt2", MADE["gpt2"], tmp_path / "source")
    for way in int8.WAYS:
        int8_model(source, way, {}).save_pretrained(tmp_path / way)
        model = type(source).from_pretrained(tmp_path / way)
        head, table = model.lm_head, model.transformer.wte
        assert head.weight is table.weight and head.scale is table.scale and head.smooth is None
        assert (model.transformer.layers[0].mlp.fc1.smooth is None) == (way == "dynamic")


def test_it_writes_and_copies_and_does_not_learn(tmp_path):
    _, source = make_pair("gpt2", MADE["gpt2"], tmp_path)
    model, ids = int8_model(source, "dynamic", {}), torch.randint(3, VOCAB, (2, 5))
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    again = copy.deepcopy(model).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert written.shape == (2, 11) and torch.equal(written, again)
    with pytest.raises(RuntimeError, match="Weights of 8 bits do not learn"):
        model.train()(input_ids=ids, labels=ids)
    with pytest.raises(ValueError, match="token id 999: the model has"):
        model(input_ids=torch.tensor([[999]]))


def test_an_unknown_way_is_refused(tmp_path):
    _, source = make_pair("bert", MADE["bert"], tmp_path)
    with pytest.raises(StrictDataclassClassValidationError, match="int8: one of dynamic, smooth, not 'static'"):
        type(source.config)(int8="static")
