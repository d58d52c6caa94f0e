"""Every pattern: its definition key by key, and its blocks against the mask, which is the reference."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from zoo.models import blocked_attention as blocked_attention_module
from zoo.models.blocked_attention import blocked_attention
from zoo.models.masks import BLOCK, MASKS, DocumentMask, takes_layer
from zoo.models.ragged import Packing
from zoo.models.ragged_attention import ragged_attention

HEADS, HEAD_DIM, SCALING = 4, 8, 0.3
KWARGS = {
    "local": {"window": 5}, "dilated": {"window": 3, "dilation": 4}, "block": {"size": 12}, "strided": {"stride": 9},
    "fixed": {"stride": 10, "summary": 2}, "longformer": {"window": 5, "global_tokens": 3},
    "sinks": {"window": 6, "sinks": 2}, "bigbird": {"block_size": 8, "random_blocks": 2},
}  # fmt: skip
assert KWARGS.keys() == MASKS.keys()

patterns = pytest.mark.parametrize("name", MASKS)
ways = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


def make(name, causal, layer=0, **kwargs):
    return MASKS[name](causal=causal, **({"layer": layer} if takes_layer(name) else {}), **(KWARGS[name] | kwargs))


def sees(name, causal, q, k, head) -> bool:
    """The definition of a pattern's docstring, in Python numbers; of bigbird what is not random."""
    kw = KWARGS[name]
    near = 0 <= q - k < kw.get("window", 0) if causal else abs(q - k) <= kw.get("window", 0)
    match name:
        case "local":
            seen = near
        case "dilated":
            steps, rest = divmod(q - k, kw["dilation"])
            seen = rest == 0 and (0 <= steps < kw["window"] if causal else abs(steps) <= kw["window"])
        case "block":
            seen = q // kw["size"] == k // kw["size"]
        case "strided":
            near = 0 <= q - k < kw["stride"] if causal else abs(q - k) <= kw["stride"]
            seen = near if head % 2 == 0 else (q - k) % kw["stride"] == 0
        case "fixed":
            seen = q // kw["stride"] == k // kw["stride"] or k % kw["stride"] in (8, 9)
        case "longformer":
            seen = near or k < kw["global_tokens"] or q < kw["global_tokens"]
        case "sinks":
            seen = near or k < kw["sinks"]
        case "bigbird":
            i, j = q // kw["block_size"], k // kw["block_size"]
            seen = abs(i - j) <= 1 or i == 0 or j == 0
    return seen and (k <= q or not causal)


def grid(pattern, length) -> torch.Tensor:
    """(heads, length, length) bool."""
    positions = torch.arange(length)
    return pattern(positions[:, None], positions[None, :], torch.arange(HEADS)[:, None, None]).expand(HEADS, -1, -1)


@patterns
@ways
def test_sees_what_its_definition_says(name, causal):
    length, found = 50, grid(make(name, causal), 50)
    if name == "bigbird":
        found = grid(make(name, causal, random_blocks=0), 50)
    for head in range(HEADS):
        expected = [[sees(name, causal, q, k, head) for k in range(length)] for q in range(length)]
        assert torch.equal(found[head], torch.tensor(expected)), head


@patterns
@ways
def test_every_token_sees_itself(name, causal):
    assert grid(make(name, causal), 70).diagonal(dim1=1, dim2=2).all()


@pytest.mark.parametrize("length", [1, 7, 64, 100])
@patterns
@ways
def test_its_groups_hold_each_query_once_and_all_keys_it_sees(name, causal, length):
    pattern = make(name, causal)
    visible = grid(pattern, length)
    for head in range(HEADS):
        queries = []
        for positions, keys in pattern.groups(length, head):
            queries += positions
            outside = torch.ones(length, dtype=torch.bool)
            outside[keys] = False
            assert not visible[head][list(positions)][:, outside].any(), (head, positions)
        assert sorted(queries) == list(range(length))


def draw(length, dtype=torch.float64, heads=HEADS):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, heads, HEAD_DIM, dtype=dtype, generator=generator).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("length", [1, 33, 100, 128])
@pytest.mark.parametrize("bias", [False, True])
@patterns
@ways
def test_blocks_equal_the_mask(name, causal, length, bias, monkeypatch):
    """Outputs and gradients, of documents shorter than the plan too, whose last groups are cut."""
    monkeypatch.setattr(blocked_attention_module, "BLOCKED_FROM", 16)
    pattern = make(name, causal)
    pattern = replace(pattern, block=min(pattern.block, 16))
    q, k, v = draw(length)
    table = torch.randn(HEADS, length, length, dtype=torch.float64, requires_grad=True)

    def between(q_pos, kv_pos):
        return table[:, q_pos[:, :, None], kv_pos[:, None, :]].movedim(0, 1)

    ours = blocked_attention(q, k, v, pattern, scaling=SCALING, bias=between if bias else None)
    hidden = ~grid(pattern, length)
    added = (table if bias else torch.zeros_like(table)).masked_fill(hidden, float("-inf"))
    by_head = (x.transpose(0, 1) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*by_head, attn_mask=added, scale=SCALING).transpose(0, 1)
    assert (ours - expected).abs().max() < 1e-12
    leaves = [q, k, v, table] if bias else [q, k, v]
    upstream = torch.randn(ours.shape, dtype=torch.float64)
    found, wanted = (torch.autograd.grad(x, leaves, upstream) for x in (ours, expected))
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert (a - b).abs().max() < 1e-12, number


