"""Attention over packed tokens, one sequence at a time, so that scores stay in cache and padding costs nothing.

q, k, v are (tokens, heads, head_dim), as the projections leave them. Without dropout each sequence goes through torch's
own fused `scaled_dot_product_attention`. With dropout that kernel is not available on CPU, so one autograd function
does it: scores, softmax, keep mask, product, and the gradients by hand (FlashAttention, Dao et al. 2022, appendix B.4,
without its tiling: the probabilities of a sequence are kept).
"""

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .blocked_attention import Bias, blocked_attention
from .dropout import keep_mask, keep_scale, random_keep
from .masks import BLOCK, BLOCKED_FROM, DocumentMask, Pattern
from .ragged import Packing


def ragged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    kv_packing: Packing,
    *,
    scaling: float,
    dropout: float = 0.0,
    mask: DocumentMask | None = None,
    position_bias: torch.Tensor | nn.Module | None = None,
) -> torch.Tensor:
    """Softmax attention of each row's queries over the same row's keys.

    query: (query tokens, heads, head_dim); key, value: (key tokens, heads, head_dim). mask: of as many positions as the
    longest row has. position_bias, for self-attention: (heads, length, length) on slots of the padded grid. Both are
    cut to each row, and a long row to blocks of queries with the keys that the mask shows them. For rows in blocks it
    may be what makes it, of (groups, queries) and (groups, keys), so that none is made of all pairs.
    Returns (query tokens, heads, head_dim), zeros for rows without keys.
    """
    rows = Rows(packing, kv_packing, mask, position_bias)
    if rows.pattern is not None and packing is kv_packing and packing.max_length >= BLOCKED_FROM:
        return _blocked_rows(query, key, value, rows, rows.pattern, scaling, dropout)
    if dropout > 0.0 and query.device.type == "cpu":
        # the function chooses its own precision
        with torch.autocast(query.device.type, enabled=False):
            return _DropoutAttention.apply(query, key, value, position_bias, rows, scaling, dropout)
    if packing.is_grid and kv_packing.is_grid:
        return _grid_attention(query, key, value, rows, scaling, dropout)
    outputs = []
    split = query.split(packing.lengths), key.split(kv_packing.lengths), value.split(kv_packing.lengths)
    for row, (q, k, v) in enumerate(zip(*split, strict=True)):
        if len(q) == 0 or len(k) == 0:
            outputs.append(torch.zeros_like(q))
            continue
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        outputs.append(_row_attention(q, k, v, rows, row, scaling, dropout).squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def _blocked_rows(query, key, value, rows: "Rows", pattern: Pattern, scaling: float, dropout: float) -> torch.Tensor:
    """The same one row at a time, the long ones by their pattern's blocks."""
    outputs, lengths = [], rows.packing.lengths
    for row, (q, k, v) in enumerate(zip(*(x.split(lengths) for x in (query, key, value)), strict=True)):
        if lengths[row] >= BLOCKED_FROM:
            between = rows.bias_between(row, q.dtype)
            outputs.append(blocked_attention(q, k, v, pattern, scaling=scaling, dropout=dropout, bias=between))
        elif lengths[row]:
            alone = Packing.full(1, lengths[row], q.device)
            output = ragged_attention(
                q, k, v, alone, alone, scaling=scaling, dropout=dropout, mask=rows.mask,
                position_bias=rows.own_bias(row, q.dtype),
            )  # fmt: skip
            outputs.append(output)
    return torch.cat(outputs)


def _grid_attention(query, key, value, rows: "Rows", scaling: float, dropout: float) -> torch.Tensor:
    """The same where no slot is padding: all rows together."""

    def grid(x, packing):
        return x.view(packing.batch_size, packing.length, *x.shape[1:]).transpose(1, 2)

    q, k, v = grid(query, rows.packing), grid(key, rows.kv_packing), grid(value, rows.kv_packing)
    return _row_attention(q, k, v, rows, 0, scaling, dropout).transpose(1, 2).reshape(query.shape)


def _row_attention(q, k, v, rows: "Rows", row: int, scaling: float, dropout: float) -> torch.Tensor:
    """(batch, heads, queries, head_dim) of one row, or of all that are like it."""
    if rows.mask is not None and rows.mask.causal and rows.position_bias is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=scaling)
    blocks = [
        F.scaled_dot_product_attention(
            q[..., part.queries, :], k[..., part.keys, :], v[..., part.keys, :],
            attn_mask=rows.added_to_scores(part), dropout_p=dropout, scale=scaling,
        )
        for part in rows.parts_of(row)
    ]  # fmt: skip
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, -2)


