"""Linear attention: sum_j phi(q) . phi(k_j) v_j / sum_j phi(q) . phi(k_j), phi(x) = elu(x) + 1, in linear time.

Katharopoulos et al. 2020 (arXiv 2006.16236), sections 3.2 to 3.4. No matrix of scores is made, so attention dropout has
no place here, nor has anything that is added to scores.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F

from .kernel import Kernel

# tokens whose pairs are computed one by one in causal attention; what came before them is a sum
CHUNK = 128

Sums = tuple[torch.Tensor, torch.Tensor]


class LinearAttention(Kernel):
    """Attention whose similarity of a query and a key is a product of features: phi(q) . phi(k) (arXiv 2006.16236)."""

    causal: ClassVar[bool] = True
    cross: ClassVar[bool] = True

    def features(self, states: torch.Tensor, of_queries: bool) -> torch.Tensor:
        """phi, positive: (batch, heads, length, head_dim), scaled -> (batch, heads, length, features)."""
        return F.elu(states) + 1

    def forward(self, query, key, value, scaling, dropout=0.0) -> torch.Tensor:
        return self.with_sums(query, key, value, scaling)[0]

    def with_sums(self, query, key, value, scaling: float, sums: Sums | None = None) -> tuple[torch.Tensor, Sums]:
        """The outputs, and the sums of phi(k) v^T and of phi(k); `sums`: of the tokens before these, when causal.

        Features and sums are fp32 at least.
        """
        with torch.autocast(query.device.type, enabled=False):
            exact = torch.promote_types(query.dtype, torch.float32)
            query, key = (x.to(exact) * scaling**0.5 for x in (query, key))
            by_query, by_key, values = self.features(query, True), self.features(key, False), value.to(exact)
            attend = causal_sums if self.is_causal else all_sums
            output, sums = attend(by_query, by_key, values, sums)
        return output.to(value.dtype), sums


def all_sums(by_query, by_key, value, sums: Sums | None = None) -> tuple[torch.Tensor, Sums]:
    """Every query over all keys: two products. Shapes as in `causal_sums`."""
    products, total = by_key.transpose(2, 3) @ value, by_key.sum(2)
    return _divided(by_query @ products, (by_query @ total.unsqueeze(3))), (products, total)


def causal_sums(by_query, by_key, value, sums: Sums | None = None) -> tuple[torch.Tensor, Sums]:
    """Each query over the keys up to its own, and over those that went into `sums`.

    by_query, by_key: (batch, heads, length, features); value: (batch, heads, length, head_dim). Within a chunk by its
    pairs, before it by prefix sums over the chunks (section 3.3.1; FAVOR+, arXiv 2009.14794, appendix B.1).
    """
    length = value.shape[2]
    # of no tokens too, in the row of a batch that has none
    chunk = max(1, min(CHUNK, length))
    padding = -length % chunk
    q, k, v = (F.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, chunk)) for x in (by_query, by_key, value))
    products, totals = k.transpose(3, 4) @ v, k.sum(3)
    last = products.sum(2), totals.sum(2)
    # what came before each chunk; nothing is subtracted, so that what comes later cannot be felt
    before = F.pad(products.cumsum(2)[:, :, :-1], (0, 0, 0, 0, 1, 0)), F.pad(totals.cumsum(2)[:, :, :-1], (0, 0, 1, 0))
    if sums is not None:
        before = before[0] + sums[0].unsqueeze(2), before[1] + sums[1].unsqueeze(2)
        last = last[0] + sums[0], last[1] + sums[1]
    pairs = (q @ k.transpose(3, 4)).tril()
    numerator = q @ before[0] + pairs @ v
    denominator = (q @ before[1].unsqueeze(4)) + pairs.sum(4, keepdim=True)
    return _divided(numerator, denominator).flatten(2, 3)[:, :, :length], last


def _divided(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """0 where next to nothing is similar, which only underflow can bring about: its gradient would overflow."""
    similar = denominator > 1e-30
    return torch.where(similar, numerator / torch.where(similar, denominator, 1), 0)
