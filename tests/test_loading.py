"""Checkpoints that open, those that are refused, and the proof that every tensor arrived."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel

from tests.models.tiny import SKELETON, config_for, native_class, randomise
from zoo.errors import RunError, UserError
from zoo.loading import load_model, load_processor
from zoo.models.modeling_bert import ZooBertForSequenceClassification, ZooBertModel
from zoo.sections import ModelSection
from zoo.tasks.base import check_padding
from zoo.weights import assert_same_adapter, assert_same_weights

CLASSIFIER = "AutoModelForSequenceClassification"
AUTO = {
    "bert": CLASSIFIER,
    "gpt2": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
}
INPUTS = {"input_ids": torch.tensor([[2, 5, 9, 3]]), "attention_mask": torch.tensor([[1, 1, 1, 1]])}


def section(path, **keys) -> ModelSection:
    return ModelSection.model_validate({"path": str(path), **keys})


def load(path, auto_class=CLASSIFIER, labels=("a", "b", "c"), **keys):
    return load_model(section(path, **keys), auto_class, None if labels is None else list(labels)).eval()


def refused(path, auto_class=CLASSIFIER, **keys) -> str:
    with pytest.raises(UserError) as caught:
        load(path, auto_class, **keys)
    return str(caught.value)


@pytest.fixture
def copy(tiny_bert, tmp_path) -> Path:
    """The tiny checkpoint, to be damaged."""
    return shutil.copytree(tiny_bert, tmp_path / "copy")


def write(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """As a new file: a model's tensors may be a view of the old one."""
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    file.unlink(missing_ok=True)
    if file.suffix == ".bin":
        torch.save(tensors, file)
    else:
        save_file(tensors, file, metadata={"format": "pt"})


def change(directory: Path, edit) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    write(tensors, directory / "model.safetensors")


def edit_config(directory: Path, **fields) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))


# What opens


def test_native_and_official_are_the_same_model(tiny_bert, tmp_path):
    official = load(tiny_bert, implementation="official")
    assert type(official) is transformers.BertForSequenceClassification
    official.save_pretrained(tmp_path)
    native = load(tmp_path, labels=None)
    assert type(native) is ZooBertForSequenceClassification
    assert native.config.id2label == {0: "a", 1: "b", 2: "c"} and native.dtype == torch.float32
    assert (native(**INPUTS).logits - official(**INPUTS).logits).abs().max() < 1e-6


def test_a_head_for_other_labels_is_replaced(tiny_bert, tmp_path):
    load(tiny_bert, implementation="official").save_pretrained(tmp_path)
    for implementation in ("native", "official"):
        model = load(tmp_path, labels=("x", "y", "z", "w", "v"), implementation=implementation)
        assert model(**INPUTS).logits.shape == (1, 5) and model.config.label2id["v"] == 4
        assert 0.01 < model.classifier.weight.std() < 0.03, "drawn anew, as the config has it"


def test_the_head_of_another_task_is_left_out(tiny_bert, tmp_path):
    model = BertForMaskedLM.from_pretrained(tiny_bert)
    model.save_pretrained(tmp_path)
    native = load(tmp_path)
    assert torch.equal(native.bert.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("implementation", ["native", "official"])
def test_old_names_of_norms(copy, implementation):
    def age(tensors):
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(name) + (0.25 if old != name else 0.0)

    change(copy, age)
    model = load(copy, implementation=implementation)
    norms = [value for name, value in model.named_parameters() if "norm" in name.lower() and name.endswith("weight")]
    assert len(norms) == 5 and all(torch.allclose(norm, torch.tensor(1.25)) for norm in norms)
    change(copy, lambda tensors: tensors["encoder.layer.1.output.LayerNorm.gamma"].add_(1e-3))
    with pytest.raises(RunError, match=r"1 tensors differ, such as encoder.layer.1.output.LayerNorm.gamma"):
        assert_same_weights(model, copy)


@pytest.mark.parametrize("implementation", ["native", "official"])
def test_pickled_weights(copy, implementation):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    write(tensors, copy / "pytorch_model.bin")
    model = load(copy, implementation=implementation)
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, tensors["embeddings.word_embeddings.weight"])
    tensors["encoder.layer.0.attention.self.query.bias"][3] += 1e-3
    write(tensors, copy / "pytorch_model.bin")
    with pytest.raises(RunError, match=r"1 tensors differ, such as encoder.layer.0.attention.self.query.bias"):
        assert_same_weights(model, copy)


