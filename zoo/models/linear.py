"""Linear layers by the faster of torch's two matrix libraries.

torch multiplies fp32 matrices on CPU by MKL. On AMD processors with AVX-512 its other library, oneDNN, is faster:
forward by about a tenth, gradients of the input by about a seventh; on older AMD processors it is slower.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers.utils.import_utils import is_tracing


def is_plain(layer: Any) -> TypeGuard[nn.Linear]:
    """Whether calling `layer` does no more than its weight and bias say."""
    # accelerate patches the forward of offloaded layers
    if type(layer) not in (nn.Linear, FastLinear) or "forward" in vars(layer):
        return False
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return not any(hooks)


@functools.cache
def onednn_is_faster() -> bool:
    cpu_info = Path("/proc/cpuinfo")
    faster = (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and cpu_info.exists()
        and "AuthenticAMD" in cpu_info.read_text()
    )
    if faster:
        bound_onednn_caches()
    return faster


def bound_onednn_caches() -> None:
    """Before oneDNN's first use: it and torch's layer above it keep what they prepared for the last 1,024 shapes each.

    That is a quarter of a megabyte and more a shape, and every packed batch has new ones: a process would grow by
    gigabytes. A step needs about a dozen.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "32")


def linear(layer: Callable[[torch.Tensor], torch.Tensor], hidden_states: torch.Tensor) -> torch.Tensor:
    """`layer(hidden_states)`; fp32 tokens (..., features) by oneDNN where that is faster."""
    if (
        hidden_states.dtype == torch.float32
        and hidden_states.device.type == "cpu"
        and not is_tracing()
        and onednn_is_faster()
        and is_plain(layer)
        and not torch.is_autocast_enabled("cpu")
    ):
        if hidden_states.ndim == 2:
            return _OneDnnLinear.apply(hidden_states, layer.weight, layer.bias)
        product = _OneDnnLinear.apply(hidden_states.flatten(0, -2), layer.weight, layer.bias)
        return product.view(*hidden_states.shape[:-1], -1)
    if type(layer) is FastLinear:
        return nn.functional.linear(hidden_states, layer.weight, layer.bias)
    return layer(hidden_states)


class FastLinear(nn.Linear):
    """A layer that others call as a module, such as the one within an adapter: by the faster library too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(self, x)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T + bias of matrices, by the faster library; for what needs no gradient."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or not onednn_is_faster():
        return nn.functional.linear(x, weight, bias)
    return _product(x, weight, bias)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        # of a frozen layer the input is needed no more
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wanted_x, wanted_weight, wanted_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.t(), None) if wanted_x else None,
            grad.t() @ x if wanted_weight else None,
            grad.sum(0) if wanted_bias else None,
        )
