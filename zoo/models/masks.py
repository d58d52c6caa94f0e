"""Sparse attention patterns: which key a query may see, as functions of their positions.

A pattern takes (q_pos, kv_pos), tensors of positions within the document (its real tokens, counted from 0), and says
True where the key is visible. `MASKS[name]` builds one from the model's `attention_kwargs[name]` and whether the
attention is causal.

To add one: a function here and its line in MASKS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

Pattern = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# queries that attend together, to the keys that one of them sees at least
BLOCK = 256


def local(*, causal: bool, window: int) -> Pattern:
    """A band around the diagonal: |q - k| <= window; causal: 0 <= q - k < window (Longformer, arXiv 2004.05150, 3.1).

    `window`: keys visible on each side of a query; causal: the last `window` keys, the query's own included.
    """
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ValueError(f"attention_kwargs: local.window is a number of tokens of at least 1, not {window!r}.")
    if causal:
        return lambda q_pos, kv_pos: (q_pos - kv_pos < window) & (kv_pos <= q_pos)
    return lambda q_pos, kv_pos: (q_pos - kv_pos).abs() <= window


def causal_only(q_pos: torch.Tensor, kv_pos: torch.Tensor) -> torch.Tensor:
    """What full causal attention sees: no key after the query."""
    return kv_pos <= q_pos


MASKS: dict[str, Callable[..., Pattern]] = {"local": local}


def document_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """(batch, length) mask -> each slot's position among its row's real tokens; padding takes the nearest before it."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def grid_mask_function(pattern: Pattern, positions: torch.Tensor | None) -> Callable:
    """The pattern as transformers' mask functions take it: (batch, head, query slot, key slot) -> bool tensor.

    positions: (batch, keys) from `document_positions` when a row has padding, else None.
    """
    if positions is None:
        return lambda batch, head, q_slot, kv_slot: pattern(q_slot, kv_slot)
    return lambda batch, head, q_slot, kv_slot: pattern(positions[batch, q_slot], positions[batch, kv_slot])


@dataclass(frozen=True)
class DocumentMask:
    """What each query sees of its own document, whichever row that is.

    visible: (length, length) bool, by positions. causal: every key but those after the query, and no other rule.
    """

    visible: torch.Tensor
    causal: bool

    @cached_property
    def hidden(self) -> torch.Tensor:
        return ~self.visible

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Of each BLOCK of queries the keys, from and to, outside of which none of them sees any."""
        spans = []
        for block in self.visible.split(BLOCK):
            seen = block.any(0).nonzero()
            # a query that sees nothing gives all keys the same weight
            blind = not block.any(1).all()
            spans.append((0, block.shape[1]) if blind else (int(seen[0]), int(seen[-1]) + 1))
        return spans


def document_mask(pattern: Pattern, length: int, device: torch.device) -> DocumentMask:
    """The pattern within one document of so many tokens."""
    positions = torch.arange(length, device=device)
    return DocumentMask(pattern(positions[:, None], positions[None, :]), pattern is causal_only)
