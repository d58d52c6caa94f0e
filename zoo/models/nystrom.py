"""Nyström attention: the matrix of softmax scores from a few of its rows and columns (Nyströmformer, arXiv 2102.03902).

softmax(q k^T) is taken to be softmax(q K^T) pinv(softmax(Q K^T)) softmax(Q k^T), where the rows of Q and K are
landmarks, means of neighbouring queries and keys (section 3.2, equation 13), and the pseudoinverse is iterated
(equation 11).
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .kernel import Kernel

ITERATIONS = 6


class Nystrom(Kernel):
    """Softmax attention by `landmarks` means of queries and of keys (Nyströmformer, arXiv 2102.03902, section 3).

    `convolution`: width of a depthwise convolution of the values that is added to the output (section 3.3), odd; none.
    A text of no more tokens than landmarks gets full attention. Attention dropout has no place in it.
    """

    def __init__(self, *place, landmarks: int = 64, convolution: int | None = None):
        super().__init__(*place)
        self.landmarks, self.width = landmarks, convolution
        if convolution is not None:
            self.convolution = nn.Parameter(torch.empty(self.heads, 1, convolution))

    @staticmethod
    def check(config, landmarks: int = 64, convolution: int | None = None) -> None:
        if type(landmarks) is not int or landmarks < 1:
            raise ValueError(f"attention_kwargs: nystrom.landmarks is a whole number of at least 1, not {landmarks!r}.")
        if convolution is not None and (type(convolution) is not int or convolution < 1 or convolution % 2 == 0):
            raise ValueError(f"attention_kwargs: nystrom.convolution is an odd number of tokens, not {convolution!r}.")

    def initialise(self) -> None:
        if self.width is not None:
            init.zeros_(self.convolution)

    def forward(self, query, key, value, scaling, dropout=0.0) -> torch.Tensor:
        with torch.autocast(query.device.type, enabled=False):
            exact = torch.promote_types(query.dtype, torch.float32)
            q, k, v = query.to(exact) * scaling, key.to(exact), value.to(exact)
            if q.shape[2] <= self.landmarks:
                output = F.scaled_dot_product_attention(q, k, v, scale=1.0)
            else:
                output = self._by_landmarks(q, k, v)
            if self.width is not None:
                output = output + self._convolved(v)
        return output.to(value.dtype)

    def _by_landmarks(self, q, k, v) -> torch.Tensor:
        length = q.shape[2]
        # contiguous shares of the text, which differ by one token at most: (landmarks, length)
        share = torch.arange(length, device=q.device) * self.landmarks // length
        means = F.one_hot(share, self.landmarks).T.to(q)
        means = means / means.sum(1, keepdim=True)
        of_queries, of_keys = means @ q, means @ k
        between = torch.softmax(of_queries @ of_keys.transpose(2, 3), -1)
        seen = torch.softmax(of_queries @ k.transpose(2, 3), -1) @ v
        return torch.softmax(q @ of_keys.transpose(2, 3), -1) @ (pseudoinverse(between) @ seen)

    def _convolved(self, v: torch.Tensor) -> torch.Tensor:
        """A filter along the text for each head, the same for all its features."""
        by_feature = v.permute(0, 3, 1, 2).flatten(0, 1)
        weight = self.convolution.to(v.dtype)
        filtered = F.conv1d(by_feature, weight, padding=self.convolution.shape[2] // 2, groups=self.heads)
        return filtered.unflatten(0, (v.shape[0], v.shape[3])).permute(0, 2, 3, 1)


def pseudoinverse(matrix: torch.Tensor, iterations: int = ITERATIONS) -> torch.Tensor:
    """Of square matrices (..., n, n), by products alone (Razavi et al. 2014; arXiv 2102.03902, equation 11)."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    norms = matrix.abs().sum(-1).amax((-1), keepdim=True) * matrix.abs().sum(-2).amax(-1, keepdim=True)
    inverse = matrix.transpose(-1, -2) / norms.unsqueeze(-1)
    for _ in range(iterations):
        product = matrix @ inverse
        inner = 7 * identity - product
        inverse = inverse @ (13 * identity - product @ (15 * identity - product @ inner)) / 4
    return inverse
