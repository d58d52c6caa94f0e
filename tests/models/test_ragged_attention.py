"""Attention on packed tokens against attention one sequence at a time, with and without dropout."""

import random
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo.models import masks
from zoo.models import ragged_attention as ragged_attention_module
from zoo.models.attention import Attention
from zoo.models.dropout import keep_mask
from zoo.models.masks import CAUSAL, DocumentMask, local
from zoo.models.ragged import Packing
from zoo.models.ragged_attention import first_token_attention, ragged_attention
from zoo.models.spec import BlockSpec

from .tiny import PADDING

HEADS, HEAD_DIM, SCALING = 3, 12, 0.4
PATTERNS = {"all": None, "causal": CAUSAL, "local": local(causal=False, window=2)}
# keys of the same rows in a cross-attention: another length, an empty row among them
CROSS = [[1] * 5 + [0] * 3, [0, 1, 1, 0, 1, 1, 1, 1], [0] * 8]

paddings = pytest.mark.parametrize("padding", PADDING)
patterns = pytest.mark.parametrize("pattern", PATTERNS)
rates = pytest.mark.parametrize("dropout", [0.0, 0.3])


class Case:
    """A packed batch in fp64, its mask, and a bias that depends on distances alone."""

    def __init__(self, rows, kv_rows=None, pattern="all", bias=False, head_dim=HEAD_DIM):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

        self.packing = Packing.from_mask(torch.tensor(rows))
        self.kv_packing = self.packing if kv_rows is None else Packing.from_mask(torch.tensor(kv_rows))
        self.query = draw(self.packing.tokens, HEADS, head_dim)
        self.key, self.value = (draw(self.kv_packing.tokens, HEADS, head_dim) for _ in range(2))
        self.upstream = draw(*self.query.shape).detach()
        length = self.packing.length
        self.table = draw(HEADS, 2 * length - 1) if bias else None
        slots = torch.arange(length)
        self.distances = slots[None, :] - slots[:, None] + length - 1
        self.mask = None
        if PATTERNS[pattern] is not None:
            self.mask = DocumentMask(PATTERNS[pattern], self.packing.max_length, HEADS, torch.device("cpu"))

    @property
    def leaves(self):
        return [x for x in (self.query, self.key, self.value, self.table) if x is not None]

    def run(self, dropout=0.0, value=None):
        bias = None if self.table is None else self.table[:, self.distances]
        return ragged_attention(
            self.query, self.key, self.value if value is None else value, self.packing, self.kv_packing,
            scaling=SCALING, dropout=dropout, mask=self.mask, position_bias=bias,
        )  # fmt: skip

    def rows(self):
        """(row, its slots, query tokens, key tokens) of each row with both."""
        for row, (queries, keys) in enumerate(zip(self.packing.lengths, self.kv_packing.lengths, strict=True)):
            if queries and keys:
                start, kv_start = self.packing.starts[row], self.kv_packing.starts[row]
                slots = self.packing.slots[start : start + queries]
                yield row, slots, slice(start, start + queries), slice(kv_start, kv_start + keys)

    def added(self, slots, queries, keys):
        """(heads, queries, keys): the bias between the slots the tokens stand in, -inf where the mask hides."""
        added = torch.zeros(HEADS, queries, keys, dtype=torch.float64)
        if self.table is not None:
            added = added + self.table[:, self.distances[slots][:, slots]]
        if self.mask is not None:
            added = added.masked_fill(self.mask.hidden_in(slice(0, queries), slice(0, keys)), float("-inf"))
        return added

    def reference(self, kept=None, dropout=0.0):
        """One sequence at a time; with `kept`, its keep masks, by plain autograd."""
        out = torch.zeros_like(self.query)
        for row, slots, queries, keys in self.rows():
            q, k, v = (x.transpose(0, 1) for x in (self.query[queries], self.key[keys], self.value[keys]))
            added = self.added(slots, q.shape[1], k.shape[1])
            if kept is None:
                part = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=SCALING)
            else:
                probabilities = torch.softmax(q @ k.transpose(1, 2) * SCALING + added, -1)
                part = (probabilities * kept[row] / (1 - dropout)) @ v
            out = out.index_add(0, torch.arange(queries.start, queries.stop), part.transpose(0, 1))
        return out

    def keep_masks(self, dropout, seed):
        """What one seed keeps, read off an output whose values are one-hot in the key; {row: (heads, q, k)}."""
        value = torch.zeros_like(self.value)
        for _, _, _, keys in self.rows():
            count = keys.stop - keys.start
            value[keys, :, :count] = torch.eye(count, dtype=value.dtype)[:, None]
        torch.manual_seed(seed)
        seen = self.run(dropout, value=value).detach() != 0
        return {row: seen[q, :, : k.stop - k.start].transpose(0, 1) for row, _, q, k in self.rows()}


def assert_same(case, ours, expected):
    assert (ours - expected).abs().max() < 1e-12
    gradients = [torch.autograd.grad(x, case.leaves, case.upstream) for x in (ours, expected)]
    for leaf, (gradient, wanted) in enumerate(zip(*gradients, strict=True)):
        assert (gradient - wanted).abs().max() < 1e-12, f"gradient {leaf}"


