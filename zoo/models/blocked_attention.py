"""Attention by a sparse pattern that leaves out what the pattern hides: blocks of queries with the keys they see.

The keys and values of a block are gathered, and all blocks with about as many keys go through torch's fused
`scaled_dot_product_attention` at once. Its cost is that of the pairs a block of queries sees, not of all.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .masks import BLOCKED_FROM, Pattern

# (query positions, key positions), (groups, queries) and (groups, keys) -> (groups, heads, queries, keys)
Bias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Groups(NamedTuple):
    """Groups of as many queries each, with as many keys: those of the larger, where they differ."""

    queries: torch.Tensor  # (groups, queries), positions
    keys: torch.Tensor  # (groups, keys)
    visible: torch.Tensor  # (groups, queries, keys) bool, or (groups, 1, keys) where queries of a group see the same
    later: bool  # whether keys after a query are yet to be hidden


# as many as a model may have heads in all its layers, each of which may have a pattern of its own
@lru_cache(maxsize=1024)
def plan(pattern: Pattern, length: int, head: int, device: torch.device) -> list[Groups]:
    """All queries of a document of `length` tokens in groups; a group's keys are at most doubled to match others'."""
    alike: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for queries, keys in pattern.groups(length, head):
        positions = torch.arange(queries.start, queries.stop, queries.step)
        alike.setdefault((len(positions), len(keys).bit_length()), []).append((positions, keys))
    found = []
    for members in alike.values():
        q_pos = torch.stack([queries for queries, _ in members])
        counts = torch.tensor([len(keys) for _, keys in members])
        kv_pos = torch.nn.utils.rnn.pad_sequence([keys for _, keys in members], batch_first=True)
        real = torch.arange(kv_pos.shape[1]) < counts[:, None]
        asked = q_pos[:, :1] if pattern.alike else q_pos
        sees = pattern.sees if pattern.alike else pattern
        visible = sees(asked[:, :, None], kv_pos[:, None, :], head) & real[:, None]
        q_pos, kv_pos, visible = (x.to(device) for x in (q_pos, kv_pos, visible))
        found.append(Groups(q_pos, kv_pos, visible, pattern.alike and pattern.causal))
    return found


def blocked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: Pattern,
    *,
    scaling: float,
    dropout: float = 0.0,
    bias: Bias | None = None,
) -> torch.Tensor:
    """Softmax attention of one document's tokens over the keys that the pattern shows them.

    query, key, value: (tokens, heads, head_dim). Returns (tokens, heads, head_dim).
    """
    length, heads = query.shape[:2]
    # plans are kept for lengths of powers of two
    capacity = max(BLOCKED_FROM, 1 << (length - 1).bit_length())
    period = min(pattern.period or heads, heads)
    parts = []
    for head in range(period):
        q, k, v = (x[:, head::period] for x in (query, key, value))
        own = None if bias is None else partial(_of_heads, bias, slice(head, None, period))
        done = [_attend(q, k, v, groups, scaling, dropout, own) for groups in plan(pattern, capacity, head, q.device)]
        positions, outputs = zip(*(part for part in done if part is not None), strict=True)
        # each query is in one group
        places = torch.empty(length, dtype=torch.long, device=q.device)
        places[torch.cat(positions)] = torch.arange(length, device=q.device)
        parts.append(torch.cat(outputs).index_select(0, places))
    if period == 1:
        return parts[0]
    order = torch.cat([torch.arange(head, heads, period, device=query.device) for head in range(period)])
    return torch.cat(parts, 1).index_select(1, order.argsort())


def _of_heads(bias: Bias, heads: slice, q_pos: torch.Tensor, kv_pos: torch.Tensor) -> torch.Tensor:
    return bias(q_pos, kv_pos)[:, heads]


def _attend(q, k, v, groups: Groups, scaling: float, dropout: float, bias: Bias | None):
    """(positions of real queries, their outputs), or None where a shorter document has none of these groups."""
    length, (q_pos, kv_pos, visible, later) = len(q), groups
    here = q_pos[:, 0] < length
    if not here.all():
        q_pos, kv_pos, visible = q_pos[here], kv_pos[here], visible[here]
    if not len(q_pos):
        return None
    visible = visible & (kv_pos[:, None] <= q_pos[:, :, None]) if later else visible.expand(-1, q_pos.shape[1], -1)
    if int(kv_pos.max()) >= length:
        visible = visible & (kv_pos < length)[:, None]
        kv_pos = kv_pos.clamp(max=length - 1)
    real = None
    if int(q_pos.max()) >= length:
        # what stands in for queries that are none sees all, so that no row of scores is empty
        visible = visible | (q_pos >= length)[:, :, None]
        real = q_pos.flatten() < length
        q_pos = q_pos.clamp(max=length - 1)

    def gather(x, positions):
        return x.index_select(0, positions.flatten()).unflatten(0, positions.shape).transpose(1, 2)

    mask = visible[:, None]
    if bias is not None:
        added = bias(q_pos, kv_pos)
        mask = added.masked_fill(~mask, torch.finfo(added.dtype).min)
    output = F.scaled_dot_product_attention(
        gather(q, q_pos), gather(k, kv_pos), gather(v, kv_pos), attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    output, positions = output.transpose(1, 2).flatten(0, 1), q_pos.flatten()
    return (positions, output) if real is None else (positions[real], output[real])
