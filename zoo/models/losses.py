"""Cross entropy from hidden states that never builds the whole (tokens, vocabulary) logits.

Rows are taken a few at a time: logits, softmax and both gradients of a chunk are made in the forward pass and the
logits forgotten (the idea of Liger Kernel, arXiv 2410.10989, section 3.2).
"""

import torch
import torch.nn.functional as F
from torch import nn

from .linear import is_plain, product

CHUNK_ROWS = 256
# of a chunk's logits on an accelerator, which wants larger pieces: a quarter of a GB in fp32; but of no more rows, as
# their gradients, not yet divided, add up in fp16
CHUNK_ELEMENTS, MAX_CHUNK_ROWS = 2**26, 2048
IGNORED = -100


def _chunk_rows(device: torch.device, vocabulary: int) -> int:
    if device.type == "cpu":
        return CHUNK_ROWS
    return min(max(CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary), MAX_CHUNK_ROWS)


class _LinearCrossEntropy(torch.autograd.Function):
    """dtype: that of the matrix products; sums over rows, and the gradient of the weights, are in fp32 at least."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, dtype):
        exact = torch.promote_types(dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=exact) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and ctx.needs_input_grad[2] else None
        low_weight, low_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        total = hidden.new_zeros((), dtype=exact)
        step = _chunk_rows(hidden.device, len(weight))
        for start in range(0, len(labels), step):
            rows = slice(start, start + step)
            inputs, wanted = hidden[rows].to(dtype), labels[rows].unsqueeze(1)
            logits = product(inputs, low_weight, low_bias).to(exact)
            largest, chosen = logits.amax(-1, keepdim=True), logits.gather(1, wanted)
            # softmax minus one-hot, where the logits were: these pass through memory as rarely as they can
            grad = torch.softmax(logits, -1, out=logits)
            # the largest probability is at least 1 / vocabulary, so that its logarithm gives the norm exactly
            total += (largest - grad.amax(-1, keepdim=True).log_() - chosen).sum()
            grad.scatter_add_(1, wanted, grad.new_full(wanted.shape, -1.0))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(dtype)
            grad_hidden[rows] = product(grad, low_weight.t())
            if grad_weight is not None and dtype == exact:
                grad_weight.addmm_(grad.t(), inputs)
            elif grad_weight is not None:
                grad_weight += grad.t() @ inputs
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx, grad):
        # divided, or scaled for fp16, in the precision of the loss: sums, and factors, may be more than fp16 holds
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if x is None else (x.to(grad.dtype) * grad).to(dtype) for x, dtype in pairs), None, None


def linear_cross_entropy(hidden, head: nn.Module, labels, num_items: torch.Tensor | int | None = None) -> torch.Tensor:
    """Cross entropy of `head(hidden)` against `labels`; rows labelled -100 are left out.

    hidden: (rows, hidden); labels: (rows,). The mean over the labelled rows, or their sum over `num_items`, the count
    of a whole accumulated batch. A head that is more than a plain linear layer (adapters, quantised, hooked, patched)
    is called as it is, and its logits are built.
    """
    labelled = labels != IGNORED
    hidden, labels = hidden[labelled], labels[labelled]
    if is_plain(head):
        device, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            total = _LinearCrossEntropy.apply(hidden, head.weight, head.bias, labels, dtype)
    else:
        logits = head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(logits, labels, reduction="sum")
    # no labelled row gives 0 / 0 = nan, as torch's mean does
    return total / (len(labels) if num_items is None else num_items)
