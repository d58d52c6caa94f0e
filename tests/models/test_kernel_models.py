"""Kernels in models: wherever padding is, cached, trained, with adapters, and refused where they cannot be."""

import peft
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from zoo.models.attention_variants import ATTENTIONS
from zoo.models.layer_masks import cross_mask
from zoo.models.linformer import Linformer
from zoo.models.masks import document_positions

from .test_parity import assert_close
from .test_pattern_models import run
from .test_variants import NO_DROPOUT, OPENED, open_variant
from .tiny import CONFIGS, PADDING, make_inputs, make_pair, native_class

KWARGS = {name: {} for name in ATTENTIONS} | {
    "linformer": {"rank": 4}, "performer": {"features": 16}, "nystrom": {"landmarks": 3},
}  # fmt: skip
CAUSAL = [name for name, kernel in ATTENTIONS.items() if kernel.causal]
ENCODERS = ["bert", "roberta", "albert", "distilbert"]

names = pytest.mark.parametrize("name", KWARGS)
causal_names = pytest.mark.parametrize("name", CAUSAL)


def variant(name, **fields):
    return {"attention": name, "attention_kwargs": {name: KWARGS[name]}, **fields}


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for family in ENCODERS for name in KWARGS] + [("gpt2", name) for name in CAUSAL],
)
@pytest.mark.parametrize("padding", PADDING)
def test_padding_is_never_met(family, name, padding, tmp_path):
    """Padded equals packed, with gradients; and each text equals itself alone."""
    official = OPENED[family][0]
    make_pair(family, official, tmp_path, **NO_DROPOUT.get(family, {}))
    native = open_variant(family, official, tmp_path, variant(name))
    inputs = make_inputs(family, official, padding, labels=True)
    mask = inputs["attention_mask"].bool()
    (logits, loss, gradients), (others, other_loss, other_gradients) = (run(native, inputs, m) for m in ("off", "on"))
    assert_close(others[mask], logits[mask], "logits")
    assert_close(other_loss, loss, "loss")
    for parameter, gradient in gradients.items():
        assert_close(other_gradients[parameter], gradient, parameter)
    for row in (0, 1):
        if not mask[row].any():
            continue
        # positions are those of the batch, where a text that is padded in front or has holes stands further on
        words = {key: x[row : row + 1] for key, x in inputs.items() if key != "labels"}
        alone = native(**words).logits[0]
        assert_close(alone[mask[row]], logits[row][mask[row]], f"row {row}")


@causal_names
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("ragged", ["auto", "off"])
def test_each_cached_step_equals_the_whole_pass(name, cache, mixed, ragged, tmp_path):
    make_pair("gpt2", "GPT2LMHeadModel", tmp_path, eos_token_id=None)
    fields = variant(name) | ({"attention": [name, "full"]} if mixed else {})
    native = open_variant("gpt2", "GPT2LMHeadModel", tmp_path, fields)
    native.set_ragged(ragged)
    inputs = make_inputs("gpt2", "GPT2LMHeadModel", "left")
    with torch.no_grad():
        made = native.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=8, do_sample=False,
            cache_implementation=cache, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 8), value=1)
        positions = document_positions(mask)
        logits = native(input_ids=made.sequences, attention_mask=mask, position_ids=positions).logits
    for step, cached in enumerate(made.logits):
        assert_close(cached, logits[:, inputs["input_ids"].shape[1] - 1 + step], f"step {step}")
    if not mixed and cache == "dynamic":
        sizes = {layer.keys.shape for layer in made.past_key_values.layers}
        assert len(sizes) == 1 and made.past_key_values.get_seq_length() == made.sequences.shape[1] - 1
        assert 19 not in next(iter(sizes)) and 18 not in next(iter(sizes)), "its size is not that of the text"


@causal_names
def test_beams_keep_their_own_sums(name, tmp_path):
    """Beam search with a cache finds what it finds without one."""
    make_pair("gpt2", "GPT2LMHeadModel", tmp_path, eos_token_id=None)
    native = open_variant("gpt2", "GPT2LMHeadModel", tmp_path, variant(name))
    inputs = make_inputs("gpt2", "GPT2LMHeadModel", "left")
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    settings = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(native.generate(**prompt, **settings), native.generate(**prompt, **settings, use_cache=False))


@causal_names
def test_the_future_and_other_documents_change_nothing(name, tmp_path):
    make_pair("gpt2", "GPT2LMHeadModel", tmp_path)
    native = open_variant("gpt2", "GPT2LMHeadModel", tmp_path, variant(name))
    ids = torch.randint(3, 60, (1, 20), generator=torch.Generator().manual_seed(0))
    later, earlier = ids.clone(), ids.clone()
    later[0, 12:] += 1
    earlier[0, :8] += 1
    documents = torch.cat([torch.arange(8), torch.arange(12)])[None]
    for mode in ("off", "on"):
        native.set_ragged(mode)
        with torch.no_grad():
            assert torch.equal(native(input_ids=ids).logits[:, :12], native(input_ids=later).logits[:, :12])
            both = [native(input_ids=x, position_ids=documents).logits[:, 8:] for x in (ids, earlier)]
        assert torch.equal(*both), mode
        with torch.no_grad():
            cache = native(input_ids=ids, position_ids=documents, use_cache=True).past_key_values
        native.set_ragged("auto")
        with pytest.raises(ValueError, match="a row of several documents was read"):
            native(input_ids=ids[:, :1], past_key_values=cache)


