"""What attentions with their own maths have in common: the ones that are no softmax over a pattern of keys.

A kernel attends within one document: it never meets padding, because `Attention` hands it the real tokens of each row.
Kernels are listed in `attention_variants.ATTENTIONS`.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from .ragged import Packing


class Kernel(nn.Module):
    """Base of every kernel; its parameters beside `heads` and so on are those of `attention_kwargs`.

    A subclass says what it can be: `causal` (it has a state of constant size in generation, too), `cross` (queries of
    one text over the keys of another).
    """

    causal: ClassVar[bool] = False
    cross: ClassVar[bool] = False
    # parameters that all layers of a stack have in common
    of_model: tuple[str, ...] = ()

    def __init__(self, config: Any, heads: int, head_dim: int, is_causal: bool):
        super().__init__()
        self.heads, self.head_dim, self.is_causal = heads, head_dim, is_causal

    @staticmethod
    def check(config: Any) -> None:
        """Raises ValueError for parameters that make no sense; its own parameters are those of `attention_kwargs`."""

    def initialise(self) -> None:
        """Fills the parameters and buffers, with `transformers.initialization`."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, dropout: float = 0.0
    ) -> torch.Tensor:
        """(batch, heads, queries, head_dim), (batch, heads, keys, head_dim) twice -> as the queries."""
        raise NotImplementedError


def shared_parameters(model: nn.Module) -> dict[str, str]:
    """Names of parameters -> those of the first kernel, which they are."""
    first: dict[str, str] = {}
    shared = {}
    for name, module in model.named_modules():
        for parameter in module.of_model if isinstance(module, Kernel) else ():
            source = first.setdefault(parameter, f"{name}.{parameter}")
            shared[f"{name}.{parameter}"] = source
    return {name: source for name, source in shared.items() if name != source}


def attend_in_rows(
    kernel, query, key, value, rows: Packing, kv_rows: Packing, scaling: float, dropout: float, state=None
) -> torch.Tensor:
    """A kernel on each row of packed tokens: (query tokens, heads, head_dim) and (key tokens, ...) -> as the queries.

    state: a `KernelState`, which is read and taken further; its tokens are counted as slots of the padded batch.
    """
    if state is not None and len(rows.lengths) != rows.batch_size:
        # of several documents in a row none can be gone on with
        state.close(rows.length)
        state = None
    alike = rows.is_grid and kv_rows.is_grid
    if alike:
        grids = [_grid(query, rows), _grid(key, kv_rows), _grid(value, kv_rows)]
        if state is None:
            return kernel(*grids, scaling, dropout).transpose(1, 2).flatten(0, 1)
        output, sums = kernel.with_sums(*grids, scaling, state.sums(None))
        state.update(*sums, tokens=rows.length)
        return output.transpose(1, 2).flatten(0, 1)
    outputs, found = [], []
    split = query.split(rows.lengths), key.split(kv_rows.lengths), value.split(kv_rows.lengths)
    for row, tokens in enumerate(zip(*split, strict=True)):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in tokens)
        if state is not None:
            output, sums = kernel.with_sums(q, k, v, scaling, state.sums(row))
            found.append(sums)
        elif q.shape[2] and k.shape[2]:
            output = kernel(q, k, v, scaling, dropout)
        else:
            output = torch.zeros_like(q)
        outputs.append(output.squeeze(0).transpose(0, 1))
    if state is not None:
        state.update(*(torch.cat(sums) for sums in zip(*found, strict=True)), tokens=rows.length)
    return torch.cat(outputs)


def _grid(packed: torch.Tensor, rows: Packing) -> torch.Tensor:
    """(tokens, heads, head_dim) -> (batch, heads, length, head_dim)."""
    return packed.unflatten(0, (rows.batch_size, rows.length)).transpose(1, 2)


class KernelState(CacheLayerMixin):
    """What a causal kernel keeps of the tokens so far, in the place of their keys and values.

    keys: (batch, heads, features, head_dim), the sum of phi(k) v^T; values: (batch, heads, features), that of phi(k).
    """

    def __init__(self) -> None:
        super().__init__()
        self.cumulative_length = 0

    @classmethod
    def of_layer(cls, cache: Any, layer: int) -> "KernelState":
        """The one of a layer, put into a transformers' cache in the place of what that has there."""
        while len(cache.layers) <= layer:
            cache.layers.append(DynamicLayer())
        if not isinstance(cache.layers[layer], cls):
            if cache.layers[layer].get_seq_length():
                raise ValueError("a kernel's layer has no place for cached keys (prefix tuning).")
            cache.layers[layer] = cls()
        return cache.layers[layer]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, tokens: int = 0, **kwargs) -> tuple:
        """Keeps new sums, those of `tokens` more tokens among them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        self.cumulative_length += tokens
        return self.keys, self.values

    def close(self, tokens: int) -> None:
        """Counts tokens of which nothing is kept."""
        self.cumulative_length += tokens

    def sums(self, row: int | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Those of one row, or of all; None before the first token."""
        if self.keys is None and self.cumulative_length:
            raise ValueError("a row of several documents was read: which of them is to be gone on with?")
        if self.keys is None or self.values is None or not self.cumulative_length:
            return None
        rows = slice(None) if row is None else slice(row, row + 1)
        return self.keys[rows], self.values[rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (x.repeat_interleave(repeats, dim=0) for x in (self.keys, self.values))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[indices], self.values[indices]

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a sum over tokens forgets none: a causal kernel has no assisted generation.")
