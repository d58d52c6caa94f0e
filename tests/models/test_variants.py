"""Local attention: against explicit masks, wherever padding is, cached, refused in words, and far from this package."""

import json
import os
import subprocess
import sys
import textwrap

import peft
import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError

from zoo.models.attention_variants import ATTENTIONS, variant_of_layer

from .test_parity import assert_close
from .tiny import CONFIGS, PADDING, make_inputs, make_pair, native_class

WINDOW = 2
LOCAL = {"attention": "local", "attention_kwargs": {"local": {"window": WINDOW}}}
CYCLE = {**LOCAL, "attention": ["full", "local"]}
SMALL = {
    "linformer": {"rank": 4, "sharing": "model"}, "performer": {"features": 16},
    "nystrom": {"landmarks": 3, "convolution": 3},
}  # fmt: skip
KERNELS = [(name, SMALL.get(name, {})) for name in ATTENTIONS]
VARIANTS = {"local": LOCAL, "full, local": CYCLE}
TOKEN_HEADS = [("bert", "BertForMaskedLM"), ("gpt2", "GPT2LMHeadModel"), ("t5", "T5ForConditionalGeneration")]
# one of every family
OPENED = {
    "bert": ("BertForMaskedLM", "AutoModelForMaskedLM"), "roberta": ("RobertaForMaskedLM", "AutoModelForMaskedLM"),
    "albert": ("AlbertForMaskedLM", "AutoModelForMaskedLM"),
    "distilbert": ("DistilBertForMaskedLM", "AutoModelForMaskedLM"),
    "gpt2": ("GPT2LMHeadModel", "AutoModelForCausalLM"), "t5": ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
    "vit": ("ViTForImageClassification", "AutoModelForImageClassification"),
}  # fmt: skip
NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "t5": {"dropout_rate": 0.0},
}

families = pytest.mark.parametrize(("family", "official"), TOKEN_HEADS, ids=[family for family, _ in TOKEN_HEADS])
variants = pytest.mark.parametrize("variant", VARIANTS)
paddings = pytest.mark.parametrize("padding", PADDING)


def open_variant(family, official, directory, fields):
    config = native_class(family, official).config_class.from_pretrained(directory, **fields)
    return native_class(family, official).from_pretrained(directory, config=config).eval()


def make_native(family, official, directory, fields):
    """With the config of a directory, and weights of its own."""
    native = native_class(family, official)
    return native(native.config_class.from_pretrained(directory, **fields)).eval()


def visible(mask, name: str, causal: bool) -> torch.Tensor:
    """(batch, 1, queries, keys): key by key, in the words of the definition."""
    batch, length = mask.shape
    seen = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for row in range(batch):
        for query in range(length):
            # real tokens from the query's own on, or for padding from the nearest before it
            q_pos = max(int(mask[row, : query + 1].sum()) - 1, 0)
            for key in range(length):
                k_pos = int(mask[row, : key + 1].sum()) - 1
                near = abs(q_pos - k_pos) <= WINDOW
                if causal:
                    near = 0 <= q_pos - k_pos < WINDOW
                past = key <= query or not causal
                seen[row, 0, query, key] = mask[row, key] and past and (near or name == "full")
    return seen


def give_masks(model, family, variant, encoder_mask, decoder_mask=None):
    """Hooks that hand each self-attention of an official model its layer's explicit mask."""
    stacks = {"bert": [("bert.encoder.layer", ".attention.self", "attention_mask", encoder_mask, False)],
              "gpt2": [("transformer.h", ".attn", "attention_mask", encoder_mask, True)],
              "t5": [("encoder.block", ".layer.0.SelfAttention", "mask", encoder_mask, False),
                     ("decoder.block", ".layer.0.SelfAttention", "mask", decoder_mask, True)]}[family]  # fmt: skip
    config = native_class(family, dict(TOKEN_HEADS)[family]).config_class(**variant)
    handles = []
    for stack, suffix, argument, mask, causal in stacks:
        for index in range(len(model.get_submodule(stack))):
            explicit = visible(mask, variant_of_layer(config, index), causal)

            def swap(module, args, kwargs, argument=argument, explicit=explicit):
                return args, {**kwargs, argument: explicit}

            layer = model.get_submodule(f"{stack}.{index}{suffix}")
            handles.append(layer.register_forward_pre_hook(swap, with_kwargs=True))
    return handles