@names
def test_an_image_in_any_kernel(name, tmp_path):
    make_pair("vit", "ViTForImageClassification", tmp_path)
    native = open_variant("vit", "ViTForImageClassification", tmp_path, variant(name)).train()
    inputs = make_inputs("vit", "ViTForImageClassification")
    native(**inputs, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(p.grad is not None for n, p in native.named_parameters() if "kernel" in n)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_across_texts_by_any_implementation(implementation, tmp_path):
    """It does not matter to a kernel, but its mask is another."""
    make_pair("t5", "T5ForConditionalGeneration", tmp_path)
    native = open_variant("t5", "T5ForConditionalGeneration", tmp_path, {"cross_attention": "linear"})
    inputs = make_inputs("t5", "T5ForConditionalGeneration", "right")
    encoded = native.encoder(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    keys, layer = (encoded, inputs["attention_mask"]), native.decoder.layers[0].cross_attn
    queries = torch.randn(3, 7, 24)
    found = []
    for name in ("sdpa", implementation):
        native.set_attn_implementation(name)
        mask = cross_mask(native.decoder.config, queries, keys[1], keys[0])
        found.append(layer(queries, mask, key_value_states=keys[0])[0])
    assert_close(found[1], found[0], implementation)
    short = layer(queries[1:2], None, key_value_states=keys[0][1:2, :6])[0]
    assert_close(found[0][1:2], short, "the second text alone")


@pytest.mark.parametrize("name", ["linformer", "performer", "linear"])
@pytest.mark.parametrize("ragged", ["off", "auto"])
def test_across_texts(name, ragged, tmp_path):
    """In cross-attention padding of the text that is read changes nothing, and cached steps equal the whole pass."""
    make_pair("t5", "T5ForConditionalGeneration", tmp_path)
    kwargs = {name: KWARGS[name] | ({"max_length": 16} if name == "linformer" else {})}
    fields = {"cross_attention": name, "attention_kwargs": kwargs}
    native = open_variant("t5", "T5ForConditionalGeneration", tmp_path, fields)
    native.set_ragged(ragged)
    inputs = make_inputs("t5", "T5ForConditionalGeneration", "right")
    with torch.no_grad():
        logits = native(**inputs).logits
        short = {key: x[1:2] for key, x in inputs.items()}
        short["input_ids"], short["attention_mask"] = short["input_ids"][:, :6], short["attention_mask"][:, :6]
        assert_close(native(**short).logits, logits[1:2], "the second text alone")
        made = native.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=6, min_new_tokens=6,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        full = native(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
            decoder_input_ids=made.sequences,
        ).logits  # fmt: skip
    for step, cached in enumerate(made.logits):
        assert_close(cached, full[:, step], f"step {step}")


@names
def test_adapters_on_a_kernel(name, tmp_path):
    """LoRA trains, merges and saves as on full attention; what the kernel learned stays as it was."""
    make_pair("bert", "BertForSequenceClassification", tmp_path)
    native = open_variant("bert", "BertForSequenceClassification", tmp_path, variant(name))
    adapted = peft.get_peft_model(native, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"]))
    inputs = make_inputs("bert", "BertForSequenceClassification", "right")
    optimizer = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=0.5)
    for _ in range(3):
        adapted.train()(**inputs, labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
    trained = adapted.eval()(**inputs).logits
    adapted.save_pretrained(tmp_path / "adapter")
    assert_close(adapted.merge_and_unload()(**inputs).logits, trained, "merged")


REFUSED = [
    ("gpt2", variant("linformer"), "linformer cannot be causal.*; patterns can, and performer"),
    ("gpt2", variant("nystrom", attention=["full", "nystrom"]), "attention: nystrom cannot be causal"),
    ("bert", variant("linformer", is_decoder=True), "linformer cannot be causal"),
    ("t5", variant("performer"), "performer has no scores to which a position bias could be added"),
    ("t5", {"decoder_attention": "nystrom"}, "decoder_attention: nystrom cannot be causal"),
    ("t5", {"cross_attention": "block", "attention_kwargs": {"block": {"size": 2}}}, "block relates tokens of one"),
    ("t5", {"cross_attention": "nystrom"}, "nystrom relates tokens of one text; full does not, nor do linformer"),
    ("bert", {"cross_attention": "linear"}, "cross_attention: linear, but this model reads no other text"),
    ("t5", {"encoder_attention": "locale"}, "encoder_attention: no variant is called 'locale'; did you mean local"),
    ("albert", variant("linear", attention=["full", "linear"]), "the layers of ALBERT are one; name linear alone"),
    ("bert", {"attention": "linformer"}, "attention_kwargs.linformer: rank is missing"),
    ("bert", variant("linear", attention_kwargs={"linear": {"rank": 3}}), "linear: unknown key 'rank'"),
    ("bert", {"attention": "linformer", "attention_kwargs": {"linformer": {"rank": 41}}}, "more than its length, 40"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "fields", "message"), REFUSED)
def test_refusals_in_words(family, fields, message):
    config_class = native_class(family, OPENED[family][0]).config_class
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        config_class.from_dict({**CONFIGS[family].to_dict(), **fields})


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [("gpt2", variant("nystrom"), "nystrom cannot be causal"), ("t5", {"attention": "linear"}, "position bias"),
     ("bert", {"attention": "locale"}, "did you mean local"), ("bert", {"attention": "local"}, "window is missing")],
)  # fmt: skip
def test_what_from_pretrained_is_given_is_checked_too(family, fields, message, tmp_path):
    """A landmark of the whole text in a decoder would let it see the future."""
    official = OPENED[family][0]
    make_pair(family, official, tmp_path)
    with pytest.raises(ValueError, match=message):
        native_class(family, official).from_pretrained(tmp_path, **fields)


def test_an_encoder_alone_may_say_encoder_attention(tmp_path):
    """The official class saves it with is_encoder_decoder: false."""
    make_pair("t5", "T5EncoderModel", tmp_path / "official")
    fields = {"encoder_attention": "local", "attention_kwargs": {"local": {"window": 1}}}
    native = open_variant("t5", "T5EncoderModel", tmp_path / "official", fields)
    native.save_pretrained(tmp_path / "saved")
    again = type(native).from_pretrained(tmp_path / "saved").eval()
    inputs = make_inputs("t5", "T5EncoderModel")
    states = native(**inputs).last_hidden_state
    assert_close(again(**inputs).last_hidden_state, states, "states")
    full = type(native).from_pretrained(tmp_path / "official").eval()(**inputs).last_hidden_state
    assert (states - full).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_of_a_model_that_is_made_in_16_bits(dtype):
    config = native_class("bert", "BertModel").config_class.from_dict(
        {**CONFIGS["bert"].to_dict(), **variant("performer")}
    )
    kernel = native_class("bert", "BertModel")._from_config(config, dtype=dtype).layers[0].self_attn.kernel
    assert kernel.projection.dtype == dtype and 0.5 < kernel.projection.float().std() < 1.5


def test_linformer_of_images_that_are_no_squares(tmp_path):
    make_pair("vit", "ViTForImageClassification", tmp_path, image_size=[12, 16])
    native = open_variant("vit", "ViTForImageClassification", tmp_path, variant("linformer"))
    assert {m.max_length for m in native.modules() if isinstance(m, Linformer)} == {3 * 4 + 1}


@names
def test_a_graph_without_a_mask(name, tmp_path):
    make_pair("bert", "BertForSequenceClassification", tmp_path)
    native = open_variant("bert", "BertForSequenceClassification", tmp_path, variant(name))
    ids = {"input_ids": make_inputs("bert", "BertForSequenceClassification", "none")["input_ids"]}
    graph = torch.export.export(native, (), ids).module()
    assert_close(graph(**ids).logits, native(**ids).logits, "logits")


@names
def test_a_prefix_is_refused(name, tmp_path):
    """Its keys have no place, neither in an encoder nor in a sum."""
    family = "gpt2" if name in CAUSAL else "bert"
    official = f"{'GPT2' if family == 'gpt2' else 'Bert'}ForSequenceClassification"
    make_pair(family, official, tmp_path)
    native = open_variant(family, official, tmp_path, variant(name))
    adapted = peft.get_peft_model(native, peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="no place for cached keys"):
        adapted(**make_inputs(family, official))


def test_projections_of_the_whole_model_are_one(tmp_path):
    make_pair("bert", "BertForMaskedLM", tmp_path / "official")
    fields = {"attention": "linformer", "attention_kwargs": {"linformer": {"rank": 4, "sharing": "model"}}}
    native = open_variant("bert", "BertForMaskedLM", tmp_path / "official", fields)
    native.save_pretrained(tmp_path / "saved")
    again = type(native).from_pretrained(tmp_path / "saved")
    for model in (native, again):
        kernels = [layer.self_attn.kernel for layer in model.bert.layers]
        assert all(kernel.key_projection is kernels[0].key_projection for kernel in kernels)
    inputs = make_inputs("bert", "BertForMaskedLM")
    assert_close(again.eval()(**inputs).logits, native(**inputs).logits, "logits")


def test_random_features_are_saved_and_drawn_anew(tmp_path):
    make_pair("bert", "BertForMaskedLM", tmp_path / "official")
    native = open_variant("bert", "BertForMaskedLM", tmp_path / "official", variant("performer"))
    native.save_pretrained(tmp_path / "saved")
    again = type(native).from_pretrained(tmp_path / "saved").eval()
    inputs = make_inputs("bert", "BertForMaskedLM")
    before = native(**inputs).logits
    assert_close(again(**inputs).logits, before, "logits")
    torch.manual_seed(1)
    native.redraw_features()
    assert (native(**inputs).logits - before).abs().max() > 1e-3
