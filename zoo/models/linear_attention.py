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
    pairs, before it by the sums of the chunks before (section 3.3.1; FAVOR+, arXiv 2009.14794, appendix B.1).
    """
    # a column of ones beside the values, whose output is the denominator
    value = F.pad(value, (0, 1), value=1.0)
    before = value.new_zeros(*by_key.shape[:2], by_key.shape[3], value.shape[3])
    if sums is not None:
        before = torch.cat((sums[0], sums[1].unsqueeze(3)), 3)
    output, last = _CausalSums.apply(by_query, by_key, value, before)
    return _divided(output[..., :-1], output[..., -1:]), (last[..., :-1], last[..., -1])


class _CausalSums(torch.autograd.Function):
    """o_i = q_i (S + sum_{j <= i} k_j v_j^T), and the whole sum; memory is that of the tokens, whatever the chunks.

    Of a chunk only its pairs and one sum are in memory, in the backward pass too, which makes the sums once more: those
    before a chunk for the gradient of its queries, and from the end those behind it for its keys and values (section
    3.3.1, equations 13 to 15).
    """

    @staticmethod
    def forward(ctx, query, key, value, before):
        ctx.save_for_backward(query, key, value, before)
        sums, outputs = before.clone(), []
        for q, k, v in _chunks(query, key, value):
            outputs.append(q @ sums + (q @ k.transpose(2, 3)).tril_() @ v)
            # nothing is subtracted, so that what comes later cannot be felt
            sums += k.transpose(2, 3) @ v
        return torch.cat(outputs, 2), sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_last):
        query, key, value, sums = ctx.saved_tensors
        by_query, by_key, by_value = [], [], []
        sums = sums.clone()
        for k, v, g in _chunks(key, value, grad):
            by_query.append(g @ sums.transpose(2, 3) + (g @ v.transpose(2, 3)).tril_() @ k)
            sums += k.transpose(2, 3) @ v
        # of the queries behind a chunk
        behind = grad_last.clone()
        for q, k, v, g in reversed(list(_chunks(query, key, value, grad))):
            by_key.append((g @ v.transpose(2, 3)).tril_().transpose(2, 3) @ q + v @ behind.transpose(2, 3))
            by_value.append((q @ k.transpose(2, 3)).tril_().transpose(2, 3) @ g + k @ behind)
            behind += q.transpose(2, 3) @ g
        return torch.cat(by_query, 2), torch.cat(by_key[::-1], 2), torch.cat(by_value[::-1], 2), behind


def _chunks(*tokens: torch.Tensor):
    """Of each of (batch, heads, length, *) the share of a chunk, chunk by chunk."""
    return zip(*(x.split(CHUNK, 2) for x in tokens), strict=True)


def _divided(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """0 where next to nothing is similar, which only underflow can bring about: its gradient would overflow."""
    similar = denominator > 1e-30
    return torch.where(similar, numerator / torch.where(similar, denominator, 1), 0)