def first_token_attention(
    query: torch.Tensor, states: torch.Tensor, packing: Packing, keys: nn.Linear, values: nn.Linear, *, scaling, dropout
) -> torch.Tensor:
    """Full attention of one query a row over the row's hidden states, whose keys and values are never made.

    q . (K x + b) = (K^T q) . x + q . b, and sum p (V x + b) = V (sum p x) + b sum p: a product for each row in place of
    two for each token. query: (batch, heads, head_dim); states: (tokens, hidden). Returns (batch, heads, head_dim).
    """
    heads, head_dim = query.shape[1:]
    states = packing.unpack(states)
    # (heads, head_dim, hidden)
    key_weight, value_weight = (layer.weight.unflatten(0, (heads, head_dim)) for layer in (keys, values))
    scores = torch.einsum("bhd,hde->bhe", query, key_weight) @ states.transpose(1, 2)
    if keys.bias is not None:
        scores = scores + (query * keys.bias.view(heads, head_dim)).sum(-1, keepdim=True)
    if packing.indices is not None:
        real = packing.unpack(scores.new_ones(packing.tokens, dtype=torch.bool))
        scores = scores.masked_fill(~real[:, None], torch.finfo(scores.dtype).min)
    exact = torch.promote_types(scores.dtype, torch.float32)
    probabilities = torch.softmax(scores * scaling, -1, dtype=exact).to(states.dtype)
    if dropout:
        probabilities = probabilities * keep_mask(probabilities, dropout)
    output = torch.einsum("bhe,hde->bhd", probabilities @ states, value_weight)
    if values.bias is not None:
        output = output + values.bias.view(heads, head_dim) * probabilities.sum(-1, keepdim=True)
    return output


class Part(NamedTuple):
    """Queries of a row that attend together, and the keys that they see some of; both counted within the row."""

    row: int
    queries: slice
    keys: slice


class Rows:
    """The rows of a packed batch in parts, and what is added to the scores of each."""

    def __init__(self, packing: Packing, kv_packing: Packing, mask: DocumentMask | None, position_bias):
        self.packing, self.kv_packing, self.mask = packing, kv_packing, mask
        self.position_bias = position_bias

    @property
    def pattern(self) -> Pattern | None:
        """What leaves out more than the future."""
        return None if self.mask is None or self.mask.causal else self.mask.pattern

    def parts_of(self, row: int) -> Iterator[Part]:
        """Each row is one part, unless it is long and the mask hides some of it."""
        queries, keys = self.packing.lengths[row], self.kv_packing.lengths[row]
        if self.mask is None or queries <= BLOCK:
            yield Part(row, slice(0, queries), slice(0, keys))
            return
        for start, (first, last) in zip(range(0, queries, BLOCK), self.mask.spans, strict=False):
            seen = slice(first, min(last, keys)) if first < keys else slice(0, keys)
            yield Part(row, slice(start, min(start + BLOCK, queries)), seen)

    @cached_property
    def parts(self) -> list[Part]:
        return [part for row in range(len(self.packing.lengths)) for part in self.parts_of(row)]

    @cached_property
    def pairs(self) -> list[int]:
        """Queries times keys of each part."""
        return [_length(part.queries) * _length(part.keys) for part in self.parts]

    def split(self, queries: tuple, keys: tuple, pairs: tuple) -> Iterator[tuple[Part, tuple]]:
        """(part, its share of each tensor) of each part that has both queries and keys.

        (tokens, heads, *) tensors come as views (heads, the part's tokens, *), flat ones as (heads, queries, keys).
        """
        heads = queries[0].shape[1]
        sizes = [_length(part.queries) for part in self.parts]
        by_query = zip(*(x.transpose(0, 1).split(sizes, 1) for x in queries), strict=True)
        by_row = list(zip(*(x.transpose(0, 1).split(self.kv_packing.lengths, 1) for x in keys), strict=True))
        by_pair = zip(*(x.split([heads * pairs for pairs in self.pairs]) for x in pairs), strict=True)
        for part, q, p in zip(self.parts, by_query, by_pair, strict=True):
            shape = heads, _length(part.queries), _length(part.keys)
            if 0 in shape:
                continue
            k = by_row[part.row]
            if shape[2] < k[0].shape[1]:
                k = tuple(x[:, part.keys] for x in k)
            yield part, (q, k, tuple(x.view(shape) for x in p))

    def hidden_in(self, part: Part) -> torch.Tensor | None:
        """(queries, keys) bool, or (heads, queries, keys): True = not visible."""
        return None if self.mask is None else self.mask.hidden_in(part.queries, part.keys)

    def bias_index(self, part: Part) -> tuple:
        """The share of (heads, length, length) that belongs to a part."""
        slots = self.packing.row_slots[part.row]
        if slots is not None:
            return slice(None), slots[part.queries, None], slots[None, part.keys]
        # a bias depends on distances alone, so a row without holes may start at 0 wherever it stands
        return slice(None), part.queries, part.keys

    def own_bias(self, row: int, dtype: torch.dtype) -> torch.Tensor | None:
        """(heads, tokens, tokens) of a row."""
        between = self.bias_between(row, dtype)
        own = torch.arange(self.packing.lengths[row], device=self.packing.device).unsqueeze(0)
        return None if between is None else between(own, own)[0]

    def bias_between(self, row: int, dtype: torch.dtype) -> Bias | None:
        """Of tokens of a row, at (groups, queries) and (groups, keys) within it."""
        bias, slots = self.position_bias, self.packing.row_slots[row]
        if bias is None:
            return None

        def between(q_pos: torch.Tensor, kv_pos: torch.Tensor) -> torch.Tensor:
            q_pos, kv_pos = (x if slots is None else slots[x] for x in (q_pos, kv_pos))
            if isinstance(bias, nn.Module):
                return bias(q_pos, kv_pos).to(dtype)
            return bias[:, q_pos[:, :, None], kv_pos[:, None, :]].movedim(0, 1)

        return between

    def bias_in(self, part: Part) -> torch.Tensor | None:
        return None if self.position_bias is None else self.position_bias[self.bias_index(part)]

    def added_to_scores(self, part: Part) -> torch.Tensor | None:
        """Mask and bias of one part as scaled_dot_product_attention takes them."""
        hidden, bias = self.hidden_in(part), self.bias_in(part)
        if hidden is None:
            return bias
        added = ~hidden if bias is None else bias.masked_fill(hidden, torch.finfo(bias.dtype).min)
        # torch's fused kernel takes two dimensions or four
        return added[None] if added.ndim == 3 else added


