"""The one transformer block: what differs between the families is data (`BlockSpec`), not code."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Attention
from .dropout import Dropout
from .linear import linear
from .masks import DocumentMask


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
    norm_place: str = "post"  # or "pre"
    num_key_value_heads: int | None = None  # None: as many as heads
    gated: bool = False
    bias: bool = True
    qkv_bias: bool | None = None  # None: as bias
    causal: bool = False
    cross_attention: bool = False
    scaling: float | None = None  # None: head_dim ** -0.5
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


NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}

# the same functions as transformers' own, by torch's fused kernels
FUSED_ACTIVATIONS = {"gelu_new": lambda: nn.GELU(approximate="tanh")}


def make_norm(spec: BlockSpec) -> nn.Module:
    return NORMS[spec.norm](spec.hidden_size, eps=spec.norm_eps)


def make_activation(name: str) -> nn.Module:
    return FUSED_ACTIVATIONS[name]() if name in FUSED_ACTIVATIONS else ACT2FN[name]


class FeedForward(nn.Module):
    """fc2(act(fc1(x))), or fc2(act(gate(x)) * fc1(x)) when gated (GLU variants, arXiv 2002.05202)."""

    def __init__(self, spec: BlockSpec):
        super().__init__()
        if spec.gated:
            self.gate = nn.Linear(spec.hidden_size, spec.ffn_size, bias=spec.bias)
        self.fc1 = nn.Linear(spec.hidden_size, spec.ffn_size, bias=spec.bias)
        self.fc2 = nn.Linear(spec.ffn_size, spec.hidden_size, bias=spec.bias)
        self.activation = make_activation(spec.activation)
        self.dropout = Dropout(spec.ffn_dropout)
        self.gated = spec.gated

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.gated:
            hidden_states = self.activation(linear(self.gate, hidden_states)) * linear(self.fc1, hidden_states)
        else:
            hidden_states = self.activation(linear(self.fc1, hidden_states))
        return linear(self.fc2, self.dropout(hidden_states))


class Block(GradientCheckpointingLayer):
    """Self-attention, cross-attention where the spec has it, feed-forward; each with its norm and residual.

    hidden_states: (batch, length, hidden), or packed (tokens, hidden) with `packing`. With `first_only`, for a last
    layer whose output is read by a pooler alone, a packed block computes the first token of each row: (batch, hidden).
    """

    def __init__(self, config, spec: BlockSpec, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, spec, layer_idx)
        self.self_attn_norm = make_norm(spec)
        if spec.cross_attention:
            self.cross_attn = Attention(config, spec, layer_idx, is_cross_attention=True)
            self.cross_attn_norm = make_norm(spec)
        self.mlp = FeedForward(spec)
        self.mlp_norm = make_norm(spec)
        self.dropout = Dropout(spec.hidden_dropout)
        other = spec.attention_output_dropout
        self.attention_output_dropout = Dropout(spec.hidden_dropout if other is None else other)
        self.pre_norm = spec.norm_place == "pre"

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | DocumentMask | None = None,
        position_bias: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,  # positional, so that gradient checkpointing sees it
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_packing=None,
        packing=None,
        first_only: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        attend = {"attention_mask": attention_mask, "position_bias": position_bias, "packing": packing, **kwargs}
        if first_only:
            memory = self.self_attn_norm(hidden_states) if self.pre_norm else hidden_states
            attend |= {"key_value_states": memory, "packing": packing.first, "kv_packing": packing, "first_only": True}
            hidden_states = packing.first_tokens(hidden_states)
        dropout = self.attention_output_dropout
        hidden_states = self._residual(hidden_states, self.self_attn, self.self_attn_norm, dropout, attend)
        if encoder_hidden_states is not None:
            attend = {
                **kwargs,
                "packing": packing,
                "key_value_states": encoder_hidden_states,
                "attention_mask": encoder_attention_mask,
                "kv_packing": encoder_packing,
            }
            hidden_states = self._residual(hidden_states, self.cross_attn, self.cross_attn_norm, dropout, attend)
        return self._residual(hidden_states, self.mlp, self.mlp_norm, self.dropout, {})

    def _residual(self, hidden_states: torch.Tensor, layer, norm, dropout: Dropout, kwargs: dict) -> torch.Tensor:
        output = layer(norm(hidden_states) if self.pre_norm else hidden_states, **kwargs)
        # attention also returns its weights, for those who record them
        output = output[0] if isinstance(output, tuple) else output
        hidden_states = dropout.add_to(hidden_states, output)
        return hidden_states if self.pre_norm else norm(hidden_states)
