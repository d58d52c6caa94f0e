"""Dropout with cheap random masks on CPU.

torch draws one 53-bit number per element on CPU; a mask needs far less. Here one draw of torch's own generator gives
the bytes of eight elements. A byte can only drop a multiple of 1/256; the small rest of the rate is dropped by Poisson
thinning, so that each element is dropped with probability p, independently of all others.
"""

import math

import torch
from torch import nn
from transformers.utils.import_utils import is_tracing

LEVELS = 256


def random_bytes(count: int) -> torch.Tensor:
    """(count,) uint8, uniform, from torch's default CPU generator."""
    # the range is given in full: random_() alone never sets the top bit, which would bias every eighth byte
    words = torch.empty((count + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    return words.view(torch.uint8)[:count]


def thinning_rate(p: float) -> float:
    """Hits an element that turn a share of floor(256 p) / 256 dropped into p, when an element hit is dropped."""
    return math.log((1.0 - math.floor(p * LEVELS) / LEVELS) / (1.0 - p))


def keep_scale(p: float) -> float:
    """What is kept is multiplied by 1 / (1 - p), so that the mean stays."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def random_keep(count: int, p: float) -> torch.Tensor:
    """(count,) bool, each False with probability p."""
    if p >= 1.0:
        return torch.zeros(count, dtype=torch.bool)
    kept = random_bytes(count) >= math.floor(p * LEVELS)
    # a Poisson number of hits, each on a random element, falls on the elements as independent Poisson numbers
    hits = int(torch.poisson(torch.tensor(count * thinning_rate(p), dtype=torch.float64)))
    return kept.index_fill_(0, torch.randint(max(count, 1), (hits,)), False)


def keep_mask(like: torch.Tensor, p: float) -> torch.Tensor:
    """A mask to multiply by: 0 where dropped, 1 / (1 - p) where kept."""
    return random_keep(like.numel(), p).view(like.shape).to(like.dtype).mul_(keep_scale(p))


class Dropout(nn.Dropout):
    """`nn.Dropout`, equal in distribution; on CPU its mask costs a tenth."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self._is_cheap(hidden_states):
            return hidden_states * keep_mask(hidden_states, self.p)
        return super().forward(hidden_states)

    def add_to(self, residual: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """residual + dropout(hidden_states), in one pass where the mask is ours."""
        if self._is_cheap(hidden_states) and residual.dtype == hidden_states.dtype:
            return torch.addcmul(residual, hidden_states, keep_mask(hidden_states, self.p))
        return residual + self(hidden_states)

    def _is_cheap(self, hidden_states: torch.Tensor) -> bool:
        wanted = self.training and 0.0 < self.p < 1.0
        return wanted and hidden_states.device.type == "cpu" and not is_tracing()
