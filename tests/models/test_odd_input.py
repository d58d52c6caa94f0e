"""Numbers beyond a table: words in place of torch's "index out of range in self"."""

import pytest
import torch

from .tiny import HEADS, VOCAB, make_inputs, make_pair

POSITIONS = 40
ENCODERS = ["BertForMaskedLM", "RobertaForMaskedLM", "AlbertForMaskedLM", "DistilBertForMaskedLM", "BertLMHeadModel"]
MODELS = [*((name.partition("For")[0].replace("LMHeadModel", "").lower(), name) for name in ENCODERS),
          ("gpt2", "GPT2LMHeadModel")]  # fmt: skip
models = pytest.mark.parametrize(("family", "official"), MODELS, ids=[name for _, name in MODELS])
TOO_LONG = (
    rf"position {POSITIONS}: the model has {POSITIONS} of them, from 0 \(config.max_position_embeddings\); cut the"
)


def ids_of(length: int) -> torch.Tensor:
    return torch.full((2, length), 5)


@models
@pytest.mark.parametrize("ragged", ["on", "off"])
def test_a_text_longer_than_the_positions(family, official, ragged, tmp_path):
    _, native = make_pair(family, official, tmp_path)
    native.set_ragged(ragged)
    # RoBERTa's begin behind that of padding, whose id is 1
    longest = POSITIONS - (2 if family == "roberta" else 0)
    assert native(ids_of(longest)).logits.shape == (2, longest, VOCAB)
    with pytest.raises(ValueError, match=TOO_LONG):
        native(ids_of(longest + 1))
    width = native.get_input_embeddings().embedding_dim
    with pytest.raises(ValueError, match=TOO_LONG):
        native(inputs_embeds=torch.zeros(2, longest + 1, width))


def test_robertas_padding_takes_no_position(tmp_path):
    _, native = make_pair("roberta", "RobertaForMaskedLM", tmp_path)
    ids = torch.cat((ids_of(POSITIONS - 2), torch.ones(2, 9, dtype=torch.long)), dim=1)
    assert native(ids, attention_mask=(ids != 1).long()).logits.shape == (2, POSITIONS + 7, VOCAB)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_generation_beyond_the_positions(cache, tmp_path):
    _, native = make_pair("gpt2", "GPT2LMHeadModel", tmp_path)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1, "cache_implementation": cache}
    # the last token that is written is not read
    assert native.generate(ids_of(36), max_new_tokens=5, **settings).shape == (2, POSITIONS + 1)
    with pytest.raises(ValueError, match=TOO_LONG):
        native.generate(ids_of(36), max_new_tokens=6, **settings)


@models
def test_ids_that_there_are_none_of(family, official, tmp_path):
    _, native = make_pair(family, official, tmp_path)
    for wrong in (VOCAB, -1):
        with pytest.raises(ValueError, match=rf"token id {wrong}: the model has {VOCAB} .*\(config.vocab_size\)"):
            native(torch.tensor([[5, 6], [5, wrong]]))
    if official in ("BertForMaskedLM", "RobertaForMaskedLM", "AlbertForMaskedLM"):
        with pytest.raises(ValueError, match=r"segment 3: the model has 3 of them, from 0 \(config.type_vocab_size\)"):
            native(torch.tensor([[5, 6]]), token_type_ids=torch.tensor([[0, 3]]))
    with pytest.raises(ValueError, match="position 41: the model has 40"):
        native(torch.tensor([[5, 6]]), position_ids=torch.tensor([[0, 41]]))


def test_ids_that_t5_has_none_of(tmp_path):
    _, native = make_pair("t5", "T5ForConditionalGeneration", tmp_path)
    good, bad = torch.tensor([[5, 6]]), torch.tensor([[5, VOCAB]])
    for ids, decoder_ids in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match=rf"token id {VOCAB}: the model has {VOCAB} of them"):
            native(ids, decoder_input_ids=decoder_ids)


@pytest.mark.parametrize("family, official", HEADS, ids=[name for _, name in HEADS])
def test_tuples_where_the_config_wants_them(family, official, tmp_path):
    """`return_dict: false` in a config; the official GPT-2, T5 and ViT fail at it."""
    model, native = make_pair(family, official, tmp_path, return_dict=False)
    inputs = make_inputs(family, official, "none")
    found = native(**inputs)
    assert isinstance(found, tuple) and torch.equal(found[0], native(**inputs, return_dict=True)[0])
    if family not in ("gpt2", "t5", "vit"):
        theirs = model(**inputs)
        assert len(theirs) == len(found) and (found[0] - theirs[0]).abs().max() < 1e-5