def _length(span: slice) -> int:
    return span.stop - span.start


def _like_tokens(tokens: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Memory for a tensor of that shape, which the rows fill; zeros where a row has no counterpart to fill it from."""
    every_row = min(rows.packing.lengths) > 0 and min(rows.kv_packing.lengths) > 0
    return torch.empty_like(tokens) if every_row else torch.zeros_like(tokens)


class _DropoutAttention(torch.autograd.Function):
    """Attention with dropout on its probabilities.

    The sign of a saved probability is its keep mask: P where kept, -P where dropped (a probability is never negative,
    and one that is exactly 0 adds nothing either way). All rows share one flat buffer.
    """

    @staticmethod
    def forward(ctx, query, key, value, position_bias, rows: Rows, scaling: float, dropout: float):
        ctx.save_dtype = query.dtype
        # softmax and sums in fp32 at least, as the fused kernels do
        query, key, value = (x if x.dtype == torch.float64 else x.float() for x in (query, key, value))
        signed = query.new_empty(query.shape[1] * sum(rows.pairs))
        # -1 where dropped, 0 where kept
        signs = random_keep(len(signed), dropout).view(torch.int8).sub_(1)
        out = _like_tokens(query, rows)
        parts = rows.split(queries=(query, out), keys=(key, value), pairs=(signed, signs))
        for part, ((q, o), (k, v), (probabilities, sign)) in parts:
            torch.baddbmm(probabilities, q, k.transpose(1, 2), beta=0, alpha=scaling, out=probabilities)
            if (bias := rows.bias_in(part)) is not None:
                probabilities += bias
            if (hidden := rows.hidden_in(part)) is not None:
                probabilities.masked_fill_(hidden, torch.finfo(probabilities.dtype).min)
            torch.softmax(probabilities, -1, out=probabilities)
            probabilities.copysign_(sign)
            o.copy_(torch.bmm(probabilities.clamp(min=0), v))
        out.mul_(keep_scale(dropout))
        ctx.save_for_backward(query, key, value, position_bias, out, signed)
        ctx.rows, ctx.scaling, ctx.dropout = rows, scaling, dropout
        return out.to(ctx.save_dtype)

    @staticmethod
    def backward(ctx, grad):
        query, key, value, position_bias, out, signed = ctx.saved_tensors
        rows, grad = ctx.rows, grad.to(query.dtype)
        # the row sum of dP * P, which equals dO . O, dropout or not: (tokens, heads, 1)
        delta = (grad * out).sum(-1, keepdim=True)
        grad = grad * keep_scale(ctx.dropout)
        # a key has a gradient of each part that sees it
        grads = [_like_tokens(query, rows), torch.zeros_like(key), torch.zeros_like(value)]
        grad_bias = torch.zeros_like(position_bias, dtype=query.dtype) if ctx.needs_input_grad[3] else None
        grad_query, grad_key, grad_value = grads
        parts = rows.split(
            queries=(query, grad, delta, grad_query), keys=(key, value, grad_key, grad_value), pairs=(signed,)
        )
        for part, ((q, g, d, gq), (k, v, gk, gv), (probabilities,)) in parts:
            kept = probabilities.clamp(min=0)
            gv.add_(torch.bmm(kept.transpose(1, 2), g))
            # dS = P * (dP - delta), with dP zero where dropped
            scores = torch.bmm(g, v.transpose(1, 2)).mul_(kept)
            scores.addcmul_(probabilities.abs(), d, value=-1)
            gq.copy_(torch.bmm(scores, k))
            gk.add_(torch.bmm(scores.transpose(1, 2), q))
            if grad_bias is not None:
                # the slots of a row are distinct, so adding at an index loses nothing
                grad_bias[rows.bias_index(part)] += scores
        grad_query.mul_(ctx.scaling)
        grad_key.mul_(ctx.scaling)
        grads = [x.to(ctx.save_dtype) for x in grads]
        return *grads, None if grad_bias is None else grad_bias.to(position_bias.dtype), None, None, None