@pytest.mark.parametrize("heads", [1, 3])
@ways
def test_heads_in_turn_may_be_odd_in_number(heads, causal):
    """As those of ViT-Ti/16, 3, and of GPT-2 XL, 25."""
    q, k, v = draw(600, heads=heads)
    pattern = make("strided", causal)
    ours = blocked_attention(q, k, v, pattern, scaling=SCALING)
    by_head, seen = (x.transpose(0, 1) for x in (q, k, v)), grid(pattern, 600)[:heads]
    expected = F.scaled_dot_product_attention(*by_head, attn_mask=seen, scale=SCALING).transpose(0, 1)
    assert (ours - expected).abs().max() < 1e-12


# longer than a block of queries, where documents are still masked
@pytest.mark.parametrize("length", [257, 400, 511])
@patterns
@ways
def test_what_a_row_leaves_out_is_hidden(name, causal, length):
    """A row in blocks of queries, each with the keys from the first that one of them sees to the last."""
    pattern = make(name, causal, **({"window": 100, "dilation": 3} if name == "dilated" else {}))
    mask = DocumentMask(pattern, length, HEADS, torch.device("cpu"))
    visible = grid(pattern, length).any(0)
    for start, (first, last) in zip(range(0, length, BLOCK), mask.spans, strict=True):
        assert not visible[start : start + BLOCK, :first].any() and not visible[start : start + BLOCK, last:].any()
    q, k, v = draw(length)
    rows = Packing.full(1, length, q.device)
    ours = ragged_attention(q, k, v, rows, rows, scaling=SCALING, mask=mask)
    by_head = (x.transpose(0, 1) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*by_head, attn_mask=grid(pattern, length), scale=SCALING).transpose(0, 1)
    assert (ours - expected).abs().max() < 1e-12


# what a query sees is no more in a longer document; the others' share of it is
LINEAR = ["local", "dilated", "block", "longformer", "sinks", "bigbird"]


@pytest.mark.parametrize("name", LINEAR)
@ways
def test_the_work_grows_linearly(name, causal):
    """Multiply-adds counted by torch: twice the tokens, twice the work, and less than full attention has."""
    counts = []
    for length in (2048, 4096):
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            blocked_attention(*draw(length, torch.float32), make(name, causal), scaling=SCALING).sum().backward()
        counts.append(counter.get_total_flops())
    assert 1.9 < counts[1] / counts[0] < 2.1, counts
    full = 3 * 4 * 4096**2 * HEADS * HEAD_DIM
    assert counts[1] < full / 8, f"{counts[1] / full:.3f} of full attention"


def test_bigbird_links_are_random_fixed_and_as_many_as_asked_for():
    length, block = 1024, KWARGS["bigbird"]["block_size"]

    def links(seed=0, layer=0, count=2):
        seen = grid(make("bigbird", False, layer, seed=seed, random_blocks=count), length)[:, ::block, ::block]
        return seen & ~grid(make("bigbird", False, random_blocks=0), length)[:, ::block, ::block]

    first = links()
    assert torch.equal(first, links()) and torch.equal(first, first.transpose(1, 2))
    different = [links(seed=1), links(layer=1), first.roll(1, 0)]
    assert all((first ^ other).float().mean() > 0.01 for other in different), "of each seed, layer and head"
    blocks = length // block
    # draws that fall on neighbours, on the first block or on one another add nothing
    drawn = first.sum((1, 2)).float() / 2 / blocks
    assert ((drawn > 1.5) & (drawn < 2)).all(), drawn
    # each of the earlier blocks is as likely: the mean of (place + 1/2) / count is 1/2
    heads, later, earlier = first.tril(-2).nonzero().unbind(1)
    shares = (earlier.float() + 0.5) / later
    assert abs(shares.mean() - 0.5) < 4 * (1 / 12 / len(shares)) ** 0.5 + 0.02


def test_every_head_of_every_layer_keeps_its_blocks(monkeypatch):
    """A second pass through many layers finds again what the first has laid out."""
    monkeypatch.setattr(blocked_attention_module, "BLOCKED_FROM", 16)
    layers = [make("bigbird", True, layer) for layer in range(36)]
    for number in range(2):
        before = blocked_attention_module.plan.cache_info().misses
        for pattern in layers:
            blocked_attention(*draw(20), pattern, scaling=SCALING)
        assert blocked_attention_module.plan.cache_info().misses - before == (0 if number else 36 * HEADS)


REFUSED = [
    ("local", {"window": 0}, "local.window is a number of tokens of at least 1, not 0"),
    ("dilated", {"dilation": 0}, "dilated.dilation"), ("dilated", {"window": True}, "dilated.window"),
    ("block", {"size": -3}, "block.size"), ("strided", {"stride": 1.5}, "strided.stride"),
    ("fixed", {"summary": 11}, "fixed.summary 11 is more than fixed.stride 10"),
    ("longformer", {"global_tokens": 0}, "longformer.global_tokens"), ("sinks", {"sinks": "2"}, "sinks.sinks"),
    ("bigbird", {"random_blocks": -1}, "bigbird.random_blocks is a number of blocks of at least 0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kwargs", "message"), REFUSED)
def test_refuses_in_words(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(name, False, **kwargs)
