"""Sparse attention patterns: which key a query may see, as functions of their positions.

Positions are those within the document, its real tokens counted from 0, and a pattern does not depend on the document's
length: so it is the same padded, packed and cached. `MASKS[name]` builds one from the model's `attention_kwargs[name]`,
whether the attention is causal and, where the function asks for it, the number of the layer.

To add one: a function here and its line in MASKS.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any

import torch

# queries that attend together, to the keys that one of them sees at least
BLOCK = 256
# the same where those keys are gathered
GATHERED = 128
# tokens of a document from which they are
BLOCKED_FROM = 512


@dataclass(frozen=True, eq=False)
class Pattern:
    """What each query sees, and where to look for it.

    sees: (query positions, key positions, head) -> bool, tensors that broadcast; keys after a query are hidden in
    causal attention anyway. keys: (queries, length, head) -> ranges that hold every key which one of these queries
    sees; what reaches beyond the document is cut. Queries attend together in blocks of `block`, of every
    `step(head)`-th position, the first `leading` in a group of their own. period: head h has the pattern of head
    h % period; None: each has its own. alike: queries of one group see the same keys, but for those after them.
    """

    causal: bool
    sees: Callable[[Any, Any, Any], torch.Tensor]
    keys: Callable[[range, int, int], list[range]]
    block: int = GATHERED
    step: Callable[[int], int] = lambda head: 1
    leading: int = 0
    period: int | None = 1
    alike: bool = False

    def __call__(self, q_pos, kv_pos, head=0) -> torch.Tensor:
        seen = self.sees(q_pos, kv_pos, head)
        return seen & (kv_pos <= q_pos) if self.causal else seen

    def groups(self, length: int, head: int) -> Iterator[tuple[range, torch.Tensor]]:
        """Queries that attend together, and the keys for them: (count,), sorted. Each query is in one group."""
        for queries in self.queries(length, head):
            yield queries, self.keys_of(queries, length, head)

    def keys_of(self, queries: range, length: int, head: int) -> torch.Tensor:
        """(count,): the keys that one of these queries sees, and perhaps others, in order."""
        end = queries[-1] + 1 if self.causal else length
        seen = [_within(keys, end) for keys in self.keys(queries, length, head)]
        return torch.cat([torch.arange(keys.start, keys.stop, keys.step) for keys in seen if keys]).unique()

    def queries(self, length: int, head: int) -> Iterator[range]:
        """Those that attend together; each is in one group."""
        if leading := min(self.leading, length):
            yield range(leading)
        step = self.step(head)
        for first in range(leading, min(leading + step, length)):
            for start in range(first, length, self.block * step):
                yield range(start, min(length, start + self.block * step), step)


def _within(keys: range, length: int) -> range:
    start = keys.start if keys.start >= 0 else keys.start % keys.step
    return range(start, min(keys.stop, length), keys.step)


def _number(name: str, value: Any, least: int = 1, what: str = "tokens") -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"attention_kwargs: {name} is a number of {what} of at least {least}, not {value!r}.")
    return value


def local(*, causal: bool, window: int) -> Pattern:
    """A band around the diagonal: |q - k| <= window; causal: 0 <= q - k < window (Longformer, arXiv 2004.05150, 3.1).

    `window`: keys visible on each side of a query; causal: the last `window` keys, the query's own included.
    """
    return _band(causal, _number("local.window", window), 1)


def dilated(*, causal: bool, window: int, dilation: int) -> Pattern:
    """A band with gaps: |q - k| <= window * dilation, and q - k a multiple of it (Longformer, arXiv 2004.05150, 3.1).

    `window`: keys visible on each side; causal: the last `window` of them, the query's own included.
    """
    return _band(causal, _number("dilated.window", window), _number("dilated.dilation", dilation))


def _band(causal: bool, window: int, dilation: int) -> Pattern:
    before = (window - 1 if causal else window) * dilation

    def sees(q_pos, kv_pos, head):
        distance = q_pos - kv_pos
        near = distance.abs() <= before
        return near if dilation == 1 else near & (distance % dilation == 0)

    def keys(queries: range, length: int, head: int) -> list[range]:
        return [range(queries[0] - before, queries[-1] + before + 1, dilation)]

    return Pattern(causal, sees, keys, step=lambda head: dilation)


def block(*, causal: bool, size: int) -> Pattern:
    """The query's own block and nothing else: floor(q / size) = floor(k / size) (Longformer's and BigBird's baseline).

    No token leaves its block, in however many layers: use it in turn with another.
    """
    _number("block.size", size)

    def keys(queries: range, length: int, head: int) -> list[range]:
        return [range(queries[0] // size * size, (queries[-1] // size + 1) * size)]

    return Pattern(causal, lambda q_pos, kv_pos, head: q_pos // size == kv_pos // size, keys, block=min(size, BLOCK))


def strided(*, causal: bool, stride: int) -> Pattern:
    """Heads in turn see the nearest `stride` keys, and every `stride`-th (Sparse Transformer, arXiv 1904.10509, 4).

    Heads 0, 2, ...: `local` with window = stride. Heads 1, 3, ...: q - k a multiple of stride.
    """
    near = _band(causal, _number("strided.stride", stride), 1)

    def sees(q_pos, kv_pos, head):
        first = torch.as_tensor(head, device=q_pos.device) % 2 == 0
        return torch.where(first, near.sees(q_pos, kv_pos, head), (q_pos - kv_pos) % stride == 0)

    def keys(queries: range, length: int, head: int) -> list[range]:
        return near.keys(queries, length, head) if head % 2 == 0 else [range(queries[0] % stride, length, stride)]

    return Pattern(causal, sees, keys, step=lambda head: 1 if head % 2 == 0 else stride, period=2)


def fixed(*, causal: bool, stride: int, summary: int = 1) -> Pattern:
    """The query's own block, and the last `summary` keys of every block (Sparse Transformer, arXiv 1904.10509, 4.2).

    floor(q / stride) = floor(k / stride), or k mod stride >= stride - summary: both in each head.
    """
    _number("fixed.stride", stride)
    if _number("fixed.summary", summary) > stride:
        raise ValueError(f"attention_kwargs: fixed.summary {summary} is more than fixed.stride {stride}.")

    def sees(q_pos, kv_pos, head):
        return (q_pos // stride == kv_pos // stride) | (kv_pos % stride >= stride - summary)

    def keys(queries: range, length: int, head: int) -> list[range]:
        own = range(queries[0] // stride * stride, (queries[-1] // stride + 1) * stride)
        return [own, *(range(stride - 1 - back, length, stride) for back in range(summary))]

    return Pattern(causal, sees, keys, block=min(stride, BLOCK))


def longformer(*, causal: bool, window: int, global_tokens: int = 1) -> Pattern:
    """A band, and the first tokens, which see all and are seen by all (Longformer, arXiv 2004.05150, 3.1).

    |q - k| <= window, or k < global_tokens, or q < global_tokens; causal: 0 <= q - k < window, or k < global_tokens.
    """
    near, count = (
        _band(causal, _number("longformer.window", window), 1),
        _number("longformer.global_tokens", global_tokens),
    )

    def sees(q_pos, kv_pos, head):
        return near.sees(q_pos, kv_pos, head) | (kv_pos < count) | (q_pos < count)

    def keys(queries: range, length: int, head: int) -> list[range]:
        every = queries[0] < count
        return [range(length)] if every else [range(count), *near.keys(queries, length, head)]

    return Pattern(causal, sees, keys, leading=count)


def sinks(*, causal: bool, window: int, sinks: int = 4) -> Pattern:
    """A band, and the first tokens, which all see (StreamingLLM, arXiv 2309.17453, 3.2).

    |q - k| <= window, or k < sinks; causal: 0 <= q - k < window, or k < sinks. Positions stay those of the document.
    """
    near, count = _band(causal, _number("sinks.window", window), 1), _number("sinks.sinks", sinks)

    def sees(q_pos, kv_pos, head):
        return near.sees(q_pos, kv_pos, head) | (kv_pos < count)

    def keys(queries: range, length: int, head: int) -> list[range]:
        return [range(count), *near.keys(queries, length, head)]

    return Pattern(causal, sees, keys)


def bigbird(
    *, causal: bool, layer: int, block_size: int = 64, window_blocks: int = 1, global_blocks: int = 1,
    random_blocks: int = 3, seed: int = 0,
) -> Pattern:  # fmt: skip
    """Blocks see their neighbours, the first ones, and random ones (BigBird, arXiv 2007.14062, 2 and appendix D).

    |i - j| <= window_blocks, or j < global_blocks, or i < global_blocks, for i = floor(q / block_size) and j of the
    key; or a link between them: each block draws `random_blocks` links to blocks before it, other ones in each head
    and layer, which hold in both directions. A draw may fall on what is seen anyway.
    """
    size, near = _number("bigbird.block_size", block_size), _number("bigbird.window_blocks", window_blocks, 0, "blocks")
    first = _number("bigbird.global_blocks", global_blocks, 0, "blocks")
    links, seed = (
        _number("bigbird.random_blocks", random_blocks, 0, "blocks"),
        _number("bigbird.seed", seed, 0, "draws"),
    )

    def drawn(later: torch.Tensor, link: int, head) -> torch.Tensor:
        return _hash(seed, layer, head, later, link) % later.clamp(min=1)

    @lru_cache(maxsize=64)
    def of_first(count: int, head: int) -> torch.Tensor:
        """(links, count): what the first `count` blocks draw."""
        return torch.stack([drawn(torch.arange(count), link, head) for link in range(links)])

    def sees(q_pos, kv_pos, head):
        i, j = q_pos // size, kv_pos // size
        seen = ((i - j).abs() <= near) | (j < first) | (i < first)
        for link in range(links):
            # what a block draws is before it
            seen = seen | (drawn(i, link, head) == j) | (drawn(j, link, head) == i)
        return seen

    def keys(queries: range, length: int, head: int) -> list[range]:
        own, count = queries[0] // size, -(-length // size)
        if own < first:
            return [range(length)]
        seen = {*range(first), *range(own - near, own + near + 1)}
        if links:
            places = of_first(count, head)
            seen |= {*places[:, own].tolist(), *(places == own).nonzero()[:, 1].tolist()}
        return [range(j * size, (j + 1) * size) for j in seen if j >= 0]

    return Pattern(causal, sees, keys, block=size, period=None, alike=True)


def _hash(*parts: Any) -> Any:
    """Evenly spread numbers below 2^32 of integers or tensors of them, the same on every machine (after Murmur3)."""
    mixed: Any = 0x9747B28C
    for part in parts:
        mixed = ((mixed ^ part) * 0xCC9E2D51) & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 15)) * 0x85EBCA6B) & 0xFFFFFFFF
        mixed = mixed ^ (mixed >> 13)
    return mixed


MASKS: dict[str, Callable[..., Pattern]] = {
    "local": local, "dilated": dilated, "block": block, "strided": strided, "fixed": fixed, "longformer": longformer,
    "sinks": sinks, "bigbird": bigbird,
}  # fmt: skip

# what full causal attention sees: no key after the query
CAUSAL = Pattern(True, lambda q_pos, kv_pos, head: kv_pos <= q_pos, lambda queries, length, head: [range(length)])


@cache
def takes_layer(name: str) -> bool:
    """Whether a pattern is another in each layer."""
    return "layer" in inspect.signature(MASKS[name]).parameters


def document_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """(batch, length) mask -> each slot's position among its row's real tokens; padding takes the nearest before it."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def grid_mask_function(pattern: Pattern, positions: torch.Tensor | None, head: int | None = None) -> Callable:
    """The pattern as transformers' mask functions take it: (batch, head, query slot, key slot) -> bool tensor.

    positions: (batch, keys) from `document_positions` when a row has padding, else None. head: of this one, whichever
    is asked for.
    """
    if positions is None:
        return lambda batch, number, q_slot, kv_slot: pattern(q_slot, kv_slot, number if head is None else head)
    return lambda batch, number, q_slot, kv_slot: pattern(
        positions[batch, q_slot], positions[batch, kv_slot], number if head is None else head
    )


