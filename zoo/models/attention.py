"""The one attention module: projections, cache, position bias. Who attends to whom is config, not code.

A config names its *variant* (the maths): `attention: full`, a pattern of `masks.py`, or a list of names that is cycled
over the layers; `attention_kwargs: {name: {...}}` holds the parameters. The *implementation* of the maths (eager, sdpa,
flex) is transformers' `attn_implementation`, which is not saved.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .linear import is_plain, linear
from .masks import MASKS, DocumentMask, Pattern, causal_only, document_mask, document_positions, grid_mask_function
from .ragged import Packing
from .ragged_attention import first_token_attention, ragged_attention

FULL = "full"


def check_variant(config) -> None:
    """Raises ValueError unless `attention` and `attention_kwargs` name variants that exist, with their parameters."""
    names = [config.attention] if isinstance(config.attention, str) else list(config.attention)
    known = [FULL, *MASKS]
    if not names:
        raise ValueError(f"attention: an empty list; name at least one of {', '.join(known)}.")
    for name in names:
        if name not in known:
            raise ValueError(f"attention: no variant is called {name!r}; there are {', '.join(known)}.")
        if name != FULL:
            _build_pattern(config, name, causal=False)
        elif config.attention_kwargs.get(FULL):
            raise ValueError(f"attention_kwargs.{FULL}: full attention has no parameters.")
    for name in config.attention_kwargs:
        if name not in names:
            raise ValueError(f"attention_kwargs has an entry for {name!r}, but attention is {config.attention!r}.")


def variant_of_layer(config, layer_idx: int) -> str:
    """The name of a layer's variant: a list is a cycle over the layers (GPT-3, arXiv 2005.14165, section 2.1)."""
    return (
        config.attention if isinstance(config.attention, str) else config.attention[layer_idx % len(config.attention)]
    )


