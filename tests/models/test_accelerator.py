"""On an accelerator: each native head against its official class there, and a run from recipe to answers.

Linear layers are packed there and attention is not (`Packing.per_sequence`), so it is another path than on a CPU.
"""

import json

import pytest
import torch

from tests.tiny_run import STEPS, differing, events, make_recipe, weights
from zoo.evaluation import run as evaluate
from zoo.models.ragged import Packing
from zoo.prediction import run as predict
from zoo.train import run as train

from .test_generation import COMMON, FAMILIES, prompt
from .test_generation import pair as writing_pair
from .test_parity import assert_close, heads, official_gradients, real_rows, run
from .tiny import HEADS, PADDING, make_inputs, make_pair

pytestmark = pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
WAYS = {"greedy": {}, "beams": {"num_beams": 3}, "static cache": {"cache_implementation": "static"}}


def there(x):
    """A model, or a batch, on the accelerator."""
    device = torch.accelerator.current_accelerator()
    return {name: value.to(device) for name, value in x.items()} if isinstance(x, dict) else x.to(device)


@heads
@pytest.mark.parametrize("ragged", ["off", "on"])
def test_outputs_loss_and_gradients(family, official, ragged, tmp_path):
    model, native = (there(m) for m in make_pair(family, official, tmp_path))
    native.set_ragged(ragged)
    inputs = there(make_inputs(family, official, labels=True))
    has_loss = any("label" in name or "positions" in name or "masked_pos" in name for name in inputs)
    # the official loss of answers moves with padding
    has_loss = has_loss and not (official.endswith("QuestionAnswering") and ragged == "on")
    expected, outputs = run(model, inputs, has_loss), run(native, inputs, has_loss)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor) and (name != "loss" or has_loss):
            assert_close(real_rows(inputs, outputs[name]), real_rows(inputs, value), name)
    if has_loss:
        ours = official_gradients(native)
        for name, gradient in official_gradients(model).items():
            assert_close(ours[name], gradient, f"gradient of {name}")


@pytest.mark.parametrize("family, official", HEADS, ids=[name for _, name in HEADS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(family, official, dtype, tmp_path):
    """As near to the official class in fp32 as the official class in half precision is, or nearly so."""
    model, native = (there(m) for m in make_pair(family, official, tmp_path))
    inputs = there(make_inputs(family, official))
    half = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    name = next(name for name in model(**inputs) if name not in ("loss", "past_key_values"))
    with torch.no_grad():
        exact = real_rows(inputs, model(**inputs)[name])
        theirs, ours = (real_rows(inputs, m.to(dtype)(**half)[name]).float() for m in (model, native))
    scale = exact.abs().max()
    assert torch.isfinite(ours).all()
    assert (ours - exact).abs().max() / scale <= 2 * (theirs - exact).abs().max() / scale + 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("way", WAYS)
def test_token_for_token(family, padding, way, tmp_path):
    model, native = (there(m) for m in writing_pair(family, tmp_path))
    inputs = there(prompt(family, padding))
    theirs, ours = (m.generate(**inputs, **COMMON, do_sample=False, **WAYS[way]) for m in (model, native))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("padding", PADDING)
def test_packing_there_and_back(padding):
    mask = torch.tensor(PADDING[padding], device=torch.accelerator.current_accelerator())
    packing = Packing.from_mask(mask)
    states = torch.randn(*mask.shape, 4, device=mask.device)
    packed = packing.pack(states)
    assert not packing.per_sequence and len(packed) == mask.sum()
    assert torch.equal(packing.unpack(packed), states * mask.unsqueeze(-1))


@pytest.mark.parametrize("precision, tolerance", [({}, 1e-3), ({"bf16": True}, 0.03)], ids=["fp32", "bf16"])
def test_a_run_from_recipe_to_answers(precision, tolerance, tiny_bert, r8, tmp_path):
    """Without dropout, whose numbers are drawn elsewhere, its losses are those of a CPU."""
    still = {"config": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
    losses = []
    for train_section in ({"use_cpu": True}, precision):
        folder = tmp_path / str(len(losses))
        metrics = train(make_recipe(tiny_bert, r8, train=train_section, **still), folder)
        losses.append([values["loss"] for _, values in events(folder, "train") if "loss" in values])
    assert losses[1] == pytest.approx(losses[0], rel=tolerance) and len(losses[0]) == STEPS // 3
    assert evaluate(folder)["test_loss"] == pytest.approx(metrics["test_loss"], rel=tolerance)
    (answer,) = predict(folder, ["Oil prices rose by 2 dollars a barrel."])
    assert answer["predicted"] in ("acq", "earn", "crude")
    assert json.loads((folder / "environment.json").read_text())["hardware"]["accelerators"]


def test_a_run_twice_is_the_same(tiny_bert, r8, tmp_path):
    recipe = make_recipe(tiny_bert, r8)
    for name in ("first", "second"):
        train(recipe, tmp_path / name)
    assert differing(weights(tmp_path / "first"), weights(tmp_path / "second")) == []
