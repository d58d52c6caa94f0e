"""Checkpoints of every age and shape, in and out; and what must hold of a model however it came to be."""

import ast
import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion

from zoo.models import FAMILIES

from .test_parity import assert_close
from .tiny import CONFIGS, HEADS, SKELETON, VOCAB, config_for, make_inputs, make_pair, native_class, randomise

heads = pytest.mark.parametrize(("family", "official"), HEADS, ids=[name for _, name in HEADS])
TIED = [("bert", "BertForMaskedLM"), ("gpt2", "GPT2LMHeadModel"), ("t5", "T5ForConditionalGeneration")]
tied = pytest.mark.parametrize(("family", "official"), TIED, ids=[family for family, _ in TIED])
WEIGHTS = "model.safetensors"
ROOT = Path(__file__).parents[2]


def tensors_of(model):
    return [x for x in model.values() if isinstance(x, torch.Tensor)]


def assert_same_outputs(ours, theirs, inputs, what=""):
    ours.set_ragged("off")
    for a, b in zip(tensors_of(ours(**inputs)), tensors_of(theirs(**inputs)), strict=True):
        assert_close(a, b, what)


def load(family, official, directory, **kwargs):
    model, info = native_class(family, official).from_pretrained(directory, output_loading_info=True, **kwargs)
    return model.eval(), info


def assert_complete(info):
    assert not any(info.values()), info


def test_gamma_and_beta_of_tensorflow_times(tmp_path):
    model, _ = make_pair("bert", "BertForMaskedLM", tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
           for k, v in state.items()}  # fmt: skip
    assert sum(key.endswith(("gamma", "beta")) for key in old) == 2 * (1 + 2 * 3 + 1)
    save_file(old, tmp_path / WEIGHTS, {"format": "pt"})
    native, info = load("bert", "BertForMaskedLM", tmp_path)
    assert_complete(info)
    assert_same_outputs(native, model, make_inputs("bert", "BertForMaskedLM", "none"))
    native.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / WEIGHTS)
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in state)


@heads
def test_pickled_weights(family, official, tmp_path):
    model, _ = make_pair(family, official, tmp_path)
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "pytorch_model.bin")
    (tmp_path / WEIGHTS).unlink()
    native, info = load(family, official, tmp_path)
    assert_complete(info)
    assert_same_outputs(native, model, make_inputs(family, official, "none"))