@families
@variants
@paddings
@pytest.mark.parametrize("path", ["eager", "sdpa", "ragged"])
def test_equals_the_official_class_with_explicit_masks(family, official, variant, padding, path, tmp_path):
    fields = VARIANTS[variant]
    model, _ = make_pair(family, official, tmp_path)
    native = open_variant(family, official, tmp_path, fields)
    native.set_attn_implementation("eager" if path == "eager" else "sdpa")
    native.set_ragged("on" if path == "ragged" else "off")
    inputs = make_inputs(family, official, padding)
    mask = inputs["attention_mask"]
    decoder_mask = torch.ones(3, 7, dtype=torch.long)
    if family == "t5":
        decoder_mask[1, 4:] = 0
        decoder_mask[2, 1] = 0
        inputs["decoder_attention_mask"] = decoder_mask
    with torch.no_grad():
        plain = model(**inputs).logits
        give_masks(model, family, fields, mask, decoder_mask)
        expected, ours = model(**inputs).logits, native(**inputs).logits
    real = (decoder_mask if family == "t5" else mask).bool()
    if family == "t5":
        # a text without tokens: the official class attends evenly to its padding
        real = real & mask.any(-1, keepdim=True).bool()
    assert_close(ours[real], expected[real], "logits")
    assert (expected - plain)[real].abs().max() > 1e-3, "the window hides something here"


@families
def test_gradients_ragged_equal_padded(family, official, tmp_path):
    make_pair(family, official, tmp_path, **NO_DROPOUT[family])
    native = open_variant(family, official, tmp_path, CYCLE).train()
    inputs = make_inputs(family, official, "holes", labels=True)
    gradients = []
    for mode in ("off", "on"):
        native.set_ragged(mode)
        native.zero_grad()
        native(**inputs).loss.backward()
        gradients.append({name: p.grad for name, p in native.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, name)


@families
def test_a_window_as_long_as_the_text_is_full_attention(family, official, tmp_path):
    model, _ = make_pair(family, official, tmp_path)
    wide = {"attention": "local", "attention_kwargs": {"local": {"window": 11}}}
    inputs = make_inputs(family, official, "right")
    real = slice(None) if family == "t5" else inputs["attention_mask"].bool()
    for mode in ("off", "on"):
        native = open_variant(family, official, tmp_path, wide)
        native.set_ragged(mode)
        assert_close(native(**inputs).logits[real], model(**inputs).logits[real], mode)


@pytest.mark.parametrize(("family", "official"), TOKEN_HEADS[:2], ids=["bert", "gpt2"])
@variants
def test_padding_left_right_or_between_changes_nothing(family, official, variant, tmp_path):
    """One text, wherever its tokens stand; its positions are given, as absolute embeddings count slots."""
    make_pair(family, official, tmp_path)
    native = open_variant(family, official, tmp_path, VARIANTS[variant])
    text = torch.randint(3, 60, (8,), generator=torch.Generator().manual_seed(0))
    native.set_ragged("off")
    expected = native(input_ids=text[None]).logits[0]
    places = [torch.arange(8), torch.arange(4, 12), torch.tensor([0, 1, 4, 5, 6, 9, 10, 11]), torch.arange(2, 10)]
    ids, mask, positions = torch.ones(4, 12).long(), torch.zeros(4, 12).long(), torch.zeros(4, 12).long()
    for row, slots in enumerate(places):
        ids[row, slots], mask[row, slots], positions[row, slots] = text, 1, torch.arange(8)
    for mode in ("off", "on"):
        native.set_ragged(mode)
        logits = native(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        for row, slots in enumerate(places):
            assert_close(logits[row, slots], expected, f"{mode}, text at {slots.tolist()}")


@pytest.mark.parametrize(("family", "official"), TOKEN_HEADS[1:], ids=["gpt2", "t5"])
@variants
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_cached_generation_equals_recomputing(family, official, variant, cache, padding, tmp_path):
    make_pair(family, official, tmp_path)
    native = open_variant(family, official, tmp_path, VARIANTS[variant])
    inputs = make_inputs(family, official, padding)
    inputs.pop("decoder_input_ids", None)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1, "output_logits": True,
              "return_dict_in_generate": True}  # fmt: skip
    native.set_ragged("off")
    expected = native.generate(**inputs, **kwargs, use_cache=False)
    native.set_ragged("auto")
    ours = native.generate(**inputs, **kwargs, cache_implementation=cache)
    assert torch.equal(ours.sequences, expected.sequences)
    for step, (a, b) in enumerate(zip(ours.logits, expected.logits, strict=True)):
        assert_close(a, b, f"step {step}")


def local_with(kwargs):
    return {"attention": "local", "attention_kwargs": {"local": kwargs}}


REFUSED = [
    ({"attention": "locale"}, "no variant is called 'locale'; did you mean local"),
    ({"attention": "quadratic"}, "no variant is called 'quadratic'; there are full, local"),
    ({"attention": ["full", "sparse"]}, "no variant is called 'sparse'"),
    ({"attention": []}, "an empty list"),
    ({"attention": "local"}, r"attention_kwargs\.local: .*window"),
    ({"attention": ["full", "local"]}, r"attention_kwargs\.local: .*window"),
    (local_with({"window": 2, "stride": 3}), r"attention_kwargs\.local: .*stride"),
    (local_with({"window": 2, "causal": True}), r"attention_kwargs\.local: .*causal"),
    (local_with(3), r"attention_kwargs\.local"),
    *((local_with({"window": w}), r"local\.window is a number of tokens") for w in (0, -1, 2.0, "2", True, None)),
    ({"attention": "full", "attention_kwargs": {"local": {"window": 2}}}, "has an entry for 'local'"),
    ({"attention": "full", "attention_kwargs": {"full": {"window": 2}}}, r"attention_kwargs\.full"),
]  # fmt: skip


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[str(fields) for fields, _ in REFUSED])
def test_refusals_in_words(family, fields, message):
    config_class = native_class(family, OPENED[family][0]).config_class
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        config_class.from_dict({**CONFIGS[family].to_dict(), **fields})


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("fields", [{"attention": 3}, {"attention": ["full", 3]}, {"attention_kwargs": [1]}], ids=str)
def test_wrong_types_are_refused_with_their_field(family, fields):
    config_class = native_class(family, OPENED[family][0]).config_class
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(fields))):
        config_class.from_dict({**CONFIGS[family].to_dict(), **fields})


