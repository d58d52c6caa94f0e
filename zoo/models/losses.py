"""Cross entropy from hidden states that never builds the whole (tokens, vocabulary) logits.

Rows are taken a few at a time: logits, softmax and both gradients of a chunk are made in the forward pass and the
logits forgotten (the idea of Liger Kernel, arXiv 2410.10989, section 3.2).
"""

import torch
import torch.nn.functional as F
from torch import nn

from .linear import is_plain, product

CHUNK_ROWS = 256
IGNORED = -100


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels):
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        # fp32 at least, whatever the hidden states are
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=exact)
        for start in range(0, len(labels), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits = product(hidden[rows], weight, bias).to(exact)
            wanted = labels[rows].unsqueeze(1)
            log_norm = logits.logsumexp(-1, keepdim=True)
            total += (log_norm - logits.gather(1, wanted)).sum()
            # softmax minus one-hot
            grad = logits.sub_(log_norm).exp_()
            grad.scatter_add_(1, wanted, grad.new_full(wanted.shape, -1.0))
            grad = grad.to(hidden.dtype)
            torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(grad.t(), hidden[rows])
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx, grad):
        return *(None if x is None else x * grad.to(x.dtype) for x in ctx.saved_tensors), None


def linear_cross_entropy(hidden, head: nn.Module, labels, num_items: torch.Tensor | int | None = None) -> torch.Tensor:
    """Cross entropy of `head(hidden)` against `labels`; rows labelled -100 are left out.

    hidden: (rows, hidden); labels: (rows,). The mean over the labelled rows, or their sum over `num_items`, the count
    of a whole accumulated batch. A head that is more than a plain linear layer (adapters, quantised, hooked, patched),
    and any under autocast, is called as it is, and its logits are built.
    """
    labelled = labels != IGNORED
    hidden, labels = hidden[labelled], labels[labelled]
    if is_plain(head) and not torch.is_autocast_enabled(hidden.device.type):
        total = _LinearCrossEntropy.apply(hidden, head.weight, head.bias, labels)
    else:
        logits = head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(logits, labels, reduction="sum")
    # no labelled row gives 0 / 0 = nan, as torch's mean does
    return total / (len(labels) if num_items is None else num_items)
