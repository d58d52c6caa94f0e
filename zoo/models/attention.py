"""The one attention module: projections, cache, position bias. Who attends to whom is config, not code."""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_variants import ATTENTIONS, FULL, variant_of_layer
from .kernel import Kernel, KernelState, attend_in_rows
from .layer_masks import InRows
from .linear import is_plain, linear
from .masks import DocumentMask
from .positions import rotate
from .ragged import Packing
from .ragged_attention import first_token_attention, ragged_attention


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
        variant = (
            getattr(config, "cross_attention", FULL) if is_cross_attention else variant_of_layer(config, layer_idx)
        )
        self.kernel: Kernel | None = None
        if variant in ATTENTIONS:
            kwargs = config.attention_kwargs.get(variant, {})
            place = config, spec.num_heads, spec.head_dim, self.is_causal
            self.kernel = ATTENTIONS[variant](*place, **kwargs)
        self.q_proj = nn.Linear(spec.hidden_size, width, bias=spec.query_key_value_bias)
        self.k_proj = nn.Linear(spec.hidden_size, kv_width, bias=spec.query_key_value_bias)
        self.v_proj = nn.Linear(spec.hidden_size, kv_width, bias=spec.query_key_value_bias)
        self.o_proj = nn.Linear(width, spec.hidden_size, bias=spec.bias)
        # Query-Key Normalization, arXiv 2010.04245, by RMSNorm and a scale for each feature, as in Qwen3 and Gemma3
        norm = partial(nn.RMSNorm, spec.head_dim, eps=spec.norm_eps) if spec.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | DocumentMask | InRows | None = None,
        position_bias: torch.Tensor | nn.Module | None = None,
        key_value_states: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        packing: Packing | None = None,
        kv_packing: Packing | None = None,
        first_only: bool = False,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        kv_packing = kv_packing or packing
        query = self.q_norm(self._heads(linear(self.q_proj, hidden_states)))
        query = query if rotary is None else rotate(query, rotary)
        dropout = self._dropout()
        memory = key_value_states
        if self.kernel is not None and not self.is_cross_attention:
            rows: Any = attention_mask
            key, value = self._made_from(hidden_states, rotary)
            output = self._by_kernel(query, key, value, rows.packing, packing is not None, past_key_values)
            return linear(self.o_proj, output.flatten(-2)), None
        if first_only and memory is not None and kv_packing is not None and self._may_skip_keys(attention_mask):
            output = first_token_attention(
                query, memory, kv_packing, self.k_proj, self.v_proj, scaling=self.scaling, dropout=dropout
            )
            return linear(self.o_proj, output.flatten(1)), None
        states = hidden_states if memory is None else memory
        key, value = self._keys_and_values(states, past_key_values, kv_packing, rotary)
        if self.kernel is not None:
            output = self._across_by_kernel(query, key, value, attention_mask, packing, kv_packing)
            return linear(self.o_proj, output.flatten(-2)), None
        settings = {"scaling": self.scaling, "dropout": dropout, "position_bias": position_bias}
        if isinstance(attention_mask, InRows):
            rows, mask = attention_mask
            query, key, value = (rows.pack(x.transpose(1, 2)) for x in (query, key, value))
            output = self._in_rows(query, key, value, rows, rows, mask, **settings)
            return linear(self.o_proj, rows.unpack(output.flatten(1))), None
        if packing is not None and kv_packing is not None:
            if packing.per_sequence or isinstance(attention_mask, DocumentMask):
                output = self._in_rows(query, key, value, packing, kv_packing, attention_mask, **settings)
                return linear(self.o_proj, output.flatten(1)), None
            query, key, value = packing.unpack(query), kv_packing.unpack(key), kv_packing.unpack(value)
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attend(self, query, key, value, attention_mask, **settings, **kwargs)
        output = output.flatten(2)
        return linear(self.o_proj, output if packing is None else packing.pack(output)), weights

    def _in_rows(self, query, key, value, packing: Packing, kv_packing: Packing, mask, *, position_bias, **settings):
        """(tokens, heads, head_dim) of each row by itself."""
        if self.num_key_value_groups > 1:
            key, value = (x.repeat_interleave(self.num_key_value_groups, dim=1) for x in (key, value))
        bias = position_bias[0] if isinstance(position_bias, torch.Tensor) else position_bias
        return ragged_attention(query, key, value, packing, kv_packing, mask=mask, position_bias=bias, **settings)

    def _by_kernel(self, query, key, value, rows: Packing, packed: bool, past_key_values: Cache | None) -> torch.Tensor:
        """Self-attention, (tokens, heads, head_dim) or (batch, length, heads, head_dim), as what is given is packed."""
        if not packed:
            query, key, value = (rows.pack(x.transpose(1, 2)) for x in (query, key, value))
        if self.num_key_value_groups > 1:
            key, value = (x.repeat_interleave(self.num_key_value_groups, dim=1) for x in (key, value))
        cache: Any = past_key_values
        if isinstance(past_key_values, EncoderDecoderCache):
            cache = past_key_values.self_attention_cache
        state = None if cache is None else KernelState.of_layer(cache, self.layer_idx)
        output = attend_in_rows(self.kernel, query, key, value, rows, rows, self.scaling, self._dropout(), state)
        return output if packed else rows.unpack(output)

    def _across_by_kernel(self, query, key, value, mask, packing: Packing | None, kv_packing: Packing | None):
        """Cross-attention; mask: of transformers' form, for padded states."""
        if packing is not None and kv_packing is not None:
            return attend_in_rows(
                self.kernel, query, key, value, packing, kv_packing, self.scaling, self._dropout(), None
            )
        rows = Packing.full(query.shape[0], query.shape[2], query.device)
        # the same keys are hidden from every query
        real = None if mask is None else (mask[:, 0, 0] if mask.dtype == torch.bool else mask[:, 0, 0] >= 0)
        kv_rows = Packing.full(key.shape[0], key.shape[2], key.device) if real is None else Packing.from_mask(real)
        query, (key, value) = rows.pack(query.transpose(1, 2)), (kv_rows.pack(x.transpose(1, 2)) for x in (key, value))
        return rows.unpack(
            attend_in_rows(self.kernel, query, key, value, rows, kv_rows, self.scaling, self._dropout(), None)
        )

    def _dropout(self) -> float:
        return self.attention_dropout if self.training else 0.0

    def _may_skip_keys(self, attention_mask: torch.Tensor | DocumentMask | InRows | None) -> bool:
        """Whether full attention of one query a row needs nothing of the key and value layers but their weights."""
        plain = is_plain(self.k_proj) and is_plain(self.v_proj) and isinstance(self.k_norm, nn.Identity)
        return plain and attention_mask is None and self.num_key_value_groups == 1

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        """(batch, length, width) -> (batch, heads, length, head_dim); packed (tokens, width) -> (tokens, heads, *)."""
        split = projected.unflatten(-1, (-1, self.head_dim))
        return split if split.ndim == 3 else split.transpose(1, 2)

    def _made_from(self, states: torch.Tensor, rotary) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys, normed and turned as their positions ask, and values of states, as `_heads` has them."""
        key, value = (self._heads(linear(layer, states)) for layer in (self.k_proj, self.v_proj))
        key = self.k_norm(key)
        return key if rotary is None else rotate(key, rotary), value

    def _keys_and_values(
        self, states: torch.Tensor, past_key_values: Cache | None, packing: Packing | None, rotary=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of `states`, which are kept in the cache or taken from it; it is always padded."""
        if past_key_values is None:
            return self._made_from(states, rotary)
        cache: Any = past_key_values
        if isinstance(past_key_values, EncoderDecoderCache):
            cache = past_key_values.self_attention_cache
        if isinstance(past_key_values, EncoderDecoderCache) and self.is_cross_attention:
            cache = past_key_values.cross_attention_cache
            if past_key_values.is_updated.get(self.layer_idx):
                return cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
            past_key_values.is_updated[self.layer_idx] = True
        key, value = self._made_from(states, rotary)
        if packing is None:
            key, value = cache.update(key, value, self.layer_idx)
        else:
            # the first pass of a generation: the packed tensors are all the keys there are
            cache.update(*(packing.unpack(x).transpose(1, 2) for x in (key, value)), self.layer_idx)
        return key, value