@dataclass(frozen=True)
class DocumentMask:
    """What each query sees of its own document, whichever row that is; of documents of up to `length` tokens."""

    pattern: Pattern
    length: int
    heads: int
    device: torch.device

    @property
    def causal(self) -> bool:
        """Every key but those after the query, and no other rule."""
        return self.pattern is CAUSAL

    def hidden_in(self, queries: slice, keys: slice) -> torch.Tensor:
        """(queries, keys) bool, or (heads, queries, keys) where heads differ: True = not visible."""
        if self.length <= BLOCKED_FROM:
            return self._hidden[..., queries, keys]
        return self._hidden_between(*(torch.arange(x.start, x.stop, device=self.device) for x in (queries, keys)))

    @cached_property
    def _hidden(self) -> torch.Tensor:
        positions = torch.arange(self.length, device=self.device)
        return self._hidden_between(positions, positions)

    def _hidden_between(self, q_pos: torch.Tensor, kv_pos: torch.Tensor) -> torch.Tensor:
        heads = 0 if self.pattern.period == 1 else torch.arange(self.heads, device=self.device)[:, None, None]
        return ~self.pattern(q_pos[:, None], kv_pos[None, :], heads)

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Of each BLOCK of queries the keys, from and to, outside of which none of them sees any."""
        # longer ones go by the pattern's own groups
        length = self.length if self.causal else min(self.length, BLOCKED_FROM)
        seen: list[list[torch.Tensor]] = [[] for _ in range(0, length, BLOCK)]
        for head in range(self.pattern.period or self.heads):
            for queries in self.pattern.queries(length, head):
                # a pattern knows the keys of queries of one group, or of some of them
                for number in range(queries[0] // BLOCK, queries[-1] // BLOCK + 1):
                    if here := _between(queries, number * BLOCK, (number + 1) * BLOCK):
                        seen[number].append(self.pattern.keys_of(here, length, head)[[0, -1]])
        return [(int(torch.cat(ends).min()), int(torch.cat(ends).max()) + 1) for ends in seen]


def _between(positions: range, start: int, stop: int) -> range:
    """Those of them from start on and before stop."""
    first, last = (-(-(edge - positions.start) // positions.step) for edge in (start, stop))
    return positions[max(first, 0) : max(last, 0)]
