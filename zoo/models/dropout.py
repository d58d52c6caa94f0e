"""Dropout with cheap random masks on CPU.

torch draws one 53-bit number per element on CPU; a mask needs far less. Here 16 bits decide an element, four of them
come from one draw of torch's own generator, and outputs are scaled by the keep rate that 16 bits really give.
"""

import torch
from torch import nn
from transformers.utils.import_utils import is_tracing

LEVELS = 1 << 16


def dropped_levels(p: float) -> int:
    """How many of the 65,536 levels of a 16-bit draw mean "dropped"."""
    return round(p * LEVELS)


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


class _CheapDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, p):
        kept = (random_levels(hidden_states.numel()) >= drop_below(p)).view(hidden_states.shape)
        ctx.save_for_backward(kept)
        ctx.scale = 1.0 / keep_rate(p)
        return torch.ops.aten.native_dropout_backward(hidden_states, kept, ctx.scale)

    @staticmethod
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        # grad * kept * scale, which is also what the forward pass computes
        return torch.ops.aten.native_dropout_backward(grad, kept, ctx.scale), None


class Dropout(nn.Dropout):
    """`nn.Dropout`, equal in distribution; on CPU its mask costs a fifth."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        cheap = self.training and 0.0 < self.p < 1.0 and hidden_states.device.type == "cpu"
        if not cheap or is_tracing():
            return super().forward(hidden_states)
        return _CheapDropout.apply(hidden_states, self.p)
