"""Each native head against its official class: the same weights, the same numbers, by every path."""

import pytest
import torch
from safetensors.torch import load_file
from transformers.core_model_loading import revert_weight_conversion

from zoo.models import linear as zoo_linear

from .test_linear import needs_onednn
from .tiny import CONFIGS, HEADS, make_inputs, make_pair, native_class, randomise, rows_entering

# (attention implementation, ragged mode)
PATHS = {"eager padded": ("eager", "off"), "sdpa padded": ("sdpa", "off"), "sdpa ragged": ("sdpa", "on")}
TOLERANCE = 1e-5
LABELLED = [(f, name) for f, name in HEADS if not name.endswith(("Model", "QuestionAnswering")) or "LMHead" in name]

heads = pytest.mark.parametrize("family, official", HEADS, ids=[name for _, name in HEADS])
paths = pytest.mark.parametrize("path", PATHS)


def real_rows(inputs: dict, output: torch.Tensor) -> torch.Tensor:
    """The part of an output that belongs to real tokens; outputs that are not per input token are kept whole."""
    mask = inputs["attention_mask"].bool().flatten(0, -2)
    return output[mask] if output.shape[:2] == mask.shape else output


def assert_close(native: torch.Tensor, official: torch.Tensor, what: str):
    scale = max(1.0, official.abs().max().item())
    difference = (native - official).abs().max().item() / scale
    assert difference <= TOLERANCE, f"{what}: off by {difference}"


def run(model, inputs: dict, backward: bool = False, **kwargs):
    output = model(**inputs, **kwargs)
    if backward:
        output.loss.backward()
    return output


