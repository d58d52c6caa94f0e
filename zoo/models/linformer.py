"""Linformer: keys and values are projected to a fixed number of slots (Wang et al. 2020, arXiv 2006.04768).

softmax(q (E k)^T) (F v), with E and F of (rank, length): linear in length for a fixed rank (section 4, equation 7).
With rank = length and E = F = I it is full attention.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils.import_utils import is_tracing

from .kernel import Kernel
from .patches import as_pair

SHARED = ("head", "layer", "model")
STARTS = ("mean", "random")


class Linformer(Kernel):
    """Attention over `rank` mixtures of the keys (Linformer, arXiv 2006.04768, section 4).

    `rank`: slots. `max_length`: tokens, at most; the model's own positions unless given. `sharing`: which heads have
    the same projections: each its own (`head`), those of a `layer` (default), all of the `model`. `start`: `mean`, each
    slot begins as the mean of neighbours, or `random`. With `mean`, a text attends to the slots that begin within it.
    """

    cross = True

    def __init__(self, *place, rank: int, max_length: int | None = None, sharing: str = "layer", start: str = "mean"):
        super().__init__(*place)
        self.rank, self.start = rank, start
        self.max_length = max_length or own_length(place[0]) or 0
        own = self.heads if sharing == "head" else 1
        self.of_model = ("key_projection", "value_projection") if sharing == "model" else ()
        self.key_projection = nn.Parameter(torch.empty(own, rank, self.max_length))
        self.value_projection = nn.Parameter(torch.empty(own, rank, self.max_length))

    @staticmethod
    def check(  # type: ignore[override]
        config, rank, max_length=None, sharing="layer", start="mean"
    ) -> None:
        for name, value in (("rank", rank), ("max_length", max_length)):
            if (name, value) != ("max_length", None) and (type(value) is not int or value < 1):
                raise ValueError(f"attention_kwargs: linformer.{name} is a whole number of at least 1, not {value!r}.")
        for name, value, known in (("sharing", sharing, SHARED), ("start", start, STARTS)):
            if value not in known:
                raise ValueError(f"attention_kwargs: linformer.{name} is one of {', '.join(known)}, not {value!r}.")
        longest = max_length or own_length(config)
        if longest is None:
            raise ValueError(
                "attention_kwargs: linformer.max_length is missing, and this model has no length of its own."
            )
        if rank > longest:
            raise ValueError(f"attention_kwargs: linformer.rank {rank} is more than its length, {longest}.")

    def initialise(self) -> None:
        if self.start == "random":
            for projection in (self.key_projection, self.value_projection):
                init.normal_(projection, std=self.rank**-0.5)
            return
        means = F.one_hot(self._slots(self.max_length), self.rank).T.to(self.key_projection)
        means = means / means.sum(1, keepdim=True).clamp(min=1)
        for projection in (self.key_projection, self.value_projection):
            init.copy_(projection, means.expand_as(projection))

    def _slots(self, length: int) -> torch.Tensor:
        """(length,): each token goes into one slot at the start; slots differ by one token at most."""
        return torch.arange(length) * self.rank // self.max_length

    def _edges(self) -> torch.Tensor:
        """(rank + 1,): the first token of each slot at the start, and the end."""
        return (torch.arange(self.rank + 1) * self.max_length + self.rank - 1) // self.rank

    def _shares(self, length: int) -> torch.Tensor:
        """(rank, 1): what makes the sum of a slot that a text fills only in part the mean of that part."""
        edges = self._edges()
        whole = edges[1:] - edges[:-1]
        here = torch.minimum(whole, length - edges[:-1])
        return torch.where(here > 0, whole / here.clamp(min=1), 1.0).unsqueeze(1)

    def forward(self, query, key, value, scaling, dropout=0.0) -> torch.Tensor:
        length = key.shape[2]
        if length > self.max_length:
            raise ValueError(f"{length} tokens: this Linformer takes {self.max_length} at most (linformer.max_length).")
        by_key, by_value = (p[:, :, :length] for p in (self.key_projection, self.value_projection))
        if self.start == "mean" and length < self.max_length:
            shares = self._shares(length).to(by_key)
            by_key, by_value = by_key * shares, by_value * shares
        key, value = by_key.to(key.dtype) @ key, by_value.to(value.dtype) @ value
        mask = None
        # a graph cannot branch on it
        if self.start == "mean" and (is_tracing() or length < self.max_length):
            # by where slots begin, not by weights that are learned: one small step, and all would be attended to
            mask = (self._edges()[:-1] < length).to(key.device)[None, None, None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)


def own_length(config) -> int | None:
    """The longest input of a model by its config, the class token of images included; None where there is no limit."""
    if hasattr(config, "patch_size"):
        (height, width), (tall, wide) = as_pair(config.image_size), as_pair(config.patch_size)
        return (height // tall) * (width // wide) + 1
    return getattr(config, "max_position_embeddings", None)