def test_an_old_buffer_of_positions_is_no_surprise(tmp_path):
    make_pair("bert", "BertForMaskedLM", tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    save_file({**state, "bert.embeddings.position_ids": torch.arange(40)[None]}, tmp_path / WEIGHTS, {"format": "pt"})
    assert_complete(load("bert", "BertForMaskedLM", tmp_path)[1])


BASES = [("bert", "BertModel", "BertForSequenceClassification", {"classifier.weight", "classifier.bias"}),
         ("bert", "BertModel", "BertForTokenClassification", {"classifier.weight", "classifier.bias"}),
         ("gpt2", "GPT2Model", "GPT2LMHeadModel", set())]  # fmt: skip


@pytest.mark.parametrize(("family", "base", "head", "new"), BASES, ids=[head for _, _, head, _ in BASES])
def test_a_headless_checkpoint_opens_in_a_head_and_back(family, base, head, new, tmp_path):
    model, _ = make_pair(family, base, tmp_path / "base")
    native, info = load(family, head, tmp_path / "base")
    assert set(info["missing_keys"]) == new
    inputs = make_inputs(family, base, "none")
    inner = getattr(native, native.base_model_prefix)
    inner.set_ragged("off")
    assert_close(inner(**inputs).last_hidden_state, model(**inputs).last_hidden_state, "states")
    for form, official in (("zoo", False), ("official", True)):
        native.save_pretrained(tmp_path / form, official=official)
        again, info = load(family, base, tmp_path / form)
        assert not [k for k in info["missing_keys"] if not k.startswith("pooler")]
        assert_close(again(**inputs).last_hidden_state, model(**inputs).last_hidden_state, form)
        again.save_pretrained(tmp_path / f"{form}_base", official=True)
        reopened = type(model).from_pretrained(tmp_path / f"{form}_base").eval()
        assert_close(reopened(**inputs).last_hidden_state, model(**inputs).last_hidden_state, f"{form}, base")
    reopened = getattr(transformers, head).from_pretrained(tmp_path / "official").eval()
    assert_same_outputs(native, reopened, make_inputs(family, head, "none"))


@heads
def test_fresh_heads_get_the_initial_values_of_the_official_class(family, official, tmp_path):
    """A head made from a config: each parameter's mean and deviation, by its official name."""
    config = config_for(family, official, vocab_size=700, **({"hidden_size": 96} if family == "bert" else {}))
    torch.manual_seed(0)
    model = getattr(transformers, official)(config)
    native = native_class(family, official)(native_class(family, official).config_class.from_dict(config.to_dict()))
    native.save_pretrained(tmp_path)
    ours, theirs = load_file(tmp_path / WEIGHTS), revert_weight_conversion(model, model.state_dict())
    for name, value in ours.items():
        n = value.numel()
        if n == 1 or theirs[name].std() == 0:
            assert torch.equal(value, theirs[name]), name
        else:
            ratio = value.std() / theirs[name].std()
            assert abs(ratio - 1) < 5 / n**0.5, f"{name}: deviation {value.std()}, officially {theirs[name].std()}"
            assert abs(value.mean()) < 5 * theirs[name].std() / n**0.5, name


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_another_familys_checkpoint_is_refused(family, tmp_path):
    heads = dict(SKELETON)
    for other in heads.keys() - {family}:
        _, native = make_pair(other, heads[other], tmp_path / other)
        native.save_pretrained(tmp_path / f"zoo_{other}")
        for directory, found in ((other, other), (f"zoo_{other}", f"zoo_{other}")):
            message = f"holds a model of type '{found}'; .* opens '{family}' and 'zoo_{family}'"
            with pytest.raises(ValueError, match=message):
                native_class(family, heads[family]).from_pretrained(tmp_path / directory)


@pytest.mark.parametrize("field", ["num_hidden_groups", "inner_group_num"])
def test_albert_without_layers_is_refused(field):
    """Several of either are what the tiny ALBERT of all tests has."""
    with pytest.raises(StrictDataclassClassValidationError, match=f"{field} is 0, but there must be at least 1"):
        native_class("albert", "AlbertModel").config_class(**{field: 0})


def tied_groups(model) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


@tied
def test_ties_hold_after_load_save_copy_and_resize(family, official, tmp_path):
    model, native = make_pair(family, official, tmp_path / "official")
    inputs = make_inputs(family, official, "none")
    ties = tied_groups(native)
    assert len(ties) == len(tied_groups(model)) == (2 if family == "bert" else 1)
    assert {len(group) for group in ties} == {len(group) for group in tied_groups(model)}
    native.save_pretrained(tmp_path / "native")
    copies = [load(family, official, tmp_path / "native")[0], copy.deepcopy(native), pickle.loads(pickle.dumps(native))]
    for other in (*copies, native.to(torch.float32)):
        assert tied_groups(other) == ties
        assert_same_outputs(other, model, inputs)
    for size in (VOCAB + 9, VOCAB - 5):
        small_inputs = {k: v.clamp(max=VOCAB - 6) if k.endswith("input_ids") else v for k, v in inputs.items()}
        for m in (model, native):
            torch.manual_seed(0)
            m.resize_token_embeddings(size, mean_resizing=False)
        assert tied_groups(native) == ties
        assert native.config.vocab_size == size
        assert tensors_of(native(**small_inputs))[0].shape[-1] == size
        # new rows are drawn at random: those of the official class, for a comparison of all
        with torch.no_grad():
            native.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight)
        assert_same_outputs(native, model, small_inputs, f"{size} tokens")
        native.save_pretrained(tmp_path / f"resized {size}", official=True)
        reopened = type(model).from_pretrained(tmp_path / f"resized {size}").eval()
        assert_same_outputs(native, reopened, small_inputs, f"{size} tokens, reopened")