def test_pickled_code_is_not_run(copy, tiny_bert):
    class Code:
        def __reduce__(self):
            return exec, ("raise SystemExit('was run')",)

    (copy / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": Code()}, copy / "pytorch_model.bin")
    for implementation in ("native", "official"):
        assert "its weights cannot be read" in refused(copy, implementation=implementation)
    # beside safetensors it is not even opened
    shutil.copyfile(tiny_bert / "model.safetensors", copy / "model.safetensors")
    for implementation in ("native", "official"):
        assert load(copy, implementation=implementation) is not None


def test_config_overrides(tiny_bert):
    model = load(tiny_bert, config={"hidden_dropout_prob": 0.0, "classifier_dropout": 0.5})
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert rates.pop("dropout") == 0.5 and set(rates.values()) == {0.0}
    assert (
        load(tiny_bert, config={"attention_probs_dropout_prob": 0.25}).bert.layers[1].self_attn.attention_dropout
        == 0.25
    )
    assert load(tiny_bert, attn_implementation="eager").config._attn_implementation == "eager"


def test_a_variant_by_recipe(tiny_bert, tmp_path):
    full = load(tiny_bert)
    local = load(tiny_bert, attention="local", attention_kwargs={"local": {"window": 1}})
    assert local.config.attention == "local" and local.config.attention_kwargs == {"local": {"window": 1}}
    long = {"input_ids": torch.arange(5, 25)[None], "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    states = [model.bert(**long).last_hidden_state for model in (full, local)]
    assert (states[0] - states[1]).abs().max() > 1e-3
    local.save_pretrained(tmp_path)
    assert load(tmp_path, labels=None).config.attention == "local", "kept when the recipe does not say otherwise"
    assert "a native checkpoint (zoo_bert); use implementation: native" in refused(tmp_path, implementation="official")


# What is refused


@pytest.mark.parametrize("implementation", ["native", "official"])
def test_files_that_are_missing_or_damaged(copy, implementation):
    def says(**keys) -> str:
        return refused(copy, implementation=implementation, **keys)

    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "its weights cannot be read" in says() and "copy the checkpoint again" in says()
    flipped = bytearray(whole)
    flipped[20] ^= 0x80
    weights.write_bytes(flipped)
    assert "its weights cannot be read" in says()
    weights.write_bytes(struct.pack("<Q", 1 << 40) + whole[8:])
    assert "its weights cannot be read" in says()
    weights.unlink()
    assert "its weights cannot be read" in says() and "model.safetensors" in says()
    (copy / "config.json").write_text("{")
    assert "no readable config.json" in says()
    (copy / "config.json").unlink()
    assert "no readable config.json" in says()


@pytest.mark.parametrize("implementation", ["native", "official"])
def test_tensors_that_are_missing_unexpected_or_of_another_shape(copy, implementation):
    whole = load_file(copy / "model.safetensors")
    query = "encoder.layer.1.attention.self.query.weight"

    def says(edit) -> str:
        write(whole, copy / "model.safetensors")
        change(copy, edit)
        return refused(copy, implementation=implementation)

    assert "1 weights are missing: bert." in says(lambda tensors: tensors.pop(query))
    assert "1 weights are of another shape: bert." in says(lambda tensors: tensors.update({query: torch.zeros(3, 3)}))
    extra = query.replace("layer.1", "layer.2")
    assert "1 weights are unexpected: " in says(lambda tensors: tensors.update({extra: tensors[query].clone()}))
    one = query.replace("query.weight", "relative.weight")
    assert "1 weights are unexpected: " in says(lambda tensors: tensors.update({one: tensors[query].clone()}))
    assert "weights are missing" in says(lambda tensors: [tensors.pop(name) for name in list(tensors)[1:]])


def test_a_missing_tensor_of_t5(tmp_path):
    """Its classes have no base with a head on it, so nothing may be missing."""
    randomise(transformers.T5ForConditionalGeneration(config_for("t5", "T5ForConditionalGeneration"))).save_pretrained(
        tmp_path
    )
    change(tmp_path, lambda tensors: tensors.pop("encoder.block.1.layer.0.SelfAttention.q.weight"))
    for implementation in ("native", "official"):
        said = refused(tmp_path, AUTO["t5"], labels=None, implementation=implementation)
        assert "1 weights are missing: encoder." in said


def test_families_and_heads(tiny_bert, copy):
    edit_config(copy, model_type="electra", architectures=["ElectraModel"])
    families = "only for bert, roberta, albert, distilbert, gpt2, t5, vit; use implementation: official"
    assert f"no native class for the type 'electra', {families}" in refused(copy)
    edit_config(copy, model_type=None)
    assert "no readable config.json: it is missing, or names no model_type" in refused(copy)
    assert "the native bert has no AutoModelForSeq2SeqLM" in refused(tiny_bert, "AutoModelForSeq2SeqLM")
    assert "no such file or directory" in refused(tiny_bert / "nowhere" / "model.bin")


@pytest.mark.parametrize("implementation", ["native", "official"])
def test_config_keys_that_are_refused(tiny_bert, implementation):
    def says(**keys) -> str:
        return refused(tiny_bert, implementation=implementation, **keys)

    assert "model.config.hidden_dropout_pro: " in says(config={"hidden_dropout_pro": 0.1})
    assert "did you mean hidden_dropout_prob?" in says(config={"hidden_dropout_pro": 0.1})
    assert "hidden_dropout_prob" in says(config={"hidden_dropout_prob": "none"})
    assert "its config is refused" in says(config={"num_hidden_layers": "two"})
    assert "not a multiple of" in says(config={"num_attention_heads": 5})
    assert "weights are of another shape" in says(config={"intermediate_size": 64})
    assert "nonsense" in says(attn_implementation="nonsense")


def test_variants_that_are_refused(tiny_bert):
    for wrong in ({"attention": "loca"}, {"attention": "local", "attention_kwargs": {"local": {"windw": 3}}}):
        with pytest.raises(ValidationError):
            section(tiny_bert, **wrong)
    assert "model.encoder_attention: ZooBertConfig has no such field" in refused(tiny_bert, encoder_attention="linear")
    said = refused(tiny_bert, attention="local", attention_kwargs={"local": {"window": -1}})
    assert "window" in said and "-1" in said


def test_attentions_of_a_model_from_random_weights():
    small = {"vocab_size": 30, "num_layers": 1, "d_model": 8, "d_ff": 8, "num_heads": 2, "d_kv": 4}
    kwargs = {"attention_kwargs": {"local": {"window": 2}}}
    t5 = ModelSection(config={"model_type": "t5", **small}, encoder_attention="local", **kwargs)
    assert load_model(t5, "AutoModelForSeq2SeqLM").encoder.config.encoder_attention == "local"
    bert = {"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    with pytest.raises(UserError, match=r"model\.decoder_attention: ZooBertConfig has no such field"):
        load_model(ModelSection(config=bert, decoder_attention="linear"), "AutoModelForMaskedLM")
    official = ModelSection(config=bert, attention="full", implementation="official")
    assert type(load_model(official, "AutoModelForMaskedLM")).__name__ == "BertForMaskedLM"


def test_a_stack_that_the_recipe_does_not_name_keeps_its_parameters(tmp_path):
    fields = {"encoder_attention": "bigbird", "attention_kwargs": {"bigbird": {"block_size": 2}}}
    config = native_class("t5", "T5Model").config_class.from_dict({**config_for("t5", "T5Model").to_dict(), **fields})
    native_class("t5", "T5Model")(config).save_pretrained(tmp_path)
    for named in ({"attention": "full"}, {"decoder_attention": "block", "attention_kwargs": {"block": {"size": 4}}}):
        found = load_model(ModelSection(path=str(tmp_path), **named), "AutoModel").config
        assert found.encoder_attention == "bigbird" and found.attention_kwargs["bigbird"] == {"block_size": 2}
    other = ModelSection(path=str(tmp_path), encoder_attention="full")
    assert load_model(other, "AutoModel").config.attention_kwargs == {}


def test_tokenizers(copy):
    tokenizer = load_processor(section(copy), "tokenizer")
    assert tokenizer("oil shares")["input_ids"][0] == tokenizer.cls_token_id
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="its tokenizer cannot be read"):
        load_processor(section(copy), "tokenizer")


# Tokens that the checkpoint has not seen

GROWN = [
    ("bert", "BertForMaskedLM", {}),
    ("bert", "BertForSequenceClassification", {}),
    ("gpt2", "GPT2LMHeadModel", {}),
    ("gpt2", "GPT2LMHeadModel", {"tie_word_embeddings": False}),
    ("t5", "T5ForConditionalGeneration", {"feed_forward_proj": "relu"}),
    ("t5", "T5ForConditionalGeneration", {"scale_decoder_outputs": False}),
]
HEADS = {"BertForMaskedLM": "AutoModelForMaskedLM", "BertForSequenceClassification": CLASSIFIER}
NEW = ["<one>", "<two>"]


@pytest.mark.parametrize("implementation", ["native", "official"])
@pytest.mark.parametrize(("family", "official", "fields"), GROWN)
def test_added_tokens(tiny_bert, tmp_path, capsys, family, official, fields, implementation):
    """Each new row, of an untied head too, is the mean of the old ones but for the library's noise of 1e-5."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    size = len(tokenizer)
    model = randomise(getattr(transformers, official)(config_for(family, official, vocab_size=size, **fields)))
    if "scale_decoder_outputs" in fields:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(tmp_path / "old")
    tokenizer.save_pretrained(tmp_path / "old")
    chosen = section(tmp_path / "old", added_tokens=[*NEW, "the"], implementation=implementation)
    processor = load_processor(chosen, "tokenizer")
    auto_class = HEADS.get(official, AUTO.get(family, ""))
    if implementation == "official" and "scale_decoder_outputs" in fields:
        with pytest.raises(UserError, match="would lose its output layer; use implementation: native"):
            load_model(chosen, auto_class, processor=processor)
        return
    grown = load_model(chosen, auto_class, processor=processor).eval()
    said = capsys.readouterr().out
    assert "model.added_tokens: 2 new ones" in said and f"2 tokens beyond its vocabulary of {size}" in said
    assert processor.convert_tokens_to_ids(NEW) == [size, size + 1] and grown.config.vocab_size == size + 2
    for old, new in ((model.get_input_embeddings(), grown.get_input_embeddings()),
                     (model.get_output_embeddings(), grown.get_output_embeddings())):  # fmt: skip
        if old is not None:
            assert torch.equal(new.weight[:size], old.weight)
            assert (new.weight[size:] - old.weight.mean(0)).abs().max() < 1e-4 < old.weight.mean(0).abs().max()
            assert new.weight.shape[0] == size + 2
    head = grown.get_output_embeddings()
    tied = head is not None and head.weight is grown.get_input_embeddings().weight
    assert tied == (official != "BertForSequenceClassification" and not {*fields} - {"feed_forward_proj"})
    grown.save_pretrained(tmp_path / "new", **({"official": True} if implementation == "native" else {}))
    processor.save_pretrained(tmp_path / "new")
    again = section(tmp_path / "new")
    reopened = load_model(
        again, HEADS.get(official, AUTO.get(family, "")), processor=load_processor(again, "tokenizer")
    )
    assert "beyond its vocabulary" not in capsys.readouterr().out
    ids = torch.tensor([[5, size, size + 1, 9]])
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if family == "t5" else {})
    assert (reopened.eval()(**inputs).logits - grown(**inputs).logits).abs().max() < 1e-5


def test_what_pads(tiny_bert, tmp_path, capsys):
    """The end of a text where there is no padding token, as of GPT-2; or an unknown token; or nothing."""
    for name, special, pads in (
        ("end", {"eos_token": "[SEP]"}, "[SEP]"), ("unknown", {}, "[UNK]"), ("nothing", {"unk_token": None}, None),
    ):  # fmt: skip
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tiny_bert / "tokenizer.json"), **{"unk_token": "[UNK]", **special}
        )
        tokenizer.save_pretrained(tmp_path / name)
        processor = load_processor(section(tmp_path / name), "tokenizer")
        assert processor.pad_token == pads
        assert (f"the tokenizer has no padding token: {pads} pads" in capsys.readouterr().out) == (pads is not None)
        if pads is None:
            with pytest.raises(UserError, match="its tokenizer has no padding token; save it with one"):
                check_padding(processor)
            continue
        config = config_for("gpt2", "GPT2LMHeadModel", vocab_size=len(processor), pad_token_id=None)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        model = load_model(section(tmp_path / name), AUTO["gpt2"], processor=processor)
        assert model.config.pad_token_id == processor.pad_token_id == processor.convert_tokens_to_ids(pads)


# The proof


def save_skeleton(family: str, official: str, directory: Path, shard: bool) -> None:
    model = randomise(getattr(transformers, official)(config_for(family, official)))
    model.save_pretrained(directory, max_shard_size="20KB" if shard else "5GB")
    assert (directory / "model.safetensors.index.json").exists() == shard


@pytest.mark.parametrize("shard", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("implementation", ["native", "official"])
@pytest.mark.parametrize(("family", "official"), SKELETON)
def test_one_changed_value_is_seen(tmp_path, family, official, implementation, shard):
    save_skeleton(family, official, tmp_path, shard)
    model = load(tmp_path, AUTO[family], labels=None, implementation=implementation)
    assert_same_weights(model, tmp_path, whole=True)
    for parameter in () if shard else model.parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
        with pytest.raises(RunError, match="tensors differ, such as"):
            assert_same_weights(model, tmp_path)
        with torch.no_grad():
            parameter.copy_(before)
    assert_same_weights(model, tmp_path)
    file = sorted(tmp_path.glob("model*.safetensors"))[-1]
    tensors = load_file(file)
    for name in tensors:
        write(tensors | {name: tensors[name] + 1e-3}, file)
        with pytest.raises(RunError, match="1 tensors differ, such as") as caught:
            assert_same_weights(model, tmp_path)
        assert name in str(caught.value)


@pytest.mark.parametrize(("family", "official"), SKELETON)
def test_a_directory_of_its_own_is_compared_both_ways(tmp_path, family, official):
    save_skeleton(family, official, tmp_path, shard=False)
    model = native_class(family, official).from_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    for name in whole:
        rest = {other: tensor for other, tensor in whole.items() if other != name}
        write(rest, tmp_path / "model.safetensors")
        with pytest.raises(RunError, match="tensors are in one of them only, such as"):
            assert_same_weights(model, tmp_path, whole=True)
    write(whole | {"extra": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(RunError, match="1 tensors are in one of them only, such as extra"):
        assert_same_weights(model, tmp_path, whole=True)
    assert_same_weights(model, tmp_path)


def test_no_tensor_in_common(tiny_bert, tmp_path):
    model = ZooBertModel.from_pretrained(tiny_bert)
    write({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(RunError, match="no tensor was found again"):
        assert_same_weights(model, tmp_path)
    with pytest.raises(RunError, match="no tensor was found again"):
        assert_same_weights(BertModel(BertConfig(hidden_size=12, num_hidden_layers=1, vocab_size=9)), tmp_path / "none")


def test_one_changed_value_of_an_adapter_is_seen(tiny_bert, tmp_path):
    lora = LoraConfig(target_modules=["q_proj", "fc1"], modules_to_save=["classifier"], r=2)
    model = get_peft_model(load(tiny_bert), lora)
    model.save_pretrained(tmp_path)
    assert_same_adapter(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 2 * 2 * 2 + 2
    for name in saved:
        save_file(saved | {name: saved[name] + 1e-3}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(RunError, match="did not arrive in the model: ") as caught:
            assert_same_adapter(model, tmp_path)
        assert name in str(caught.value)
    save_file({name: saved[name] for name in list(saved)[1:]}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RunError, match="did not arrive in the model"):
        assert_same_adapter(model, tmp_path)