@families
def test_a_variant_has_no_official_form(family, official, tmp_path):
    make_pair(family, official, tmp_path / "official")
    native = open_variant(family, official, tmp_path / "official", CYCLE)
    with pytest.raises(ValueError, match=r"attention \['full', 'local'\] has no official form"):
        native.save_pretrained(tmp_path / "variant", official=True)
    assert not (tmp_path / "variant").exists(), "nothing is written before it is refused"


def test_an_encoder_variant_refuses_a_prefix(tmp_path):
    """Prefix tuning puts keys in the cache of an encoder, and a window has no place for them."""
    make_pair("bert", "BertForSequenceClassification", tmp_path)
    native = open_variant("bert", "BertForSequenceClassification", tmp_path, CYCLE)
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="no place for cached keys"):
        peft.get_peft_model(native, config)(**make_inputs("bert", "BertForSequenceClassification"))


def test_a_list_of_full_is_standard(tmp_path):
    model, _ = make_pair("bert", "BertForMaskedLM", tmp_path)
    native = open_variant("bert", "BertForMaskedLM", tmp_path, {"attention": ["full"]})
    native.save_pretrained(tmp_path / "again", official=True)
    inputs = make_inputs("bert", "BertForMaskedLM", "none")
    assert_close(type(model).from_pretrained(tmp_path / "again")(**inputs).logits, model(**inputs).logits, "logits")


def test_three_dimensional_masks_are_refused_by_a_pattern(tmp_path):
    make_pair("bert", "BertForMaskedLM", tmp_path)
    native = open_variant("bert", "BertForMaskedLM", tmp_path, LOCAL)
    inputs = make_inputs("bert", "BertForMaskedLM", "none")
    with pytest.raises(ValueError, match=r"'local' needs a mask of \(batch, length\), not 4-D"):
        native(**{**inputs, "attention_mask": torch.ones(3, 1, 11, 11).bool()})