def official_gradients(model) -> dict[str, torch.Tensor]:
    """Gradients of a model, native or official, under the names on disk."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return revert_weight_conversion(model, gradients)


def load_from_native(model, native) -> None:
    """Gives an official model the weights of a native one, by the names on disk, which may not be its own (ViT)."""
    ours = revert_weight_conversion(native, native.state_dict())
    state = model.state_dict()
    on_disk = revert_weight_conversion(model, dict(state))
    assert ours.keys() == on_disk.keys()
    with torch.no_grad():
        for name, tensor in on_disk.items():
            tensor.copy_(ours[name])


@heads
@paths
def test_outputs_loss_and_gradients(family, official, path, tmp_path):
    implementation, ragged = PATHS[path]
    model, native = make_pair(family, official, tmp_path, implementation)
    native.set_ragged(ragged)
    inputs = make_inputs(family, official, labels=True)
    want = {"output_hidden_states": True, "output_attentions": implementation == "eager"}
    has_loss = any("label" in name or "positions" in name or "masked_pos" in name for name in inputs)

    expected = run(model, inputs, has_loss, **want)
    outputs = run(native, inputs, has_loss, **want)
    # counted by hooks, and a layer with hooks is never bypassed
    rows = rows_entering(native, lambda: native(**inputs, **want))

    layer = next(name for name in rows if name.endswith("layers.0.mlp.fc1"))
    mask = inputs["attention_mask"]
    # the first group of ALBERT's layers runs three times
    runs = 3 if family == "albert" else 1
    assert rows[layer] == runs * (mask.sum() if ragged == "on" else mask.numel())
    assert set(outputs) == {name for name, value in expected.items() if value is not None}
    for name, value in expected.items():
        if not isinstance(value, (torch.Tensor, tuple)):
            continue  # a cache, compared by what it generates
        ours = outputs[name]
        if name in ("start_logits", "end_logits") and ragged == "on" and family != "t5":
            assert (ours[mask == 0] == torch.finfo(ours.dtype).min).all()
        pairs = zip(ours, value, strict=True) if isinstance(value, tuple) else [(ours, value)]
        for index, (a, b) in enumerate(pairs):
            if name == "loss" and official.endswith("QuestionAnswering") and ragged == "on":
                continue  # the official loss moves with padding; see test_ragged
            is_weights = "attentions" in name
            a, b = (a, b) if is_weights else (real_rows(inputs, x) for x in (a, b))
            assert_close(a, b, f"{name}[{index}]")
    if has_loss and not (official.endswith("QuestionAnswering") and ragged == "on"):
        theirs, ours = official_gradients(model), official_gradients(native)
        assert set(ours) == set(theirs)
        for name, gradient in theirs.items():
            assert_close(ours[name], gradient, f"gradient of {name}")


@pytest.mark.parametrize("family, official", LABELLED, ids=[name for _, name in LABELLED])
def test_training_loss_without_logits_is_the_official_loss(family, official, tmp_path):
    """In training, token heads make their loss without logits; no dropout, so it must be the official one."""
    rates = [name for name in CONFIGS[family].to_dict() if "dropout" in name or name.endswith("_pdrop")]
    # a field that GPT-2's config has only where it is given
    rates += ["classifier_dropout"] if family == "gpt2" else []
    model, native = make_pair(family, official, tmp_path, **dict.fromkeys(rates, 0.0))
    inputs = make_inputs(family, official, labels=True)
    expected, output = run(model.train(), inputs, True), run(native.train(), inputs, True)
    assert_close(output.loss, expected.loss, "loss")
    endings = ("ForMaskedLM", "ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForPreTraining")
    assert (output.get("logits") is None) == official.endswith((*endings, "ForMaskedImageModeling"))
    ours = official_gradients(native)
    for name, gradient in official_gradients(model).items():
        assert_close(ours[name], gradient, f"gradient of {name}")


@pytest.mark.parametrize("onednn", [False, pytest.param(True, marks=needs_onednn)])
@pytest.mark.parametrize("official", ["BertForSequenceClassification", "BertForMaskedLM"])
def test_gradients_by_either_matrix_library(official, onednn, tmp_path, monkeypatch):
    """Packed, without recorded states, as in training: also where the last layer makes no keys and values."""
    monkeypatch.setattr(zoo_linear, "onednn_is_faster", lambda: onednn)
    model, native = make_pair("bert", official, tmp_path)
    native.set_ragged("on")
    inputs = make_inputs("bert", official, labels=True)
    assert_close(run(native, inputs, True).loss, run(model, inputs, True).loss, "loss")
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    ours = official_gradients(native)
    assert set(ours) == set(theirs)
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, f"gradient of {name}")


@heads
def test_saved_keys_and_tensors_are_the_official_ones(family, official, tmp_path):
    model, native = make_pair(family, official, tmp_path / "official")
    native.save_pretrained(tmp_path / "native")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("official", "native"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@heads
def test_a_model_made_from_a_config_saves_official_names_too(family, official, tmp_path):
    """Without a load there is no recorded map; the registered one must be found all the same."""
    model, native = make_pair(family, official, tmp_path / "official")
    fresh = randomise(native_class(family, official)(native.config), seed=5).eval()
    fresh.save_pretrained(tmp_path / "fresh", official=True)
    reopened = type(model).from_pretrained(tmp_path / "fresh").eval()
    inputs = make_inputs(family, official)
    fresh.set_ragged("off")
    for name, value in reopened(**inputs).items():
        if isinstance(value, torch.Tensor):
            assert_close(fresh(**inputs)[name], value, name)


@heads
def test_every_parameter_moves_both_outputs_alike(family, official, tmp_path):
    """A parameter that is read wrongly, or not at all, cannot hide behind the others."""
    model, native = make_pair(family, official, tmp_path)
    inputs = make_inputs(family, official, "none")

    def outputs(m):
        return torch.cat([x.flatten() for x in m(**inputs).values() if isinstance(x, torch.Tensor)])

    with torch.no_grad():
        before = outputs(native)
        silent = []
        for name, parameter in native.named_parameters():
            kept = parameter.clone()
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.5)
            load_from_native(model, native)
            moved, expected = outputs(native), outputs(model)
            assert_close(moved, expected, name)
            if torch.allclose(moved, before, atol=1e-6):
                silent.append(name)
            parameter.copy_(kept)
    # a softmax does not see what is added to all scores of a query alike
    assert all(name.endswith("k_proj.bias") for name in silent), silent