@tied
def test_resizing_by_the_mean_equals_the_official_class(family, official, tmp_path):
    model, native = make_pair(family, official, tmp_path)
    weights = []
    for m in (model, native):
        torch.manual_seed(0)
        m.resize_token_embeddings(VOCAB + 30, pad_to_multiple_of=16)
        weights.append(m.get_input_embeddings().weight)
    assert weights[1].shape == weights[0].shape == (112, 24)
    assert_close(weights[1], weights[0], "embeddings")


@heads
def test_a_checkpoint_in_our_names(family, official, tmp_path):
    """As quantised weights are saved, which cannot be turned or fused."""
    model, native = make_pair(family, official, tmp_path / "official")
    native.save_pretrained(tmp_path / "ours", save_original_format=False)
    assert load_file(tmp_path / "ours" / WEIGHTS).keys() <= native.state_dict().keys()
    reopened, info = load(family, official, tmp_path / "ours")
    assert_complete(info)
    assert_same_outputs(reopened, model, make_inputs(family, official, "none"))


@pytest.mark.parametrize("gated", [False, True])
def test_t5_feed_forwards_of_both_kinds_save_their_own_names(gated, tmp_path):
    """Also from a config alone, where no load has said which of the official names are meant."""
    feed_forward = "gated-gelu" if gated else "relu"
    config = config_for("t5", "T5ForConditionalGeneration", feed_forward_proj=feed_forward)
    zoo = native_class("t5", "T5ForConditionalGeneration")
    native = randomise(zoo(zoo.config_class.from_dict(config.to_dict()))).eval()
    model = transformers.T5ForConditionalGeneration(config)
    native.save_pretrained(tmp_path / "fresh", official=True)
    assert load_file(tmp_path / "fresh" / WEIGHTS).keys() < model.state_dict().keys()
    opened, info = type(model).from_pretrained(tmp_path / "fresh", output_loading_info=True)
    assert_complete(info)
    inputs = make_inputs("t5", "T5ForConditionalGeneration", "none")
    assert_same_outputs(native, opened.eval(), inputs)
    reloaded, info = load("t5", "T5ForConditionalGeneration", tmp_path / "fresh")
    assert_complete(info)
    reloaded.save_pretrained(tmp_path / "again", official=True)
    assert_same_outputs(reloaded, type(model).from_pretrained(tmp_path / "again").eval(), inputs)


def test_t5_with_a_head_of_its_own(tmp_path):
    """v1.1: the head in the checkpoint differs from the embeddings, and the states are not scaled."""
    config = config_for("t5", "T5ForConditionalGeneration", scale_decoder_outputs=False)
    model = randomise(transformers.T5ForConditionalGeneration(config)).eval()
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(tmp_path / "official")
    native, info = load("t5", "T5ForConditionalGeneration", tmp_path / "official")
    assert_complete(info)
    inputs = make_inputs("t5", "T5ForConditionalGeneration", "none")
    assert_same_outputs(native, model, inputs)
    for official in (False, True):
        native.save_pretrained(tmp_path / str(official), official=official)
        assert_same_outputs(load("t5", "T5ForConditionalGeneration", tmp_path / str(official))[0], model, inputs)
    assert_same_outputs(native, type(model).from_pretrained(tmp_path / "True").eval(), inputs)