STRANGER = """
    import json, sys
    try:
        import zoo
        raise SystemExit("the package can be imported here")
    except ImportError:
        pass
    import torch, transformers
    from pathlib import Path

    for directory, (auto, attention) in json.loads(sys.argv[1]).items():
        auto, directory = getattr(transformers, auto), Path(directory)
        for trust in ({}, {"trust_remote_code": False}):
            try:
                auto.from_pretrained(directory, **trust)
                raise SystemExit("opened without trust")
            except ValueError as error:
                assert "trust_remote_code=True" in str(error), error
        inputs, labels, expected, logits = torch.load(directory / "expected.pt")
        model = auto.from_pretrained(directory, trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        assert model.config.attention == attention, model.config.attention
        assert (model(**inputs).logits - logits).abs().max() < 1e-6
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        first = model(**inputs, labels=labels).loss
        first.backward()
        optimizer.step()
        second = model(**inputs, labels=labels).loss
        assert abs(first - expected) < 1e-6 and second < first, (first, expected, second)
        model.save_pretrained(directory / "trained")
        reopened = auto.from_pretrained(directory / "trained", trust_remote_code=True).eval()
        assert torch.equal(model(**inputs).logits, reopened(**inputs).logits)
        names = {path.name for path in directory.iterdir()} - {"trained", "expected.pt"}
        assert names == {path.name for path in (directory / "trained").iterdir()}, names
        assert not any(name == "zoo" or name.startswith("zoo.") for name in sys.modules)
        print("ok", directory.name)
"""


def test_a_variant_opens_where_this_package_is_not(tmp_path):
    directories = {}
    saved = [(family, family, CYCLE) for family in OPENED]
    saved += [
        (f"bert-{name}", "bert", {"attention": name, "attention_kwargs": {name: kwargs}}) for name, kwargs in KERNELS
    ]
    saved.append(("gpt2-performer", "gpt2", {"attention": "performer"}))
    saved += [
        ("gpt2-block", "gpt2", {"block": {"norm": "rmsnorm", "feed_forward": "swiglu", "positions": "rotary"}}),
        ("bert-block", "bert", {"block": {"norm_place": "sandwich", "positions": "alibi", "qk_norm": True}}),
    ]
    for name, family, fields in saved:
        official, auto = OPENED[family]
        make_pair(family, official, tmp_path / "official" / name)
        native = (make_native if "block" in fields else open_variant)(
            family, official, tmp_path / "official" / name, fields
        )
        directory = tmp_path / "saved" / name
        native.save_pretrained(directory)
        inputs = make_inputs(family, official, "right")
        labels = inputs.get("decoder_input_ids", inputs.get("input_ids", torch.tensor([0, 1, 2])))
        with torch.no_grad():
            loss, logits = native(**inputs, labels=labels).loss, native(**inputs).logits
            torch.save((inputs, labels, loss, logits), directory / "expected.pt")
        directories[str(directory)] = auto, native.config.attention
    (tmp_path / "empty").mkdir()
    # no package of ours, whatever the environment has installed and however
    blocked = textwrap.dedent("""
        import sys

        class NotInstalled:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "zoo":
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, NotInstalled())
    """)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [sys.executable, "-I", "-c", blocked + textwrap.dedent(STRANGER), json.dumps(directories)],
        cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert all(f"ok {name}\n" in result.stdout for name, _, _ in saved), result.stdout


@families
def test_the_official_class_does_not_open_a_variant_unnoticed(family, official, tmp_path, caplog):
    make_pair(family, official, tmp_path / "official")
    open_variant(family, official, tmp_path / "official", CYCLE).save_pretrained(tmp_path / "variant")
    config = json.loads((tmp_path / "variant" / "config.json").read_text())
    assert config["model_type"] == f"zoo_{family}"
    assert config["attention"] == ["full", "local"]
    logger = transformers.logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    try:
        getattr(transformers, official).from_pretrained(tmp_path / "variant")
    finally:
        logger.removeHandler(caplog.handler)
    assert f"model of type `zoo_{family}` to instantiate a model of type" in caplog.text
