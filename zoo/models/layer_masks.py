"""What the layers of one forward pass hide, each variant's made once: masks on the padded grid, or rules of rows."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.utils.import_utils import is_tracing

from .attention_variants import ATTENTIONS, FULL, pattern_of, variant_of_layer
from .masks import (
    BLOCKED_FROM,
    CAUSAL,
    MASKS,
    DocumentMask,
    Pattern,
    document_positions,
    grid_mask_function,
    takes_layer,
)
from .ragged import Packing, cached_tokens


class InRows(NamedTuple):
    """The real tokens of a batch that may be padded, where each row attends by itself; mask: None for a kernel."""

    packing: Packing
    mask: DocumentMask | None


class LayerMasks:
    """Self-attention masks of one forward pass, each variant's made once and shared by its layers."""

    def __init__(
        self, config, causal: bool, inputs_embeds, attention_mask, past_key_values, packing: Packing | None,
        position_ids: torch.Tensor | None = None,
    ):  # fmt: skip
        """inputs_embeds: (batch, length, hidden) as padded; attention_mask: (batch, keys), or 4-D as it is.

        position_ids, causal: (batch, length); where they begin anew, so does a document, unless there is a mask or a
        cache.
        """
        self.config, self.causal = config, causal
        self.padded = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        self.encoder_cache = None if causal else past_key_values
        if causal:
            self.padded |= {"past_key_values": past_key_values, "position_ids": position_ids}
        self.packing = packing
        # all at once, before the first layer puts its keys in the cache, whose length they depend on
        self._made: dict[Any, Any] = {}
        # an ALBERT's groups may have several layers each
        for layer in range(config.num_hidden_layers * getattr(config, "inner_group_num", 1)):
            name = self._name(layer)
            if name not in self._made:
                self._made[name] = self._make(variant_of_layer(config, layer), layer)

    def of_layer(self, layer_idx: int) -> "torch.Tensor | DocumentMask | InRows | None":
        """What `Attention` takes: a grid mask of transformers' form, or what packed rows have in common."""
        return self._made[self._name(layer_idx)]

    @property
    def in_blocks(self) -> bool:
        """Whether every layer's pattern is computed in blocks, so that none looks at all pairs."""
        masks = [mask.mask if isinstance(mask, InRows) else mask for mask in self._made.values()]
        return all(isinstance(mask, DocumentMask) and not mask.causal and mask.length >= BLOCKED_FROM for mask in masks)

    def by_kernel(self, layer_idx: int) -> bool:
        """Whether a layer has its own maths, which may need every query."""
        return variant_of_layer(self.config, layer_idx) in ATTENTIONS

    def _name(self, layer_idx: int) -> Any:
        name = variant_of_layer(self.config, layer_idx)
        return (name, layer_idx) if name in MASKS and takes_layer(name) else name

    def _make(self, name: str, layer_idx: int) -> Any:
        packing = self.packing
        if name == FULL:
            if packing is None or not packing.per_sequence:
                return self._grid(None, layer_idx)
            return self._document(CAUSAL, packing) if self.causal else None
        self._check(name)
        if name in ATTENTIONS:
            return InRows(packing or self._rows(), None)
        pattern = pattern_of(self.config, name, self.causal, layer_idx)
        if packing is not None and (packing.per_sequence or packing.max_length >= BLOCKED_FROM):
            return self._document(pattern, packing)
        rows = self._rows_of_grid() if packing is None else None
        return self._grid(pattern, layer_idx) if rows is None else InRows(rows, self._document(pattern, rows))

    def _document(self, pattern: Pattern, packing: Packing) -> DocumentMask:
        return DocumentMask(pattern, packing.max_length, self.config.num_attention_heads, packing.device)

    def _check(self, name: str) -> None:
        """Raises ValueError for what no pattern can do."""
        attention_mask = self.padded["attention_mask"]
        if self.encoder_cache is not None and self.encoder_cache.get_seq_length():
            raise ValueError(f"attention {name!r} in an encoder has no place for cached keys (prefix tuning).")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention {name!r} needs a mask of (batch, length), not {attention_mask.ndim}-D.")

    def _rows_of_grid(self) -> Packing | None:
        """The real tokens of a long padded batch, where blocks of a pattern can be computed on them."""
        long = self.padded["inputs_embeds"].shape[1] >= BLOCKED_FROM
        cached = self.padded.get("past_key_values") is not None
        if not long or self.config._attn_implementation != "sdpa" or cached or is_tracing():
            return None
        rows = self._rows()
        return rows if rows.tokens else None

    def _rows(self) -> Packing:
        """The real tokens of what enters a padded stack now."""
        grid, mask = self.padded["inputs_embeds"], self.padded["attention_mask"]
        batch_size, length = grid.shape[:2]
        if mask is None:
            past = cached_tokens(self.padded.get("past_key_values"))
            positions = None if past else self.padded.get("position_ids")
            return Packing.full(batch_size, length, grid.device, positions)
        if is_tracing():
            raise ValueError("a kernel's attention cannot be traced with an attention mask: which tokens are real?")
        return Packing.from_mask(mask[:, -length:])

    def _grid(self, pattern: Pattern | None, layer_idx: int) -> Any:
        create: Any = create_bidirectional_mask
        if self.causal:
            # the cache of a kernel's layer has another length
            create = partial(create_causal_mask, layer_idx=layer_idx)
        create = partial(create, config=self.config, **self.padded)
        attention_mask = self.padded["attention_mask"]
        if pattern is None:
            return create()
        positions = None if attention_mask is None else self._positions(attention_mask, layer_idx)
        if pattern.period == 1:
            return create(and_mask_function=grid_mask_function(pattern, positions))
        if self.config._attn_implementation == "flex_attention":
            raise ValueError("flex_attention takes one pattern for all heads, not one for each; use sdpa or eager.")
        # transformers' own masks are the same for all heads
        count = self.config.num_attention_heads
        period = min(pattern.period or count, count)
        heads = [create(and_mask_function=grid_mask_function(pattern, positions, head)) for head in range(period)]
        return torch.cat([heads[head % period] for head in range(count)], 1)

    def _positions(self, attention_mask: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """(batch, keys): the keys of a static cache are more than its mask says; those to come are hidden anyway."""
        positions = document_positions(attention_mask)
        cache = self.padded.get("past_key_values")
        if cache is None:
            return positions
        keys, _ = cache.get_mask_sizes(self.padded["inputs_embeds"].shape[1], layer_idx)
        return nn.functional.pad(positions, (0, max(0, keys - positions.shape[1])))


def cross_mask(config, queries: torch.Tensor, mask: torch.Tensor | None, states: torch.Tensor) -> Any:
    """Of the texts that are read: of transformers' form, or for a kernel (batch, 1, 1, keys). mask: (batch, keys)."""
    if config.cross_attention in ATTENTIONS and (mask is None or mask.ndim == 2):
        return None if mask is None else mask[:, None, None].bool()
    return create_bidirectional_mask(config, queries, mask, encoder_hidden_states=states)
