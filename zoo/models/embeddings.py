"""What turns ids into vectors: tokens, positions (learned or sinusoids), segments; and T5's position bias."""

import math

import torch
from torch import nn
from transformers.utils.import_utils import is_tracing

from .dropout import Dropout

# config field -> what to do about a number beyond it
REMEDIES = {
    "vocab_size": "is the tokenizer another model's, or has it new tokens (resize_token_embeddings)?",
    "max_position_embeddings": "cut the text, or generate less.",
    "type_vocab_size": "is the tokenizer another model's?",
}


def beyond(what: str, number: int, count: int, field: str) -> ValueError:
    """In place of torch's "index out of range in self"."""
    return ValueError(f"{what} {number}: the model has {count} of them, from 0 (config.{field}); {REMEDIES[field]}")


def look_up(table: nn.Embedding, ids: torch.Tensor, what: str, field: str) -> torch.Tensor:
    """`table(ids)`. Raises ValueError with the first id that it has no row for, where torch notices one: on CPU."""
    try:
        return table(ids)
    except IndexError as error:
        count = len(table.weight)
        raise beyond(what, int(ids[(ids < 0) | (ids >= count)][0]), count, field) from error


def positions_from(past: int | torch.Tensor, length: int, config, device) -> torch.Tensor:
    """(1, length): the positions behind `past` tokens. Raises ValueError for more than the model has."""
    count = config.max_position_embeddings
    # of a static cache `past` is a tensor, which is not read; a graph knows no lengths
    if isinstance(past, int) and not is_tracing() and past + length > count:
        raise beyond("position", past + length - 1, count, "max_position_embeddings")
    return (torch.arange(length, device=device) + past).unsqueeze(0)


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
        words = inputs_embeds
        if words is None:
            words = look_up(self.word_embeddings, input_ids, "token id", "vocab_size")
        positions = look_up(self.position_embeddings, position_ids, "position", "max_position_embeddings")
        if token_type_ids is None:
            # segment 0 everywhere: one row, added to all
            segments = self.token_type_embeddings.weight[0]
        else:
            segments = look_up(self.token_type_embeddings, token_type_ids, "segment", "type_vocab_size")
        return self.dropout(self.LayerNorm(words + segments + positions))


class DistilBertEmbeddings(nn.Module):
    """Word + position embeddings, normed; shapes as in `BertEmbeddings`. Official names."""

    def __init__(self, config, norm_eps: float):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.dim, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.dim)
        self.LayerNorm = nn.LayerNorm(config.dim, eps=norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, input_ids, inputs_embeds, token_type_ids, position_ids) -> torch.Tensor:
        words = inputs_embeds
        if words is None:
            words = look_up(self.word_embeddings, input_ids, "token id", "vocab_size")
        positions = look_up(self.position_embeddings, position_ids, "position", "max_position_embeddings")
        return self.dropout(self.LayerNorm(words + positions))


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