@pytest.fixture(params=[256, 4], ids=["whole", "in blocks"])
def block(request, monkeypatch) -> int:
    """Rows of up to 11 tokens in one part, or in several."""
    for module in (masks, ragged_attention_module):
        monkeypatch.setattr(module, "BLOCK", request.param)
    return request.param


@paddings
@patterns
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("block")
def test_equals_torch_on_each_sequence(padding, pattern, bias):
    case = Case(PADDING[padding], pattern=pattern, bias=bias)
    assert_same(case, case.run(), case.reference())


@paddings
@patterns
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("block")
def test_dropout_equals_plain_autograd_with_the_same_keep_mask(padding, pattern, bias):
    case = Case(PADDING[padding], pattern=pattern, bias=bias)
    kept = case.keep_masks(0.3, seed=5)
    torch.manual_seed(5)
    assert_same(case, case.run(0.3), case.reference(kept, 0.3))
    visible = sum(int(torch.isfinite(case.added(s, len(s), len(s))).sum()) for _, s, _, _ in case.rows())
    assert 0 < sum(int(k.sum()) for k in kept.values()) < visible


def test_blocks_leave_out_what_no_query_sees(block):
    """Pairs of 11 queries and 11 keys: causal in blocks of 4, 4 x 4 + 4 x 8 + 3 x 11; local adds 2 on each side."""
    packing, device = Packing.full(2, 11, torch.device("cpu")), torch.device("cpu")
    pairs = {"all": [121], "causal": [16, 32, 33], "local": [24, 32, 15]} if block == 4 else {}
    for name, pattern in PATTERNS.items():
        mask = None if pattern is None else DocumentMask(pattern, 11, HEADS, device)
        found = ragged_attention_module.Rows(packing, packing, mask, None).pairs
        assert found == 2 * pairs.get(name, [121]), name


@rates
@paddings
def test_cross_attention_over_keys_of_another_length(padding, dropout):
    case = Case(PADDING[padding], CROSS)
    kept = case.keep_masks(dropout, seed=1) if dropout else None
    torch.manual_seed(1)
    out = case.run(dropout)
    assert_same(case, out, case.reference(kept, dropout))
    assert (out[case.packing.starts[2] :] == 0).all(), "a text without keys gets zeros"


@rates
@pytest.mark.parametrize("kv_rows", [None, CROSS], ids=["self", "cross"])
def test_gradcheck(kv_rows, dropout):
    pattern = "causal" if kv_rows is None else "all"
    case = Case([[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]], kv_rows, pattern, bias=kv_rows is None, head_dim=2)

    def attend(query, key, value, *table):
        torch.manual_seed(3)
        case.query, case.key, case.value, case.table = query, key, value, next(iter(table), None)
        return case.run(dropout)

    assert torch.autograd.gradcheck(attend, case.leaves)


@rates
def test_half_precision_and_frozen_inputs(dropout):
    """bf16 in, bf16 out, close to fp64; and a gradient for the values alone."""
    case = Case(PADDING["right"])
    kept = case.keep_masks(dropout, seed=2) if dropout else None
    expected = case.reference(kept, dropout)
    torch.manual_seed(2)
    args = [x.detach().bfloat16() for x in (case.query, case.key)]
    value = case.value.detach().bfloat16().requires_grad_()
    out = ragged_attention(*args, value, case.packing, case.packing, scaling=SCALING, dropout=dropout)
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().max() < 0.03 * expected.abs().max()
    (ours,) = torch.autograd.grad(out, value, case.upstream.bfloat16())
    (wanted,) = torch.autograd.grad(expected, case.value, case.upstream)
    assert (ours - wanted).abs().max() < 0.03 * wanted.abs().max()


@rates
@paddings
@pytest.mark.parametrize("bias", [False, True])
def test_first_tokens_without_keys_and_values(padding, dropout, bias):
    """Equal, with its gradients, to attention over the keys and values that are never made."""
    packing = Packing.from_mask(torch.tensor(PADDING[padding]))
    if min(packing.lengths) == 0:
        return
    torch.manual_seed(0)
    hidden = 10
    layers = [nn.Linear(hidden, HEADS * HEAD_DIM, bias=bias).double() for _ in range(2)]
    states = torch.randn(packing.tokens, hidden, dtype=torch.float64, requires_grad=True)
    query = torch.randn(packing.batch_size, HEADS, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(4)
    ours = first_token_attention(query, states, packing, *layers, scaling=SCALING, dropout=dropout)

    torch.manual_seed(4)
    mask = torch.ones(packing.batch_size, HEADS, packing.length, dtype=torch.float64)
    mask = keep_mask(mask, dropout) if dropout else mask
    rows = []
    for row, (start, length) in enumerate(zip(packing.starts, packing.lengths, strict=False)):
        texts, slots = slice(start, start + length), packing.slots[start : start + length]
        k, v = (layer(states[texts]).unflatten(-1, (HEADS, HEAD_DIM)).transpose(0, 1) for layer in layers)
        probabilities = torch.softmax(torch.einsum("hd,hkd->hk", query[row], k) * SCALING, -1)
        rows.append(torch.einsum("hk,hkd->hd", probabilities * mask[row][:, slots], v))
    expected = torch.stack(rows)
    assert (ours - expected).abs().max() < 1e-12
    leaves = [query, states, *(parameter for layer in layers for parameter in layer.parameters())]
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(x, leaves, upstream) for x in (ours, expected)]
    for number, (gradient, wanted) in enumerate(zip(*gradients, strict=True)):
        assert (gradient - wanted).abs().max() < 1e-11, f"gradient {number}"


