"""What turns ids into vectors: tokens, positions (learned or sinusoids), segments; and T5's position bias."""

import math

import torch
from torch import nn

from .dropout import Dropout


class BertEmbeddings(nn.Module):
    """Word + position + segment embeddings, normed (BERT, arXiv 1810.04805, section 3). Official names.

    Ids are (batch, length), or (tokens,) when packed; position_ids have the same shape or broadcast to it. width: of
    the vectors, where it is not the hidden size. padding_position: one that is not learned (RoBERTa).
    """

    def __init__(self, config, width: int | None = None, padding_position: int | None = None):
        super().__init__()
        width = width or config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        positions = config.max_position_embeddings
        self.position_embeddings = nn.Embedding(positions, width, padding_idx=padding_position)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, inputs_embeds, token_type_ids, position_ids) -> torch.Tensor:
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            # segment 0 everywhere: one row, added to all
            segments = self.token_type_embeddings.weight[0]
        else:
            segments = self.token_type_embeddings(token_type_ids)
        embeddings = words + segments + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embeddings))


class DistilBertEmbeddings(nn.Module):
    """Word + position embeddings, normed; shapes as in `BertEmbeddings`. Official names."""

    def __init__(self, config, norm_eps: float):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.dim, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.dim)
        self.LayerNorm = nn.LayerNorm(config.dim, eps=norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, input_ids, inputs_embeds, token_type_ids, position_ids) -> torch.Tensor:
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        return self.dropout(self.LayerNorm(words + self.position_embeddings(position_ids)))


def sinusoids(count: int, width: int) -> torch.Tensor:
    """(count, width): sines at even, cosines at odd features, of the position over 10000^(2i / width).

    Attention Is All You Need, section 3.5.
    """
    rates = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(count, dtype=torch.float64).unsqueeze(1) * rates
    table = torch.empty(count, width)
    table[:, 0::2] = angles.sin()
    table[:, 1::2] = angles.cos()[:, : width // 2]
    return table


class RelativePositionBias(nn.Embedding):
    """T5's learned bias for each head and bucket of distance (arXiv 1910.10683, section 2.1).

    Distances get a bucket each up to a quarter (causal: half) of the buckets, then logarithmically wider ones up to
    `max_distance`, beyond which all share the last.
    """

    def __init__(self, num_buckets: int, num_heads: int, max_distance: int, causal: bool):
        super().__init__(num_buckets, num_heads)
        self.max_distance, self.causal = max_distance, causal

    def forward(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """(queries,) and (keys,) -> (1, heads, queries, keys)."""
        bias = super().forward(self.buckets(key_positions[None, :] - query_positions[:, None]))
        return bias.permute(2, 0, 1).unsqueeze(0)

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
