"""What turns ids into vectors: tokens, positions, segments."""

import math

import torch
from torch import nn
from transformers.utils.import_utils import is_tracing

from .dropout import Dropout
from .positions import Sinusoids
from .spec import position_count, positions_of

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
    count = position_count(config)
    # of a static cache `past` is a tensor, which is not read; a graph knows no lengths
    if count is not None and isinstance(past, int) and not is_tracing() and past + length > count:
        raise beyond("position", past + length - 1, count, "max_position_embeddings")
    return (torch.arange(length, device=device) + past).unsqueeze(0)


def make_positions(config, count: int, width: int, padding_idx: int | None = None) -> nn.Module | None:
    """What gives the vectors that are added to the tokens': learned unless `config.block` says otherwise; or None."""
    positions = positions_of(config)
    if positions == "learned":
        return nn.Embedding(count, width, padding_idx=padding_idx)
    return Sinusoids(width) if positions == "sinusoidal" else None


def add_positions(states: torch.Tensor, positions: nn.Module | None, position_ids: torch.Tensor) -> torch.Tensor:
    """`states` with the vectors of their positions. Raises ValueError for a position that is not there.

    Tokens to which sinusoids are added count sqrt(width) times as much, since their vectors begin small (Attention Is
    All You Need, section 3.4).
    """
    if isinstance(positions, nn.Embedding):
        return states + look_up(positions, position_ids, "position", "max_position_embeddings")
    if positions is None:
        return states
    return states * math.sqrt(states.shape[-1]) + positions(position_ids).to(states.dtype)


class BertEmbeddings(nn.Module):
    """Word + position + segment embeddings, normed (BERT, arXiv 1810.04805, section 3). Official names.

    Ids are (batch, length), or (tokens,) when packed; position_ids have the same shape or broadcast to it. width: of
    the vectors, where it is not the hidden size. padding_position: one that is not learned (RoBERTa).
    """

    def __init__(self, config, width: int | None = None, padding_position: int | None = None):
        super().__init__()
        width = width or config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_embeddings = make_positions(config, config.max_position_embeddings, width, padding_position)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, inputs_embeds, token_type_ids, position_ids) -> torch.Tensor:
        words = inputs_embeds
        if words is None:
            words = look_up(self.word_embeddings, input_ids, "token id", "vocab_size")
        if token_type_ids is None:
            # segment 0 everywhere: one row, added to all
            segments = self.token_type_embeddings.weight[0]
        else:
            segments = look_up(self.token_type_embeddings, token_type_ids, "segment", "type_vocab_size")
        return self.dropout(self.LayerNorm(add_positions(words + segments, self.position_embeddings, position_ids)))


class DistilBertEmbeddings(nn.Module):
    """Word + position embeddings, normed; shapes as in `BertEmbeddings`. Official names."""

    def __init__(self, config, norm_eps: float):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.dim, padding_idx=config.pad_token_id)
        self.position_embeddings = make_positions(config, config.max_position_embeddings, config.dim)
        self.LayerNorm = nn.LayerNorm(config.dim, eps=norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, input_ids, inputs_embeds, token_type_ids, position_ids) -> torch.Tensor:
        words = inputs_embeds
        if words is None:
            words = look_up(self.word_embeddings, input_ids, "token id", "vocab_size")
        return self.dropout(self.LayerNorm(add_positions(words, self.position_embeddings, position_ids)))