def test_a_new_t5_v1_1_has_a_head_of_its_own(tmp_path):
    fields = config_for("t5", "T5ForConditionalGeneration", d_model=256).to_dict() | {"tie_word_embeddings": False}
    fields.pop("scale_decoder_outputs")
    zoo = native_class("t5", "T5ForConditionalGeneration")
    torch.manual_seed(0)
    native = zoo(zoo.config_class.from_dict(fields)).eval()
    assert not native.config.scale_decoder_outputs
    assert tied_groups(native) == {
        frozenset({"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"})
    }
    # 67 x 256 draws from N(0, 1), as in Mesh TensorFlow
    assert abs(native.lm_head.weight.std() - 1) < 0.03
    inputs = make_inputs("t5", "T5ForConditionalGeneration", "none")
    for official in (False, True):
        native.save_pretrained(tmp_path / str(official), official=official)
        reopened, info = load("t5", "T5ForConditionalGeneration", tmp_path / str(official))
        assert_complete(info)
        assert tied_groups(reopened) == tied_groups(native)
        assert_same_outputs(reopened, native, inputs)
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "True").eval()
    assert_same_outputs(native, model, inputs)


def test_a_t5_v1_1_that_was_saved_with_one_matrix(tmp_path):
    """As transformers 5 makes a new one: tied, and not scaled."""
    model, native = make_pair("t5", "T5ForConditionalGeneration", tmp_path / "official", scale_decoder_outputs=False)
    inputs = make_inputs("t5", "T5ForConditionalGeneration", "none")
    assert not native.config.scale_decoder_outputs and tied_groups(native) == tied_groups(model)
    assert_same_outputs(native, model, inputs)
    native.save_pretrained(tmp_path / "again")
    reopened, info = load("t5", "T5ForConditionalGeneration", tmp_path / "again")
    assert_complete(info)
    assert_same_outputs(reopened, model, inputs)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_new_config_has_the_official_defaults(family):
    _, base, _ = FAMILIES[family]
    ours, official = base.config_class().to_dict(), base.official_config_class().to_dict()
    assert {name: value for name, value in ours.items() if official.get(name, value) != value} == {
        "model_type": f"zoo_{family}"
    }
    assert ours.keys() - official.keys() == {"attention", "attention_kwargs", "block", "cross_attention", "int8"}


AUTOS = {
    path.rpartition(".")[2].removeprefix("Zoo"): getattr(transformers, auto)
    for _, base, _ in FAMILIES.values()
    for auto, path in base.auto_map.items()
    if auto != "AutoConfig"
}


@heads
def test_auto_classes_open_ours_and_leave_the_official_alone(family, official, tmp_path):
    model, native = make_pair(family, official, tmp_path / "official")
    native.save_pretrained(tmp_path / "native")
    auto = AUTOS[official]
    opened = auto.from_pretrained(tmp_path / "native").eval()
    assert type(opened) is native_class(family, official)
    assert_same_outputs(opened, model, make_inputs(family, official, "none"))
    assert type(auto.from_pretrained(tmp_path / "official")) is type(model)
    assert json.loads((tmp_path / "native" / "config.json").read_text())["auto_map"].keys() >= {auto.__name__}


@heads
def test_the_official_form_leaves_nothing_of_ours(family, official, tmp_path):
    model, native = make_pair(family, official, tmp_path / "official")
    native.save_pretrained(tmp_path / "saved")
    code = {path.name for path in (tmp_path / "saved").glob("*.py")}
    assert f"modeling_{family}.py" in code
    assert "ragged_attention.py" in code
    (tmp_path / "saved" / "own.py").write_text("")
    native.save_pretrained(tmp_path / "saved", official=True)
    assert [path.name for path in (tmp_path / "saved").glob("*.py")] == ["own.py"]
    theirs, ours = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("official", "saved"))
    assert ours == theirs
    reopened, info = type(model).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert_complete(info)
    assert_same_outputs(native, reopened.eval(), make_inputs(family, official, "none"))
    if model.can_generate():
        assert reopened.generation_config.to_dict() == model.generation_config.to_dict()
    # and the model in hand is still ours
    native.save_pretrained(tmp_path / "ours again")
    assert json.loads((tmp_path / "ours again" / "config.json").read_text())["model_type"] == f"zoo_{family}"