def _build_pattern(config, name: str, causal: bool) -> Pattern:
    try:
        return MASKS[name](causal=causal, **config.attention_kwargs.get(name, {}))
    except TypeError as error:
        raise ValueError(f"attention_kwargs.{name}: {error}.") from error


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
        rows = packing if packing is not None and packing.per_sequence else None
        names = [config.attention] if isinstance(config.attention, str) else config.attention
        # all at once, before the first layer puts its keys in the cache, whose length they depend on
        self._made: dict[str, Any] = {
            name: self._grid(name) if rows is None else self._document(name, rows) for name in names
        }

    def of_layer(self, layer_idx: int) -> torch.Tensor | DocumentMask | None:
        """What `Attention` takes: a grid mask of transformers' form, or what packed rows have in common."""
        return self._made[variant_of_layer(self.config, layer_idx)]

    def _document(self, name: str, packing: Packing) -> DocumentMask | None:
        if name == FULL and not self.causal:
            return None
        pattern = causal_only if name == FULL else _build_pattern(self.config, name, self.causal)
        return document_mask(pattern, packing.max_length, packing.device)

    def _grid(self, name: str) -> Any:
        attention_mask = self.padded["attention_mask"]
        pattern = None
        if name != FULL:
            if self.encoder_cache is not None and self.encoder_cache.get_seq_length():
                raise ValueError(f"attention {name!r} in an encoder has no place for cached keys (prefix tuning).")
            if attention_mask is not None and attention_mask.ndim != 2:
                raise ValueError(f"attention {name!r} needs a mask of (batch, length), not {attention_mask.ndim}-D.")
            positions = None if attention_mask is None else self._positions(attention_mask)
            pattern = grid_mask_function(_build_pattern(self.config, name, self.causal), positions)
        create = create_causal_mask if self.causal else create_bidirectional_mask
        return create(config=self.config, and_mask_function=pattern, **self.padded)

    def _positions(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """(batch, keys): the keys of a static cache are more than its mask says; those to come are hidden anyway."""
        positions = document_positions(attention_mask)
        cache = self.padded.get("past_key_values")
        if cache is None:
            return positions
        keys, _ = cache.get_mask_sizes(self.padded["inputs_embeds"].shape[1], 0)
        return nn.functional.pad(positions, (0, max(0, keys - positions.shape[1])))


def eager_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, position_bias=None, **kwargs
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T * scaling + bias + mask) v, with its weights (Attention Is All You Need, section 3.2.1)."""
    if module.num_key_value_groups > 1:
        key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class Attention(nn.Module):
    """Multi-head attention over itself or over `key_value_states`.

    hidden_states: (batch, length, hidden), or (tokens, hidden) with `packing`. Returns the same shape and the weights
    (batch, heads, queries, keys), which only the eager implementation gives. `first_only`: hidden_states are the
    first token of each row of packed `key_value_states`.
    """

    def __init__(self, config, spec, layer_idx: int, is_cross_attention: bool = False):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.scaling = spec.head_dim, spec.score_scaling
        self.num_key_value_groups = spec.num_heads // spec.key_value_heads
        self.is_cross_attention = is_cross_attention
        # read by transformers' attention functions
        self.is_causal = spec.causal and not is_cross_attention
        self.attention_dropout = spec.attention_dropout
        width, kv_width = spec.num_heads * spec.head_dim, spec.key_value_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, width, bias=spec.query_key_value_bias)
        self.k_proj = nn.Linear(spec.hidden_size, kv_width, bias=spec.query_key_value_bias)
        self.v_proj = nn.Linear(spec.hidden_size, kv_width, bias=spec.query_key_value_bias)
        self.o_proj = nn.Linear(width, spec.hidden_size, bias=spec.bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | DocumentMask | None = None,
        position_bias: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        packing: Packing | None = None,
        kv_packing: Packing | None = None,
        first_only: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        kv_packing = kv_packing or packing
        query = self._heads(linear(self.q_proj, hidden_states))
        dropout = self.attention_dropout if self.training else 0.0
        memory = key_value_states
        if first_only and memory is not None and kv_packing is not None and self._may_skip_keys(attention_mask):
            output = first_token_attention(
                query, memory, kv_packing, self.k_proj, self.v_proj, scaling=self.scaling, dropout=dropout
            )
            return linear(self.o_proj, output.flatten(1)), None
        key, value = self._keys_and_values(hidden_states if memory is None else memory, past_key_values, kv_packing)
        if packing is not None and kv_packing is not None and packing.per_sequence:
            if self.num_key_value_groups > 1:
                key, value = (x.repeat_interleave(self.num_key_value_groups, dim=1) for x in (key, value))
            mask: Any = attention_mask
            bias = None if position_bias is None else position_bias[0]
            output = ragged_attention(
                query, key, value, packing, kv_packing,
                scaling=self.scaling, dropout=dropout, mask=mask, position_bias=bias,
            )  # fmt: skip
            return linear(self.o_proj, output.flatten(1)), None
        if packing is not None and kv_packing is not None:
            query, key, value = packing.unpack(query), kv_packing.unpack(key), kv_packing.unpack(value)
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            position_bias=position_bias,
            **kwargs,
        )
        output = output.flatten(2)
        return linear(self.o_proj, output if packing is None else packing.pack(output)), weights

    def _may_skip_keys(self, attention_mask: torch.Tensor | DocumentMask | None) -> bool:
        """Whether full attention of one query a row needs nothing of the key and value layers but their weights."""
        plain = is_plain(self.k_proj) and is_plain(self.v_proj)
        return plain and attention_mask is None and self.num_key_value_groups == 1

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        """(batch, length, width) -> (batch, heads, length, head_dim); packed (tokens, width) -> (tokens, heads, *)."""
        split = projected.unflatten(-1, (-1, self.head_dim))
        return split if split.ndim == 3 else split.transpose(1, 2)

    def _keys_and_values(self, states: torch.Tensor, past_key_values: Cache | None, packing: Packing | None):
        """Projects `states` and keeps or takes them from the cache, which is always padded."""
        if past_key_values is None:
            return self._heads(linear(self.k_proj, states)), self._heads(linear(self.v_proj, states))
        cache: Any = past_key_values
        if isinstance(past_key_values, EncoderDecoderCache):
            cache = past_key_values.self_attention_cache
        if isinstance(past_key_values, EncoderDecoderCache) and self.is_cross_attention:
            cache = past_key_values.cross_attention_cache
            if past_key_values.is_updated.get(self.layer_idx):
                return cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
            past_key_values.is_updated[self.layer_idx] = True
        key, value = self._heads(linear(self.k_proj, states)), self._heads(linear(self.v_proj, states))
        if packing is None:
            key, value = cache.update(key, value, self.layer_idx)
        else:
            # the first pass of a generation: the packed tensors are all the keys there are
            cache.update(*(packing.unpack(x).transpose(1, 2) for x in (key, value)), self.layer_idx)
        return key, value
