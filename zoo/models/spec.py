"""A block as data: its shape and kind, what they cost, and what a config may change of them.

`config.block` is a mapping of `OPTIONS`; a family's own block has none of them. Any of them go with any other, but for
those that `check_block` refuses.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

ROPE_THETA = 10_000.0


@dataclass(frozen=True)
class BlockSpec:
    """One block's shape and kind. Sizes in features; dropouts are rates."""

    hidden_size: int
    num_heads: int
    head_dim: int
    ffn_size: int
    activation: str
    norm: str = "layernorm"  # or "rmsnorm"
    norm_eps: float = 1e-12
    norm_place: str = "post"  # or "pre", or "sandwich"
    num_key_value_heads: int | None = None  # None: as many as heads
    gated: bool = False
    bias: bool = True
    qkv_bias: bool | None = None  # None: as bias
    causal: bool = False
    cross_attention: bool = False
    scaling: float | None = None  # None: head_dim ** -0.5
    qk_norm: bool = False
    parallel: bool = False
    positions: str = "learned"  # or another of `POSITIONS`
    rope_theta: float = ROPE_THETA
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0  # of what a feed-forward adds, and an attention
    attention_output_dropout: float | None = None  # of what an attention adds, where it is another
    ffn_dropout: float = 0.0  # between the two feed-forward layers

    @property
    def key_value_heads(self) -> int:
        return self.num_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def query_key_value_bias(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def score_scaling(self) -> float:
        return self.head_dim**-0.5 if self.scaling is None else self.scaling

    def matrix_parameters(self) -> int:
        """Weights of the linear layers, biases not counted."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.key_value_heads)
        feed_forward = (3 if self.gated else 2) * self.hidden_size * self.ffn_size
        return attention * (2 if self.cross_attention else 1) + feed_forward

    def num_parameters(self) -> int:
        """All parameters of the block; a position bias belongs to the stack, not to it."""
        attentions = 2 if self.cross_attention else 1
        norms = (attentions + 1) * self.hidden_size * (2 if self.norm == "layernorm" else 1)
        if self.norm_place == "sandwich":
            norms *= 2
        if self.qk_norm:
            norms += attentions * 2 * self.head_dim
        biases = 0
        if self.query_key_value_bias:
            biases += attentions * self.head_dim * (self.num_heads + 2 * self.key_value_heads)
        if self.bias:
            biases += attentions * self.hidden_size + (2 if self.gated else 1) * self.ffn_size + self.hidden_size
        return self.matrix_parameters() + norms + biases

    def flops_per_token(self, length: int, encoder_length: int = 0) -> int:
        """Multiply-adds of one forward pass over `length` tokens, counted as 2; training takes three times as many.

        2 a weight, and 4 x heads x head_dim a key for scores and their product with the values (Kaplan et al. 2020,
        table 1). The keys and values of a cross-attention are made once for each of `encoder_length` tokens, a share
        of which falls to each token here. Softmax, norms and activations are not counted.
        """
        keys = length + (encoder_length if self.cross_attention else 0)
        flops = 2 * self.matrix_parameters() + 4 * self.num_heads * self.head_dim * keys
        if self.cross_attention:
            memory = 4 * self.hidden_size * self.head_dim * self.key_value_heads
            flops += memory * encoder_length // length - memory
        return flops

    def activation_bytes(self, length: int, batch_size: int = 1) -> int:
        """What one layer keeps for its backward pass at 16 bits: s b h (34 + 5 a s / h).

        Korthikanti et al. 2022, section 4.1, with the feed-forward's own width in place of 4h: 11h for an attention,
        3h + 4f for a feed-forward (8f when gated), 2h for each norm.
        """
        attentions = 2 if self.cross_attention else 1
        feed_forward = 3 * self.hidden_size + (8 if self.gated else 4) * self.ffn_size + 2 * self.hidden_size
        per_token = attentions * (13 * self.hidden_size + 5 * self.num_heads * length) + feed_forward
        return batch_size * length * per_token

    def cache_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Keys and values that one token leaves in the cache."""
        return 2 * self.key_value_heads * self.head_dim * bytes_per_value


# name -> (activation, whether it is gated): GLU Variants Improve Transformer, arXiv 2002.05202
FEED_FORWARDS = {
    "gelu": ("gelu", False),
    "relu": ("relu", False),
    "silu": ("silu", False),
    "geglu": ("gelu", True),
    "reglu": ("relu", True),
    "swiglu": ("silu", True),
}
POSITIONS = ("learned", "sinusoidal", "rotary", "alibi", "buckets", "none")
# what an option may be: one of these, or any value of the type
OPTIONS: dict[str, tuple[str, ...] | type] = {
    "norm": ("layernorm", "rmsnorm"),
    "norm_place": ("pre", "post", "sandwich"),
    "feed_forward": tuple(FEED_FORWARDS),
    "positions": POSITIONS,
    "rope_theta": float,
    "num_key_value_heads": int,
    "qk_norm": bool,
    "parallel": bool,
}


def with_options(config, spec: BlockSpec) -> BlockSpec:
    """A family's spec with what `config.block` says in the place of its own; an official config says nothing."""
    fields = options_of(config)
    if "feed_forward" in fields:
        fields["activation"], fields["gated"] = FEED_FORWARDS[fields.pop("feed_forward")]
    return replace(spec, **fields)


def options_of(config) -> dict[str, Any]:
    return dict(getattr(config, "block", None) or {})


def own_positions(config) -> str:
    """How a family says where a token stands, where `config.block` does not."""
    return "buckets" if hasattr(config, "relative_attention_num_buckets") else "learned"


def positions_of(config) -> str:
    return options_of(config).get("positions") or own_positions(config)


def position_count(config) -> int | None:
    """How many positions a model has learned; None for one that goes on without end."""
    return getattr(config, "max_position_embeddings", None) if positions_of(config) == "learned" else None


def check_block(config, kernels: set[str]) -> None:
    """Raises ValueError unless `config.block` is a block that there can be. kernels: those that its layers have."""
    block = config.block or {}
    if not isinstance(block, dict):
        raise ValueError(f"block: a mapping of {', '.join(OPTIONS)}, not {block!r}.")
    for option, value in block.items():
        _check_option(option, value)
    for option, why in _contradictions(config, block, kernels):
        raise ValueError(f"block.{option}: {block[option]}: {why}.")


def _check_option(option: str, value: Any) -> None:
    if option not in OPTIONS:
        raise ValueError(f"block: unknown key {option!r}{_near(option, OPTIONS)}.")
    allowed = OPTIONS[option]
    if isinstance(allowed, tuple) and value not in allowed:
        raise ValueError(f"block.{option}: {value!r}{_near(value, allowed)}.")
    if isinstance(allowed, type):
        kinds = (int, float) if allowed is float else (allowed,)
        if not isinstance(value, kinds) or isinstance(value, bool) != (allowed is bool):
            raise ValueError(f"block.{option}: {value!r} is no {allowed.__name__}.")


def _near(name: Any, known) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {near[0]}" if near else f"; there are {', '.join(known)}"


def _contradictions(config, block: dict, kernels: set[str]) -> Iterator[tuple[str, str]]:
    """(option, what is wrong with it here)"""
    positions, heads = positions_of(config), config.num_attention_heads
    head_dim = getattr(config, "d_kv", None) or config.hidden_size // heads
    reads = config.is_encoder_decoder or getattr(config, "add_cross_attention", False)
    shared = block.get("num_key_value_heads")
    if shared is not None and (shared < 1 or heads % shared):
        yield "num_key_value_heads", f"the {heads} heads cannot share so many evenly"
    if "rope_theta" in block and positions != "rotary":
        yield "rope_theta", f"only rotary positions turn, and these are {positions}"
    if block.get("rope_theta", 1) <= 0:
        yield "rope_theta", "it must be above 0"
    if block.get("parallel") and reads:
        yield "parallel", "a feed-forward waits for what the cross-attention reads"
    if block.get("parallel") and block.get("norm_place", config.own_norm_place) != "pre":
        yield "parallel", "both branches read the norm of one input, so norm_place must be pre"
    if "positions" not in block:
        return
    if positions == "rotary" and head_dim % 2:
        yield "positions", f"features turn in pairs, and a head has {head_dim}"
    if positions == "rotary" and "linear" in kernels:
        yield "positions", "elu + 1 of a turned query is no function of the distance; performer can be turned"
    if positions == "learned" and own_positions(config) == "buckets":
        yield "positions", "a T5 has no greatest length, so no table of positions"
    if positions in ("rotary", "alibi", "buckets") and hasattr(config, "patch_size"):
        yield "positions", "patches lie on a grid, where a distance is not one number; learned, sinusoidal, none can"