@tied
def test_shards_and_bfloat16(family, official, tmp_path):
    model, native = make_pair(family, official, tmp_path / "official")
    inputs = make_inputs(family, official, "none")
    native.save_pretrained(tmp_path / "shards", max_shard_size="10KB", official=True)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    for opened in (native_class(family, official), type(model)):
        assert_same_outputs(native, opened.from_pretrained(tmp_path / "shards").eval(), inputs)
    native.bfloat16().save_pretrained(tmp_path / "bf16", official=True)
    assert {t.dtype for t in load_file(tmp_path / "bf16" / WEIGHTS).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    reopened, _ = load(family, official, tmp_path / "bf16", dtype="auto")
    assert {p.dtype for p in reopened.parameters()} == {torch.bfloat16}
    for (name, a), (_, b) in zip(reopened.state_dict().items(), native.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    reopened, _ = load(family, official, tmp_path / "bf16", dtype=torch.float32)
    assert_same_outputs(reopened, model.bfloat16().float(), inputs)


VERSIONS = """
import runpy, sys, transformers

def attempt(version, action):
    transformers.__version__ = version
    try:
        action()
        return "accepted"
    except ImportError as error:
        assert "needs transformers >= 5.23 and < 5.25, but " + version + " is installed" in str(error), error
        assert "pip install 'transformers>=5.23,<5.25'" in str(error), error
        return "refused"

for version in ("4.57.0", "5.22.9", "5.23.0", "5.24.1.dev0", "5.25.0", "6.23.0"):
    print(attempt(version, lambda: runpy.run_path("zoo/models/versions.py")))
print(attempt("5.25.0", lambda: runpy.run_module("zoo.models.modeling_t5")))
"""


def test_other_versions_of_transformers_are_refused_in_words():
    result = subprocess.run([sys.executable, "-c", VERSIONS], capture_output=True, text=True, cwd=ROOT)
    outcomes = ["refused"] * 2 + ["accepted"] * 2 + ["refused"] * 3
    assert result.stdout.split() == outcomes, result.stderr[-2000:]


@pytest.mark.parametrize("file", sorted(ROOT.glob("zoo/models/modeling_*.py")), ids=lambda file: file.stem)
def test_the_version_is_looked_at_before_anything_is_imported(file):
    _, first, *_ = ast.parse(file.read_text()).body
    assert isinstance(first, ast.ImportFrom)
    assert (first.level, first.module) == (1, "versions")


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat", "dog", "##s", "ran", "."]
TEXTS = ["the cats sat on a mat .", "a dog ran"]
PIPELINES = {
    "text-classification": ("BertForSequenceClassification", TEXTS, {"top_k": None}),
    "fill-mask": ("BertForMaskedLM", ["the [MASK] sat on a mat .", "a dog [MASK]"], {"top_k": 15}),
    "feature-extraction": ("BertModel", TEXTS, {}),
    "token-classification": ("BertForTokenClassification", TEXTS, {"aggregation_strategy": "simple"}),
}


@pytest.mark.parametrize("task", PIPELINES)
def test_pipelines_run_on_a_native_directory(task, tmp_path):
    official, texts, kwargs = PIPELINES[task]
    tokenizer = transformers.BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    model, native = make_pair("bert", official, tmp_path / "official", vocab_size=len(WORDS), pad_token_id=0)
    native.save_pretrained(tmp_path / "native")
    for directory in ("official", "native"):
        tokenizer.save_pretrained(tmp_path / directory)
    assert type(transformers.AutoTokenizer.from_pretrained(tmp_path / "native")) is type(tokenizer)
    theirs, ours = (transformers.pipeline(task, str(tmp_path / name)) for name in ("official", "native"))
    assert type(ours.model) is native_class("bert", official)
    pairs = zip(ours(texts, batch_size=2, **kwargs), theirs(texts, batch_size=2, **kwargs), strict=True)
    for a, b in pairs:
        if task == "feature-extraction":
            tokens = len(tokenizer(texts[1])["input_ids"])
            assert_close(torch.tensor(a)[:, :tokens], torch.tensor(b)[:, :tokens], task)
            continue
        assert len(a) == len(b) > 0
        for x, y in zip(a, b, strict=True):
            assert abs(x.pop("score") - y.pop("score")) < 1e-5
            assert x == y
