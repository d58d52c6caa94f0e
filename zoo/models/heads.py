"""What sits on top of a stack, with the attribute names of the official classes, and their losses."""

import torch
import torch.nn.functional as F
from torch import nn

from .blocks import make_activation
from .losses import IGNORED
from .ragged import Packing, padded, token_labels


class BertPooler(nn.Module):
    """tanh(dense(first tokens)): (batch, hidden) -> (batch, hidden)."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first_tokens: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(first_tokens))


class BertTransform(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = make_activation(config.hidden_act)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.activation(self.dense(hidden_states)))


class BertPredictions(nn.Module):
    """Token predictions; the decoder's weight is tied to the word embeddings, its bias to `bias`."""

    is_output_bias_owner = True

    def __init__(self, config):
        super().__init__()
        self.transform = BertTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.transform(hidden_states))


class BertHeads(nn.Module):
    """`cls` of the official classes: token predictions, the next-sentence relation, or both."""

    def __init__(self, config, predictions: bool = True, seq_relationship: bool = False):
        super().__init__()
        if predictions:
            self.predictions = BertPredictions(config)
        if seq_relationship:
            self.seq_relationship = nn.Linear(config.hidden_size, 2)


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, config) -> torch.Tensor:
    """Regression, one label or many, by `config.problem_type`, which is set from the labels when it is None."""
    if config.problem_type is None:
        if config.num_labels == 1:
            config.problem_type = "regression"
        elif labels.dtype in (torch.long, torch.int):
            config.problem_type = "single_label_classification"
        else:
            config.problem_type = "multi_label_classification"
    if config.problem_type == "regression":
        return F.mse_loss(logits.squeeze(), labels.squeeze()) if config.num_labels == 1 else F.mse_loss(logits, labels)
    if config.problem_type == "single_label_classification":
        return F.cross_entropy(logits.view(-1, config.num_labels), labels.view(-1))
    return F.binary_cross_entropy_with_logits(logits, labels)


def next_token_labels(labels: torch.Tensor) -> torch.Tensor:
    """(batch, length) -> what each slot predicts: the label after it; nothing after the last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def token_loss(logits: torch.Tensor, labels: torch.Tensor, num_items=None) -> torch.Tensor:
    """Mean cross entropy over the rows of (rows, classes) whose label is not -100, or their sum over `num_items`."""
    if num_items is None:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, reduction="sum") / num_items


def token_answer(logits, labels, packing: Packing | None) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(loss, padded logits) of (batch, length, classes), or packed (tokens, classes)."""
    loss = None if labels is None else token_loss(logits.flatten(0, -2), token_labels(labels, packing))
    return loss, padded(logits, packing)


def span_answer(
    logits, start_positions, end_positions, packing: Packing | None = None
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """(loss, start logits, end logits) of (..., 2). Packed, padding gets the lowest logit, so that no span is there."""
    start, end = padded(logits, packing, fill=torch.finfo(logits.dtype).min).unbind(-1)
    loss = None
    if start_positions is not None and end_positions is not None:
        loss = span_loss(start, end, start_positions, end_positions)
    return loss, start.contiguous(), end.contiguous()


def span_loss(start_logits, end_logits, start_positions, end_positions) -> torch.Tensor:
    """Mean of the cross entropies of a span's start and end; positions past the input are left out.

    Logits: (batch, length); positions: (batch,), or (batch, 1).
    """
    length = start_logits.shape[1]
    losses = []
    for logits, positions in ((start_logits, start_positions), (end_logits, end_positions)):
        positions = positions.squeeze(-1) if positions.ndim > 1 else positions
        losses.append(F.cross_entropy(logits, positions.clamp(0, length), ignore_index=length))
    return (losses[0] + losses[1]) / 2
