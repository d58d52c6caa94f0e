"""BERT and RoBERTa as decoders: alone, with cross-attention, and under transformers' EncoderDecoderModel."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import EncoderDecoderModel

from zoo.models.ragged import Packing

from .test_generation import COMMON, WAYS
from .test_parity import assert_close, official_gradients
from .tiny import LENGTH, VOCAB, config_for, make_inputs, make_pair, native_class, randomise

HEADS = {"bert": "BertLMHeadModel", "roberta": "RobertaForCausalLM"}
families = pytest.mark.parametrize("family", HEADS)


def lively(model):
    """With all weights at 0.1 one token wins everywhere."""
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(8)
    return model


def with_memory(family, padding="right"):
    inputs = make_inputs(family, HEADS[family], padding, labels=True)
    generator = torch.Generator().manual_seed(9)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5])
    return inputs | {
        "encoder_hidden_states": torch.randn(3, 7, 24, generator=generator),
        "encoder_attention_mask": mask,
    }


@families
@pytest.mark.parametrize("ragged", ["off", "on"])
@pytest.mark.parametrize("training", [False, True])
def test_cross_attention(family, ragged, training, tmp_path):
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, native = make_pair(family, HEADS[family], tmp_path, is_decoder=True, add_cross_attention=True, **rates)
    native.set_ragged(ragged)
    inputs = with_memory(family)
    expected, output = model.train(training)(**inputs), native.train(training)(**inputs)
    assert_close(output.loss, expected.loss, "loss")
    if not training:
        mask = inputs["attention_mask"].bool()
        assert_close(output.logits[mask], expected.logits[mask], "logits")
    expected.loss.backward()
    output.loss.backward()
    ours = official_gradients(native)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(ours[name], parameter.grad, f"gradient of {name}")
    moved = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] + 1}
    assert not torch.allclose(native(**moved).loss, output.loss), "the memory is read"


@families
def test_a_call_is_planned_once(family, tmp_path, monkeypatch):
    """The text and its memory: one look at each mask."""
    _, native = make_pair(family, HEADS[family], tmp_path, is_decoder=True, add_cross_attention=True)
    native.set_ragged("on")
    seen, from_mask = [], Packing.from_mask
    monkeypatch.setattr(Packing, "from_mask", lambda mask: (seen.append(mask), from_mask(mask))[1])
    inputs = with_memory(family)
    native(**inputs)
    names = ("attention_mask", "encoder_attention_mask")
    assert all(mask is inputs[name] for mask, name in zip(seen, names, strict=True))


@families
def test_saved_keys_are_the_official_ones(family, tmp_path):
    _, native = make_pair(family, HEADS[family], tmp_path / "a", is_decoder=True, add_cross_attention=True)
    native.save_pretrained(tmp_path / "b")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert ours.keys() == theirs.keys() and any("crossattention" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@families
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("way", WAYS)
def test_token_for_token(family, padding, way, tmp_path):
    model, native = map(lively, make_pair(family, HEADS[family], tmp_path))
    inputs = make_inputs(family, HEADS[family], padding)
    if way == "prompt lookup":
        inputs = {name: value[:1] for name, value in inputs.items()}
    if way == "static cache":
        inputs.pop("token_type_ids")
    results = []
    for m in (model, native):
        torch.manual_seed(5)
        results.append(m.generate(**inputs, **{**COMMON, **WAYS[way]}))
    assert torch.equal(*results)


def encoder_decoders(family, tmp_path):
    """An official pair of encoder and decoder, and the native one with its weights."""
    encoder = randomise(
        getattr(transformers, HEADS[family].replace("LMHeadModel", "Model").replace("ForCausalLM", "Model"))(
            config_for(family, "")
        ),
        seed=1,
    )
    decoder = randomise(
        getattr(transformers, HEADS[family])(
            config_for(family, HEADS[family], is_decoder=True, add_cross_attention=True)
        ),
        seed=2,
    )
    lively(decoder)
    encoder.save_pretrained(tmp_path / "encoder")
    decoder.save_pretrained(tmp_path / "decoder")
    official = EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    base = native_class(family, type(encoder).__name__).from_pretrained(tmp_path / "encoder")
    head = native_class(family, HEADS[family]).from_pretrained(tmp_path / "decoder")
    return official, EncoderDecoderModel(encoder=base, decoder=head).eval()


@families
def test_encoder_decoder_model(family, tmp_path):
    official, native = encoder_decoders(family, tmp_path)
    for model in (official, native):
        model.config.decoder_start_token_id, model.config.pad_token_id = 2, 1
        model.generation_config.decoder_start_token_id = 2
    inputs = make_inputs(family, "")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    labels = torch.randint(3, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(3))
    expected, output = official(**inputs, labels=labels), native(**inputs, labels=labels)
    assert_close(output.loss, expected.loss, "loss")
    assert_close(output.logits, expected.logits, "logits")
    for way in ("greedy", "beams"):
        tokens = [model.generate(**inputs, **COMMON, **WAYS[way]) for model in (official, native)]
        assert torch.equal(*tokens) and tokens[0].shape[1] > 5, way
