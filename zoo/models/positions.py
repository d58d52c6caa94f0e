"""Where a token stands, said in one of six ways: `config.block["positions"]`.

To the token's vector a learned row is added, or sinusoids; queries and keys are turned (rotary); scores get a bias of
the distance (alibi, buckets); or nothing is said (none).
"""

import math

import torch
from torch import nn
from transformers.cache_utils import Cache

from .spec import BlockSpec


def sinusoids(positions: torch.Tensor, width: int) -> torch.Tensor:
    """Positions of any shape -> (*, width): sines at even, cosines at odd features, of position / 10000^(2i / width).

    Attention Is All You Need, section 3.5.
    """
    # Apple's processors have no doubles
    exact = torch.float32 if positions.device.type == "mps" else torch.float64
    rates = 10_000.0 ** (-torch.arange(0, width, 2, dtype=exact, device=positions.device) / width)
    angles = positions.to(exact).unsqueeze(-1) * rates
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)[..., :width].float()


class Sinusoids(nn.Module):
    """In the place of a table of positions that are learned; it has no end."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        return sinusoids(position_ids, self.width)


class Rotary(nn.Module):
    """Turns feature pairs of queries and keys by an angle that grows with the position (RoFormer, arXiv 2104.09864).

    Section 3.2.2: pair i turns by position * theta^(-2i / head_dim), so that a score depends on the distance alone. A
    pair is features i and i + head_dim / 2, as Llama's checkpoints have it.
    """

    def __init__(self, head_dim: int, theta: float):
        super().__init__()
        self.head_dim, self.theta = head_dim, theta

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch or 1, length) -> cosines and sines (*, 1, length, head_dim); (tokens,) -> (tokens, 1, head_dim)."""
        powers = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=position_ids.device) / self.head_dim
        angles = position_ids.float().unsqueeze(-1) / self.theta**powers
        # one for all heads
        angles = torch.cat((angles, angles), -1).unsqueeze(1)
        return angles.cos(), angles.sin()


def rotate(heads: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """(batch, heads, length, head_dim) or packed (tokens, heads, head_dim), turned by `Rotary`'s angles."""
    cos, sin = (x.to(heads.dtype) for x in angles)
    first, second = heads.chunk(2, -1)
    return heads * cos + torch.cat((-second, first), -1) * sin


class Alibi(nn.Module):
    """A penalty that grows with the distance, at a rate of each head's own (Press et al. 2021, arXiv 2108.12409).

    Section 3: head h of n has the slope 2^(-8 h / n); where n is no power of two, those of the next lower one and then
    every other of the next higher one. Both sides of a token of an encoder are alike.
    """

    def __init__(self, num_heads: int):
        super().__init__()
        self.num_heads = num_heads

    def slopes(self) -> torch.Tensor:
        """(heads,)"""
        below = 1 << (self.num_heads.bit_length() - 1)
        powers = [8 * (head + 1) / below for head in range(below)]
        powers += [4 * (2 * head + 1) / below for head in range(self.num_heads - below)]
        return 2.0 ** -torch.tensor(powers)

    def forward(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """(*, queries) and (*, keys) -> (*, heads, queries, keys); * is 1 where there is none."""
        distance = distances(query_positions, key_positions).abs()
        return -self.slopes().to(distance.device)[:, None, None] * distance.unsqueeze(-3)


def distances(query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
    """(*, queries) and (*, keys) -> (*, queries, keys), key minus query; * is 1 where there is none."""
    return torch.atleast_2d(key_positions).unsqueeze(-2) - torch.atleast_2d(query_positions).unsqueeze(-1)


class RelativePositionBias(nn.Embedding):
    """T5's learned bias for each head and bucket of distance (arXiv 1910.10683, section 2.1).

    Distances get a bucket each up to a quarter (causal: half) of the buckets, then logarithmically wider ones up to
    `max_distance`, beyond which all share the last.
    """

    def __init__(self, num_buckets: int, num_heads: int, max_distance: int, causal: bool):
        super().__init__(num_buckets, num_heads)
        self.max_distance, self.causal = max_distance, causal

    def forward(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """(*, queries) and (*, keys) -> (*, heads, queries, keys); * is 1 where there is none."""
        return super().forward(self.buckets(distances(query_positions, key_positions))).movedim(-1, -3)

    def buckets(self, distance: torch.Tensor) -> torch.Tensor:
        """Key position minus query position, any shape -> bucket numbers."""
        count, offset = self.num_embeddings, torch.zeros_like(distance)
        if self.causal:
            distance = (-distance).clamp(min=0)
        else:
            count //= 2
            offset = (distance > 0).long() * count
            distance = distance.abs()
        exact = count // 2
        # log(0) is never used: small distances take the exact branch
        octaves = torch.log(distance.float() / exact) / math.log(self.max_distance / exact)
        wide = exact + (octaves * (count - exact)).long()
        return offset + torch.where(distance < exact, distance, wide.clamp(max=count - 1))


def make_bias(config, spec: BlockSpec) -> Alibi | RelativePositionBias | None:
    """What is added to the scores of every layer, one for all."""
    if spec.positions == "alibi":
        return Alibi(spec.num_heads)
    if spec.positions != "buckets":
        return None
    # the defaults are T5's
    count = getattr(config, "relative_attention_num_buckets", 32)
    furthest = getattr(config, "relative_attention_max_distance", 128)
    return RelativePositionBias(count, spec.num_heads, furthest, causal=spec.causal)


def make_rotary(spec: BlockSpec) -> Rotary | None:
    return Rotary(spec.head_dim, spec.rope_theta) if spec.positions == "rotary" else None


def bias_of_pass(
    bias: nn.Module | None, inputs: torch.Tensor, cache: Cache | None, dtype: torch.dtype, in_blocks: bool
) -> torch.Tensor | nn.Module | None:
    """(1, heads, queries, keys) for inputs (batch, length, ...), the keys in the cache included.

    in_blocks: no layer looks at all pairs, so each makes its own share: `bias` itself.
    """
    if bias is None or in_blocks:
        return bias
    length = inputs.shape[1]
    past, keys = (0, length) if cache is None else (cache.get_seq_length(), cache.get_mask_sizes(length, 0)[0])
    return bias(torch.arange(length, device=inputs.device) + past, torch.arange(keys, device=inputs.device)).to(dtype)
