"""The one transformer block: what differs between the families is data (`BlockSpec`), not code."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Attention
from .dropout import Dropout
from .linear import linear
from .masks import DocumentMask
from .spec import BlockSpec

NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}

# the same functions as transformers' own, by torch's fused kernels
FUSED_ACTIVATIONS = {"gelu_new": lambda: nn.GELU(approximate="tanh")}


def make_norm(spec: BlockSpec) -> nn.Module:
    return NORMS[spec.norm](spec.hidden_size, eps=spec.norm_eps)


def make_final_norm(spec: BlockSpec) -> nn.Module | None:
    """Of a stack, whose blocks leave their output as it is unless their norms stand behind the residual."""
    return None if spec.norm_place == "post" else make_norm(spec)


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

    Its norm is behind the residual (post: Attention Is All You Need), before the branch (pre: Xiong et al. 2020, arXiv
    2002.04745), or before and behind the branch (sandwich: Ding et al. 2021, arXiv 2105.13290, section 2.4). With
    `spec.parallel` the feed-forward reads what the attention reads, not what it adds (GPT-J; PaLM, arXiv 2204.02311,
    section 2).

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
        if spec.norm_place == "sandwich":
            branches = ("self_attn", "cross_attn", "mlp") if spec.cross_attention else ("self_attn", "mlp")
            self.output_norms = nn.ModuleDict({branch: make_norm(spec) for branch in branches})
        self.dropout = Dropout(spec.hidden_dropout)
        other = spec.attention_output_dropout
        self.attention_output_dropout = Dropout(spec.hidden_dropout if other is None else other)
        self.norm_place, self.parallel = spec.norm_place, spec.parallel

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | DocumentMask | None = None,
        position_bias: torch.Tensor | nn.Module | None = None,
        encoder_hidden_states: torch.Tensor | None = None,  # positional, so that gradient checkpointing sees it
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_packing=None,
        packing=None,
        first_only: bool = False,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        attend = {"attention_mask": attention_mask, "position_bias": position_bias, "packing": packing, **kwargs}
        attend["rotary"] = rotary
        if first_only:
            memory = hidden_states if self.norm_place == "post" else self.self_attn_norm(hidden_states)
            attend |= {"key_value_states": memory, "packing": packing.first, "kv_packing": packing, "first_only": True}
            hidden_states = packing.first_tokens(hidden_states)
        if self.parallel:
            fed = self.mlp(self.mlp_norm(hidden_states))
            hidden_states = self._residual(hidden_states, "self_attn", self.attention_output_dropout, attend)
            return self.dropout.add_to(hidden_states, fed)
        hidden_states = self._residual(hidden_states, "self_attn", self.attention_output_dropout, attend)
        if encoder_hidden_states is not None:
            attend = {
                **kwargs,
                "packing": packing,
                "key_value_states": encoder_hidden_states,
                "attention_mask": encoder_attention_mask,
                "kv_packing": encoder_packing,
            }
            hidden_states = self._residual(hidden_states, "cross_attn", self.attention_output_dropout, attend)
        return self._residual(hidden_states, "mlp", self.dropout, {})

    def _residual(self, hidden_states: torch.Tensor, branch: str, dropout: Dropout, kwargs: dict) -> torch.Tensor:
        layer, norm = getattr(self, branch), getattr(self, f"{branch}_norm")
        output = layer(hidden_states if self.norm_place == "post" else norm(hidden_states), **kwargs)
        # attention also returns its weights, for those who record them
        output = output[0] if isinstance(output, tuple) else output
        if self.norm_place == "sandwich":
            output = self.output_norms[branch](output)
        hidden_states = dropout.add_to(hidden_states, output)
        return norm(hidden_states) if self.norm_place == "post" else hidden_states
