"""Taylor attention: exp(s) by 1 + s + s^2 / 2, in linear time (Based, Arora et al. 2024, arXiv 2402.18668, section 3).

The polynomial is ((1 + s)^2 + 1) / 2, never below 1/2, so no denominator is near zero. It is exp(s) but for
|s|^3 exp(|s|) / 6 at most: near for the scores of a new model, far for the large ones of a trained one.
"""

import torch

from .linear_attention import LinearAttention


class Taylor(LinearAttention):
    """Softmax attention whose exponential is its Taylor polynomial of degree 2 (Based, arXiv 2402.18668, section 3)."""

    def features(self, states: torch.Tensor, of_queries: bool) -> torch.Tensor:
        # (q k)^2 / 2: each square once, each other product of two features of a token for both of its orders
        rows, columns = torch.triu_indices(self.head_dim, self.head_dim, device=states.device)
        once = 1 - (1 - 0.5**0.5) * (rows == columns).to(states.dtype)
        ones = torch.ones_like(states[..., :1])
        return torch.cat((ones, states, states[..., rows] * states[..., columns] * once), -1)
