"""The one attention module: projections, cache, position bias. Who attends to whom is config, not code.

A config names its *variant* (the maths): `attention: full`, a pattern of `masks.py`, or a list of names that is cycled
over the layers; `attention_kwargs: {name: {...}}` holds the parameters. The *implementation* of the maths (eager, sdpa,
flex) is transformers' `attn_implementation`, which is not saved.
"""

import difflib
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_tracing

from .kernel import Kernel, KernelState, attend_in_rows
from .linear import is_plain, linear
from .linear_attention import LinearAttention
from .linformer import Linformer
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
from .nystrom import Nystrom
from .performer import Performer
from .positions import rotate
from .ragged import Packing, cached_tokens
from .ragged_attention import first_token_attention, ragged_attention
from .spec import check_block, positions_of

FULL = "full"

ATTENTIONS: dict[str, type[Kernel]] = {
    "linformer": Linformer, "performer": Performer, "linear": LinearAttention, "nystrom": Nystrom,
}  # fmt: skip


def check_variant(config) -> None:
    """Raises ValueError unless the config's variants exist, have their parameters and can do what is asked of them."""
    for field, names, is_causal in _self_attentions(config):
        if not names:
            raise ValueError(f"{field}: an empty list; name at least one of {', '.join(known_variants())}.")
        for name in names:
            _check_name(config, field, name)
            if name not in ATTENTIONS:
                continue
            if is_causal and not ATTENTIONS[name].causal:
                able = ", ".join(name for name, kernel in ATTENTIONS.items() if kernel.causal)
                raise ValueError(f"{field}: {name} cannot be causal, and a decoder must be; patterns can, and {able}.")
            if positions_of(config) in ("alibi", "buckets"):
                raise ValueError(
                    f"{field}: {name} has no scores to which a position bias could be added; with "
                    "block.positions: rotary, sinusoidal or none it can be."
                )
            if len(names) > 1 and hasattr(config, "num_hidden_groups"):
                raise ValueError(f"{field}: the layers of ALBERT are one; name {name} alone.")
    cross = getattr(config, "cross_attention", FULL)
    _check_name(config, "cross_attention", cross)
    if cross != FULL and (cross in MASKS or not ATTENTIONS[cross].cross):
        able = ", ".join(name for name, kernel in ATTENTIONS.items() if kernel.cross)
        raise ValueError(f"cross_attention: {cross} relates tokens of one text; full does not, nor do {able}.")
    if cross != FULL and not has_stacks(config) and not getattr(config, "add_cross_attention", False):
        raise ValueError(f"cross_attention: {cross}, but this model reads no other text.")
    if config.attention_kwargs.get(FULL):
        raise ValueError(f"attention_kwargs.{FULL}: full attention has no parameters.")
    used = {name for _, names, _ in _self_attentions(config) for name in names} | {cross}
    check_block(config, {name for _, names, _ in _self_attentions(config) for name in names if name in ATTENTIONS})
    for name in config.attention_kwargs:
        if name not in used:
            raise ValueError(f"attention_kwargs has an entry for {name!r}, but attention is {config.attention!r}.")


def known_variants() -> list[str]:
    return [FULL, *MASKS, *ATTENTIONS]


def _self_attentions(config) -> Iterator[tuple[str, list[str], bool]]:
    """(config field, the variants it names, whether they are causal)."""
    default = _listed(config.attention)
    if not has_stacks(config):
        yield "attention", default, config.always_causal or getattr(config, "is_decoder", False)
        return
    for field, is_causal in (("encoder_attention", False), ("decoder_attention", True)):
        own = getattr(config, field)
        yield ("attention" if own is None else field), default if own is None else _listed(own), is_causal


def has_stacks(config) -> bool:
    """Whether a config is T5's, of an encoder alone too: either of its stacks may have an attention of its own."""
    return hasattr(type(config), "encoder_attention")


def _listed(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _check_name(config, field: str, name: str) -> None:
    if name not in known_variants():
        near = difflib.get_close_matches(name, known_variants(), n=1)
        meant = f"did you mean {near[0]}" if near else f"there are {', '.join(known_variants())}"
        raise ValueError(f"{field}: no variant is called {name!r}; {meant}.")
    if name in MASKS:
        pattern_of(config, name, causal=False, layer=0)
    if name in ATTENTIONS:
        kwargs = config.attention_kwargs.get(name, {})
        _check_keys(name, ATTENTIONS[name].check, kwargs)
        ATTENTIONS[name].check(config, **kwargs)


def own_attention(config) -> str | list[str]:
    """The variants of a stack's self-attention: T5's encoder and decoder may each have their own."""
    own: Any = None
    if has_stacks(config):
        own = config.decoder_attention if config.is_decoder else config.encoder_attention
    return own or getattr(config, "attention", FULL)


def variant_of_layer(config, layer_idx: int) -> str:
    """The name of a layer's variant: a list is a cycle over the layers (GPT-3, arXiv 2005.14165, section 2.1)."""
    names = _listed(own_attention(config))
    return names[layer_idx % len(names)]


def _check_keys(name: str, build: Callable, kwargs: Any) -> None:
    """Raises ValueError unless `kwargs` are the parameters of a variant, those without a default among them."""
    if not isinstance(kwargs, dict):
        raise ValueError(f"attention_kwargs.{name}: a mapping of parameters, not {kwargs!r}.")
    own = {
        key: parameter.default is parameter.empty
        for key, parameter in inspect.signature(build).parameters.items()
        if key not in ("causal", "layer", "config")
    }
    for key in kwargs:
        if key not in own:
            raise ValueError(f"attention_kwargs.{name}: unknown key {key!r}; it takes {', '.join(own)}.")
    for key, required in own.items():
        if required and key not in kwargs:
            raise ValueError(f"attention_kwargs.{name}: {key} is missing.")


# patterns that were asked for; one object each, under which its blocks are kept
_PATTERNS: dict[tuple, Pattern] = {}


def pattern_of(config, name: str, causal: bool, layer: int) -> Pattern:
    """That of a layer whose variant is a pattern's name."""
    kwargs = config.attention_kwargs.get(name, {})
    own = {"layer": layer} if takes_layer(name) else {}
    asked = (name, causal, repr(own), repr(kwargs))
    if asked not in _PATTERNS:
        _check_keys(name, MASKS[name], kwargs)
        _PATTERNS[asked] = MASKS[name](causal=causal, **own, **kwargs)
    return _PATTERNS[asked]


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
        return all(
            isinstance(mask, InRows)
            or (isinstance(mask, DocumentMask) and not mask.causal and mask.length >= BLOCKED_FROM)
            for mask in self._made.values()
        )

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
