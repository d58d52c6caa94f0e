"""Dropout with cheap random masks on CPU.

torch draws one 53-bit number per element on CPU; a mask needs far less. Here 16 bits decide an element, four of them
come from one draw of torch's own generator, and outputs are scaled by the keep rate that 16 bits really give.
"""

import torch
from torch import nn
from transformers.utils.import_utils import is_tracing

LEVELS = 1 << 16


def dropped_levels(p: float) -> int:
    """How many of the 65,536 levels of a 16-bit draw mean "dropped"; one at least is kept."""
    return min(round(p * LEVELS), LEVELS - 1)


def random_levels(count: int) -> torch.Tensor:
    """(count,) int16, uniform over all 65,536 values, from torch's default CPU generator."""
    # the range is given in full: random_() alone never sets the top bit, which would bias every fourth value
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return words.view(torch.int16)[:count]


def drop_below(p: float) -> int:
    """The threshold t for which `random_levels(n) < t` drops a share p."""
    return dropped_levels(p) - LEVELS // 2


def keep_rate(p: float) -> float:
    return 1.0 - dropped_levels(p) / LEVELS


def keep_mask(like: torch.Tensor, p: float) -> torch.Tensor:
    """A mask to multiply by: 0 where dropped, 1 / keep rate where kept."""
    kept = random_levels(like.numel()) >= drop_below(p)
    return kept.view(like.shape).to(like.dtype).mul_(1.0 / keep_rate(p))


class Dropout(nn.Dropout):
    """`nn.Dropout`, equal in distribution; on CPU its mask costs a fifth."""

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
