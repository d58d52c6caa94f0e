"""Several documents in a row: positions that begin anew tell them apart, whoever attends."""

import dataclasses

import pytest
import torch
from transformers import DataCollatorWithFlattening

from zoo.models.ragged import Packing

from .test_parity import assert_close
from .tiny import VOCAB, make_pair

LENGTHS = [[4, 7, 2], [13], [5, 8]]
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
DROPOUT = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
LOCAL = {"attention": ["full", "local"], "attention_kwargs": {"local": {"window": 3}}}
# official or native, attn_implementation, ragged, other fields of the config
RUNNERS = {
    "official eager": ("official", "eager", None, {}),
    "official sdpa": ("official", "sdpa", None, {}),
    "native eager": ("native", "eager", "off", {}),
    "native padded": ("native", "sdpa", "off", {}),
    "native packed": ("native", "sdpa", "on", {}),
    "native packed, attention padded": ("native", "sdpa", "on", {}),
    "local eager": ("native", "eager", "off", LOCAL),
    "local padded": ("native", "sdpa", "off", LOCAL),
    "local packed": ("native", "sdpa", "on", LOCAL),
}


@pytest.fixture(params=RUNNERS)
def runner(request, tmp_path, monkeypatch):
    kind, implementation, ragged, fields = RUNNERS[request.param]
    model, native = make_pair("gpt2", "GPT2LMHeadModel", tmp_path, implementation, **NO_DROPOUT)
    if kind == "official":
        return model
    for name, value in fields.items():
        setattr(native.config, name, value)
    native.set_ragged(ragged)
    if "attention padded" in request.param:
        # as on an accelerator
        full = Packing.full
        apart = classmethod(lambda cls, *args: dataclasses.replace(full(*args), per_sequence=False))
        monkeypatch.setattr(Packing, "full", apart)
    return native


@pytest.fixture(scope="module")
def documents() -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [[torch.randint(3, VOCAB, (length,), generator=generator) for length in row] for row in LENGTHS]


def packed(rows: list[list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows that all have the same length, as transformers' own collator flattens each."""
    collate = DataCollatorWithFlattening()
    flat = [collate([{"input_ids": document} for document in row]) for row in rows]
    return {name: torch.cat([row[name] for row in flat]) for name in flat[0]}


def logits(model, rows) -> list[list[torch.Tensor]]:
    """Of each document."""
    batch = packed(rows)
    found = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    return [list(row.split([len(document) for document in given])) for row, given in zip(found, rows, strict=True)]


def test_a_document_is_alone_wherever_it_stands(runner, documents):
    with torch.no_grad():
        together = logits(runner, documents)
        other = [[(documents[0][0] + 1) % VOCAB, *documents[0][1:]], *documents[1:]]
        changed = logits(runner, other)
        elsewhere = logits(runner, [documents[2][::-1], documents[1], documents[0][::-1]])
        alone = [[runner(input_ids=document[None]).logits[0] for document in row] for row in documents]
    assert not torch.allclose(changed[0][0], together[0][0], atol=1e-3)
    for row, (given, found) in enumerate(zip(alone, together, strict=True)):
        for place, (expected, seen) in enumerate(zip(given, found, strict=True)):
            assert_close(seen, expected, f"document {place} of row {row}")
            if (row, place) != (0, 0):
                assert torch.equal(changed[row][place], seen), f"document {place} of row {row} saw another one"
    for place in range(3):
        assert_close(elsewhere[2][2 - place], together[0][place], f"document {place}, moved")


def test_the_loss_is_that_of_the_documents(runner, documents):
    """The mean over all tokens, and its gradients; the first token of each is no label."""
    runner.train()
    every = [document for row in documents for document in row]
    runner(**packed(documents), use_cache=False).loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in runner.named_parameters()}
    runner.zero_grad()
    tokens = sum(len(document) - 1 for document in every)
    total = sum(
        runner(input_ids=document[None], labels=document[None]).loss * (len(document) - 1) for document in every
    )
    (total / tokens).backward()
    for name, parameter in runner.named_parameters():
        assert_close(parameter.grad, grads[name], name)


def test_a_cache_that_nobody_asked_for_hides_no_document(documents, tmp_path):
    """The official class makes one unless it is told not to, and then a document sees the ones before it."""
    model, native = make_pair("gpt2", "GPT2LMHeadModel", tmp_path)
    batch = {name: value for name, value in packed(documents).items() if name != "labels"}
    assert model.config.use_cache
    with torch.no_grad():
        apart = model(**batch, use_cache=False).logits
        for mode in ("on", "off"):
            native.set_ragged(mode)
            assert_close(native(**batch).logits, apart, mode)


def test_dropout_keeps_documents_apart(documents, tmp_path):
    """Packed attention with a dropout of its own."""
    _, native = make_pair("gpt2", "GPT2LMHeadModel", tmp_path, **DROPOUT)
    native.train().set_ragged("on")
    other = [[(documents[0][0] + 1) % VOCAB, *documents[0][1:]], *documents[1:]]
    states = []
    for rows in (documents, other):
        torch.manual_seed(0)
        batch = packed(rows)
        states.append(native.transformer(batch["input_ids"], position_ids=batch["position_ids"]).last_hidden_state)
    moved = (states[0] != states[1]).any(-1)
    assert moved[0, :4].all() and not moved[0, 4:].any() and not moved[1:].any()