def uniform_draw(dropout, rows, length, heads, seed):
    """Kept probabilities (rows, heads, queries, keys) where every score is 0 and each key's value is one-hot."""
    packing = Packing.full(rows, length, torch.device("cpu"))
    zeros = torch.zeros(rows * length, heads, length, dtype=torch.float64)
    value = torch.eye(length, dtype=torch.float64)[:, None].expand(length, heads, length).repeat(rows, 1, 1)
    torch.manual_seed(seed)
    out = ragged_attention(zeros, zeros, value, packing, packing, scaling=1.0, dropout=dropout)
    return out.view(rows, length, heads, length).transpose(1, 2)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_keep_rate_scale_and_independence(dropout):
    length = 64
    probabilities = uniform_draw(dropout, rows=8, length=length, heads=16, seed=0)
    kept = (probabilities > 0).double()
    expected = torch.full((), 1 / length / (1 - dropout), dtype=torch.float64)
    assert (probabilities[kept.bool()] - expected).abs().max() < 1e-15

    def sigmas(values, mean, variance):
        return abs(values.mean() - mean) / (variance / values.numel()) ** 0.5

    keep, variance = 1 - dropout, dropout * (1 - dropout)
    assert sigmas(kept, keep, variance) < 4
    for lane in range(8):
        assert sigmas(kept[..., lane::8], keep, variance) < 4, f"byte {lane}"
    centred = kept - keep
    for dim, name in enumerate(("rows", "heads", "queries", "keys")):
        for step in (1, 2, 4):
            count = centred.shape[dim] - step
            products = centred.narrow(dim, 0, count) * centred.narrow(dim, step, count)
            assert sigmas(products, 0, variance**2) < 4, f"{step} {name} apart"


def test_mean_over_many_draws_is_the_output_without_dropout():
    case = Case(PADDING["right"], bias=True)
    expected = case.run().detach()
    torch.manual_seed(0)
    draws = torch.stack([case.run(0.2).detach() for _ in range(2000)])
    error = (draws.mean(0) - expected) / (draws.std(0) / len(draws) ** 0.5)
    # a key on its own is kept or not: what is compared is one number a head there
    assert error.abs().max() < 5
    assert abs(error.mean()) < 0.5


def test_the_generator_is_torchs_own():
    first = uniform_draw(0.3, 2, 16, 2, seed=7)
    state = torch.get_rng_state()
    random.seed(1)
    numpy.random.seed(1)
    others = random.getstate(), numpy.random.get_state()[1].tolist()
    assert torch.equal(uniform_draw(0.3, 2, 16, 2, seed=7), first)
    assert torch.equal(torch.get_rng_state(), state), "a call takes the same share of the stream"
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == others
    assert not torch.equal(uniform_draw(0.3, 2, 16, 2, seed=8), first)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_query_attention(implementation, causal):
    """Padded and packed equal the plain formula with each key head repeated (GQA, arXiv 2305.13245)."""
    spec = BlockSpec(20, num_heads=6, head_dim=4, ffn_size=8, activation="relu", num_key_value_heads=2, causal=causal)
    torch.manual_seed(0)
    layer = Attention(SimpleNamespace(_attn_implementation=implementation), spec, 0).double().eval()
    assert layer.k_proj.weight.shape == layer.v_proj.weight.shape == (8, 20)
    mask = torch.tensor(PADDING["right"]).bool()
    states = torch.randn(3, 11, 20, dtype=torch.float64)
    visible = mask[:, None, None, :].expand(3, 1, 11, 11)
    if causal:
        visible = visible & torch.ones(11, 11, dtype=torch.bool).tril()

    def heads(x):
        return x.unflatten(-1, (-1, 4)).transpose(1, 2)

    q, k, v = heads(layer.q_proj(states)), heads(layer.k_proj(states)), heads(layer.v_proj(states))
    k, v = (torch.stack([x[:, head // 3] for head in range(6)], 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) / 2).masked_fill(~visible, float("-inf"))
    expected = layer.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    added = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
    padded, _ = layer(states, attention_mask=added if implementation == "eager" else visible)
    assert (padded - expected)[mask].abs().max() < 1e-12
    packing = Packing.from_mask(mask)
    document = DocumentMask(CAUSAL, 11, 6, mask.device) if causal else None
    packed, _ = layer(packing.pack(states), attention_mask=document, packing=packing)
    assert (packed - expected[mask]).abs().max() < 1e-12
