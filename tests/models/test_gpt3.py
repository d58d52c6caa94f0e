"""GPT-3: full and local layers in turn (arXiv 2005.14165, section 2.1). What they see, cached, packed and saved."""

import json
import os
import subprocess
import sys

import pytest
import torch

from zoo.fresh import fresh_config
from zoo.models import ZooGPT2LMHeadModel

from .test_parity import assert_close
from .tiny import randomise

WINDOW, VOCAB, LENGTH = 4, 67, 24


def make(**changes) -> ZooGPT2LMHeadModel:
    """A GPT-3 of four layers, its band narrow enough to hide something."""
    small = {"vocab_size": VOCAB, "n_embd": 32, "n_head": 4, "n_layer": 4, "pad_token_id": 1, "eos_token_id": None}
    small |= {"bos_token_id": None, "attention": ["full", "local"], "attention_kwargs": {"local": {"window": WINDOW}}}
    return randomise(ZooGPT2LMHeadModel(fresh_config("gpt3-125m", **small, **changes))).eval()


@pytest.fixture(scope="module")
def gpt3():
    return make()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(0))


def moved(model, ids, place: int) -> list[list[int]]:
    """The positions whose states another token at `place` moves, behind each layer."""
    other = ids.clone()
    other[0, place] = (other[0, place] + 1) % VOCAB
    with torch.no_grad():
        a, b = (model(input_ids=x, output_hidden_states=True).hidden_states for x in (ids, other))
    # the first are the embeddings, the last have the final norm
    return [(x - y).abs().amax(-1)[0].nonzero().flatten().tolist() for x, y in zip(a[1:], b[1:], strict=True)]


@pytest.mark.parametrize("mode", ["off", "on"])
@pytest.mark.parametrize("place", [0, 9, LENGTH - 1])
def test_a_local_layer_sees_the_window_alone(ids, place, mode):
    """All layers local: each carries a token window - 1 places further, and no layer carries it back."""
    model = make(n_positions=LENGTH)
    model.config.attention = "local"
    model.set_ragged(mode)
    reach = [list(range(place, min(LENGTH, place + depth * (WINDOW - 1) + 1))) for depth in range(1, 5)]
    assert moved(model, ids, place) == reach


def test_layers_take_turns(gpt3, ids):
    """Full layers carry a token to the end; a local one that comes first carries it through its window alone."""
    assert moved(gpt3, ids, 5) == [list(range(5, LENGTH))] * 4
    turned = make()
    turned.load_state_dict(gpt3.state_dict())
    turned.config.attention = ["local", "full"]
    first, *rest = moved(turned, ids, 5)
    assert first == list(range(5, 5 + WINDOW)) and rest == [list(range(5, LENGTH))] * 3


def test_a_hidden_token_moves_a_local_layer_only_through_the_full_ones(gpt3, ids):
    """With the states that enter it held, a local layer's output does not know of a token outside its window."""
    layer, entering = gpt3.transformer.layers[1], {}
    keep = layer.register_forward_pre_hook(lambda module, args: entering.update(states=args[0], mask=args[1]))
    with torch.no_grad():
        gpt3.set_ragged("off")
        gpt3(input_ids=ids)
        keep.remove()
        states = entering["states"]
        other = states.clone()
        other[0, 9] += torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(1))
        difference = (layer(states, entering["mask"]) - layer(other, entering["mask"])).abs().amax(-1)[0]
    gpt3.set_ragged("auto")
    assert difference.nonzero().flatten().tolist() == list(range(9, 9 + WINDOW))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_every_cached_step_equals_the_full_pass(gpt3, ids, cache):
    """Generated to a length of many windows, so that most keys in the cache are outside of the last."""
    made = gpt3.generate(
        input_ids=ids[:, :6], attention_mask=torch.ones(1, 6).long(), max_new_tokens=5 * WINDOW, do_sample=False,
        cache_implementation=cache, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    with torch.no_grad():
        logits = gpt3(input_ids=made.sequences).logits[0]
    for step, cached in enumerate(made.logits):
        assert_close(cached[0], logits[5 + step], f"step {step}")


def test_ragged_equals_padded_in_logits_loss_and_gradients():
    model = make(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0).train()
    generator = torch.Generator().manual_seed(2)
    mask = (torch.arange(LENGTH)[None] < torch.tensor([LENGTH, 13, 2])[:, None]).long()
    ids = torch.randint(3, VOCAB, (3, LENGTH), generator=generator).masked_fill(mask == 0, 1)
    labels = ids.masked_fill(mask == 0, -100)
    found = []
    for mode in ("off", "on"):
        model.set_ragged(mode)
        model.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        with torch.no_grad():
            logits = model.eval()(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        model.train()
        found.append((loss.detach(), logits, [p.grad.clone() for p in model.parameters()]))
    (loss, logits, gradients), (other_loss, other_logits, other_gradients) = found
    assert_close(other_loss, loss, "loss")
    assert_close(other_logits, logits, "logits")
    for (name, _), a, b in zip(model.named_parameters(), gradients, other_gradients, strict=True):
        assert_close(b, a, name)


OPEN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert "zoo" not in sys.modules and model.config.attention == ["full", "local"], model.config.attention
ids, logits, made = torch.load(sys.argv[2])
assert (model(input_ids=ids).logits - logits).abs().max() < 1e-6
again = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
assert torch.equal(again, made)
print("opened")
"""


def test_saved_and_opened_by_a_process_without_this_package(gpt3, ids, tmp_path):
    gpt3.save_pretrained(tmp_path / "gpt3")
    config = json.loads((tmp_path / "gpt3" / "config.json").read_text())
    assert config["attention"] == ["full", "local"] and config["attention_kwargs"] == {"local": {"window": WINDOW}}
    with torch.no_grad():
        made = gpt3.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
        torch.save((ids, gpt3(input_ids=ids).logits, made), tmp_path / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-P", "-c", OPEN, str(tmp_path / "gpt3"), str(tmp_path / "expected.pt")],
        cwd=tmp_path, env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "opened", done.stderr[-3000:]
