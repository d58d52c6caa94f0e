"""Ragged batches: real tokens are packed once, so that padding never reaches a linear layer.

`Packing` says which slots of a (batch, length) grid hold real tokens; `RaggedMixin` decides, call by call, whether a
model runs packed. The names of the packed form (`cu_seq_lens`, `max_length`) are those of transformers' own varlen
kernels. Unpadding as in MosaicBERT (Portes et al. 2023, section 2.4).
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import find_packed_sequence_indices
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from .linear import linear

logger = logging.get_logger(__name__)

# the default of a base model's `packing` argument: "decide yourself, and hand out padded outputs"
PLAN = "plan"


@dataclass(frozen=True)
class Packing:
    """The real tokens of a padded batch, in row order.

    `indices` (tokens,): each token's place in the flattened (batch, length) grid, or None when every slot is real.
    `lengths`: real tokens of each row, zeros included, or of each document where several share a row. `memory`: the
    packing of what cross-attention reads.
    """

    indices: torch.Tensor | None
    lengths: list[int]
    batch_size: int
    length: int
    device: torch.device
    # False: attention runs on unpacked, masked tensors (devices and variants without a kernel of ours)
    per_sequence: bool = True
    memory: "Packing | None" = None

    @classmethod
    def from_mask(cls, attention_mask: torch.Tensor) -> "Packing":
        """From a (batch, length) mask whose non-zero entries are real tokens."""
        real = attention_mask.bool()
        lengths = real.sum(-1).tolist()
        indices = None if min(lengths) == real.shape[1] else real.flatten().nonzero().flatten()
        return cls(indices, lengths, real.shape[0], real.shape[1], real.device, real.device.type == "cpu")

    @classmethod
    def full(
        cls, batch_size: int, length: int, device: torch.device, position_ids: torch.Tensor | None = None
    ) -> "Packing":
        """Of a batch without padding. position_ids: (batch, length), which begin anew at each document of a row."""
        lengths = [length] * batch_size
        documents = None if position_ids is None else find_packed_sequence_indices(position_ids)
        if documents is not None:
            documents = documents.expand(batch_size, -1)
            lengths = torch.cat([torch.unique_consecutive(row, return_counts=True)[1] for row in documents]).tolist()
        return cls(None, lengths, batch_size, length, device, device.type == "cpu")

    @property
    def is_grid(self) -> bool:
        """Whether all sequences are alike long, a row each."""
        return self.indices is None and len(self.lengths) == self.batch_size

    @cached_property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def max_length(self) -> int:
        return max(self.lengths)

    @cached_property
    def starts(self) -> list[int]:
        """Where each row's tokens begin; one more entry for the end."""
        return [0, *accumulate(self.lengths)]

    @cached_property
    def cu_seq_lens(self) -> torch.Tensor:
        return torch.tensor(self.starts, dtype=torch.int32, device=self.device)

    @cached_property
    def slots(self) -> torch.Tensor:
        """(tokens,): the column of each token, which is its absolute position as the official classes count it."""
        if self.indices is None:
            return torch.arange(self.length, device=self.device).repeat(self.batch_size)
        return self.indices % self.length

    @cached_property
    def row_slots(self) -> list[torch.Tensor | None]:
        """The columns of each row's tokens, or None for a row without holes, whose columns are consecutive."""
        if self.indices is None:
            return [None] * len(self.lengths)
        rows = self.slots.split(self.lengths)
        return [row if len(row) and int(row[-1] - row[0]) >= len(row) else None for row in rows]

    @cached_property
    def first_slots_real(self) -> bool:
        """Whether column 0 holds a real token in every row, which is where BERT pools."""
        if min(self.lengths) == 0:
            return False
        return self.indices is None or bool((self.slots[self.cu_seq_lens[:-1].long()] == 0).all())

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """(batch, length, ...) -> (tokens, ...). A batch of 1 stands for all rows."""
        if padded.shape[0] != self.batch_size:
            padded = padded.expand(self.batch_size, *padded.shape[1:])
        flat = padded.reshape(self.batch_size * self.length, *padded.shape[2:])
        return flat if self.indices is None else flat.index_select(0, self.indices)

    def unpack(self, packed: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """(tokens, ...) -> (batch, length, ...) with `fill` at the padded slots."""
        if self.indices is not None:
            flat = packed.new_full((self.batch_size * self.length, *packed.shape[1:]), fill)
            packed = flat.index_copy(0, self.indices, packed)
        return packed.view(self.batch_size, self.length, *packed.shape[1:])

    @cached_property
    def first(self) -> "Packing":
        """The packing of `first_tokens`: one token of each row. Every row has one."""
        return replace(self, indices=None, lengths=[1] * self.batch_size, length=1)

    def first_tokens(self, packed: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden) -> (batch, hidden): the first real token of each row."""
        return packed.index_select(0, self.cu_seq_lens[:-1])


def kept_logits(
    head: Callable[[torch.Tensor], torch.Tensor],
    states: torch.Tensor,
    packing: Packing | None,
    logits_to_keep: int | torch.Tensor,
) -> torch.Tensor:
    """(batch, kept, vocabulary): the last so many columns, all for 0, or those of an index.

    Packed, only real tokens meet the head, and padding has zeros.
    """
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    if packing is None:
        return linear(head, states[:, kept])
    numbers = packing.unpack(torch.arange(1, packing.tokens + 1, device=states.device))[:, kept]
    real = numbers > 0
    found = linear(head, states[numbers[real] - 1])
    logits = found.new_zeros(*real.shape, found.shape[-1])
    logits[real] = found
    return logits


def unpack_states(states: tuple | None, packing: Packing | None) -> tuple | None:
    """Unpacks a tuple of packed tensors, None entries kept; any other value is passed through."""
    if packing is None or not states:
        return states
    return tuple(None if state is None else packing.unpack(state) for state in states)


def unpack_output(output, packing: Packing):
    """Pads what a base model recorded while packed: its last hidden state and its hidden states."""
    if output.last_hidden_state is not None:
        output["last_hidden_state"] = packing.unpack(output.last_hidden_state)
    if output.get("hidden_states"):
        output["hidden_states"] = unpack_states(output.hidden_states, packing)
    return output


def zero_padding(output, real: torch.Tensor):
    """What `unpack_output` leaves, of a base model that ran padded. real: (batch, length), 0 at padded slots."""
    hidden = real.unsqueeze(-1) == 0
    output["last_hidden_state"] = output.last_hidden_state.masked_fill(hidden, 0.0)
    if output.get("hidden_states"):
        output["hidden_states"] = tuple(state.masked_fill(hidden, 0.0) for state in output.hidden_states)
    return output


def recorded(output, packing: Packing | None) -> dict:
    """What a head hands on of its base model's output."""
    return {"hidden_states": unpack_states(output.hidden_states, packing), "attentions": output.attentions}


def padded(values: torch.Tensor, packing: Packing | None, fill: float = 0.0) -> torch.Tensor:
    """Unpacks what is packed."""
    return values if packing is None else packing.unpack(values, fill)


def first_tokens(hidden_states: torch.Tensor, packing: Packing | None) -> torch.Tensor:
    """(batch, length, hidden), or packed (tokens, hidden) -> (batch, hidden)."""
    return hidden_states[:, 0] if packing is None else packing.first_tokens(hidden_states)


def token_labels(labels: torch.Tensor, packing: Packing | None) -> torch.Tensor:
    """(batch, length) -> one label for each row of states; a packed label at a padded slot is left out."""
    return labels.flatten() if packing is None else packing.pack(labels)


def cached_tokens(past_key_values: Cache | None) -> int:
    """Tokens whose keys are in a cache already."""
    if past_key_values is None:
        return 0
    cached = int(past_key_values.get_seq_length())
    if isinstance(past_key_values, EncoderDecoderCache):
        # assisted generation may take back every token of its own, but not the encoder's keys
        cached += int(past_key_values.cross_attention_cache.get_seq_length())
    return cached


def _adapters_by_row(model: nn.Module) -> bool:
    """Whether peft is choosing an adapter for each row in this call.

    `PeftModel.forward` keeps `adapter_names` to itself and hands it to its layers by pre-forward hooks.
    """
    if "peft" not in sys.modules:
        return False
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any("adapter_names" in getattr(hook, "keywords", ()) for hook in hooks)


class RaggedMixin(nn.Module):
    """The runtime switch between packed and padded execution; it is never saved."""

    _ragged = "auto"
    config: Any

    def set_ragged(self, mode: str) -> None:
        """`"auto"` packs where it can, `"on"` raises where it cannot, `"off"` never packs."""
        if mode not in ("auto", "on", "off"):
            raise ValueError(f"set_ragged takes 'auto', 'on' or 'off', not {mode!r}.")
        for module in self.modules():
            if isinstance(module, RaggedMixin):
                module._ragged = mode

    def plan_packing(
        self,
        inputs: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        pooled: bool = False,
        cached_tokens: int = 0,
        position_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> Packing | None:
        """How to pack `inputs` (batch, length, ...), or None to run padded.

        `pooled`: column 0 is read by a pooler. `cached_tokens`: keys already in the cache. `position_ids`: of a model
        whose masks keep the documents of a row apart, as transformers' do where there is neither a mask nor a cache.
        `kwargs`: the rest of the call, searched for what only the padded form can do. Raises ValueError with the reason
        if the mode is `"on"`.
        """
        if self._ragged == "off":
            return None
        why = self._why_padded(attention_mask, cached_tokens, kwargs)
        packing = None
        if why is None:
            batch_size, length = inputs.shape[:2]
            if attention_mask is None:
                packing = Packing.full(batch_size, length, inputs.device, position_ids)
            else:
                packing = Packing.from_mask(attention_mask)
            if packing.tokens == 0:
                packing, why = None, "no row has a real token"
            elif pooled and not packing.first_slots_real:
                packing, why = None, "the first slot of a row, which the pooler reads, is padding"
        if why is not None and self._ragged == "on":
            raise ValueError(f"set_ragged('on'), but this call cannot run packed: {why}. Use 'auto' or 'off'.")
        if why is not None:
            logger.info_once(f"{type(self).__name__} runs padded: {why}.")
        return packing

    def _why_padded(self, attention_mask, cached_tokens: int, kwargs: dict) -> str | None:
        config = self.config
        if config._attn_implementation != "sdpa":
            return f"attn_implementation is {config._attn_implementation!r}, packing needs 'sdpa'"
        if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
            return "attention weights are asked for"
        if attention_mask is not None and attention_mask.ndim != 2:
            return f"the attention mask has {attention_mask.ndim} dimensions, packing needs (batch, length)"
        if kwargs.get("adapter_names") is not None or _adapters_by_row(self):
            return "adapter_names chooses an adapter for each row"
        if cached_tokens:
            return "keys are in the cache already; only the first pass of a generation is packed"
        if is_tracing():
            return "the model is being exported, traced or compiled"
        return None
