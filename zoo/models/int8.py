"""Weights of 8 bits, and inputs rounded to 8 bits as they come: smaller, and on CPUs faster. Not for training.

A row of a weight is multiples of its largest value / 127 (absmax; LLM.int8, arXiv 2208.07339, section 2.1), so that no
weight moves by more than largest / 254. The inputs of a layer are rounded together, to 256 steps between their smallest
and largest. `smooth` first divides each input feature by a number of its own, which its column of the weight is
multiplied by, so that single large features leave steps for the others (SmoothQuant, arXiv 2211.10438, section 4).
"""

import warnings

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.import_utils import is_tracing

WAYS = ("dynamic", "smooth")
# engines of torch that multiply rows of bytes which have a scale each
_ENGINES = ("x86", "fbgemm", "onednn")


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) -> the same in int8, and (rows,) scales: weight = int8 x scale, off by half a scale at most."""
    weight = weight.detach().float()
    scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class Int8Linear(nn.Module):
    """x (..., in_features) -> (..., out_features). On other devices than CPUs it multiplies by the restored weight."""

    def __init__(self, in_features: int, out_features: int, bias: bool, smooth: bool):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = _frozen(torch.zeros(out_features, in_features, dtype=torch.int8))
        self.scale = _frozen(torch.ones(out_features))
        self.bias = _frozen(torch.zeros(out_features)) if bias else None
        # what inputs are multiplied by
        self.smooth = _frozen(torch.ones(in_features)) if smooth else None
        self._packed: torch.ScriptObject | None = None

    @torch.no_grad()
    def fill(self, layer: nn.Linear, largest: torch.Tensor | None = None) -> None:
        """Takes the weight of a layer. largest: (in_features,), of each input feature on some data."""
        weight = layer.weight.detach().float()
        if self.smooth is not None and largest is not None:
            # section 4.1, alpha = 0.5
            column = weight.abs().amax(0).clamp(min=1e-5)
            divisor = (largest.clamp(min=1e-5) / column).sqrt()
            self.smooth.copy_(1 / divisor)
            weight = weight * divisor
        for held, new in zip((self.weight, self.scale), rounded(weight), strict=True):
            held.copy_(new)
        if self.bias is not None:
            self.bias.copy_(layer.bias)
        self._packed = None

    def restored(self) -> torch.Tensor:
        """The weight in full, as it multiplies inputs that are not smoothed: (out_features, in_features)."""
        weight = self.weight.to(self.scale.dtype) * self.scale[:, None]
        return weight if self.smooth is None else weight * self.smooth

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("Weights of 8 bits do not learn: train the model that they were made from.")
        if x.device.type != "cpu" or x.dtype != torch.float32 or is_tracing() or not _has_engine():
            return F.linear(x, self.restored().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        if self.smooth is not None:
            x = x * self.smooth
        if self._packed is None:
            self._packed = _pack(self.weight, self.scale, self.bias)
        # without the instructions for it a sum of two products of 8 bits has no room in 16
        return torch.ops.quantized.linear_dynamic(x, self._packed, not _has_vnni())

    def __getstate__(self):
        # made again where it is needed
        return self.__dict__ | {"_packed": None}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Int8Embedding(nn.Module):
    """ids -> (*, width), rows in the type of the scales."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = _frozen(torch.zeros(rows, width, dtype=torch.int8))
        self.scale = _frozen(torch.ones(rows))

    @torch.no_grad()
    def fill(self, table: nn.Embedding) -> None:
        for held, new in zip((self.weight, self.scale), rounded(table.weight), strict=True):
            held.copy_(new)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight) * F.embedding(ids, self.scale[:, None])


def in_stack(name: str) -> bool:
    """Whether a module of this name is in a numbered layer."""
    return any(part.isdigit() for part in name.split("."))


def use_int8(model: nn.Module, smooth: bool) -> dict[str, str]:
    """Puts layers of 8 bits, yet to be filled, in the place of the stacks', of the tokens' embeddings and of the layer
    that writes tokens. Returns what is tied besides the model's tied weights: their scales, target -> source.
    """
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    tied: dict[str, str] = getattr(model, "_tied_weights_keys", None) or {}
    for name, module in list(model.named_modules()):
        new: nn.Module | None = None
        if module is inputs and type(module) is nn.Embedding:
            new = Int8Embedding(*module.weight.shape)
        elif type(module) is nn.Linear and (module is outputs or in_stack(name)):
            # columns of what is a table of embeddings too are what they are
            smoothed = smooth and f"{name}.weight" not in tied
            new = Int8Linear(module.in_features, module.out_features, module.bias is not None, smoothed)
        if new is not None:
            _replace(model, module, new.to(module.weight.device))
    held = dict(model.named_modules())
    found = {}
    for target, source in tied.items():
        layer, place = target.removesuffix(".weight"), source.removesuffix(".weight")
        if isinstance(held.get(layer), Int8Linear | Int8Embedding) and isinstance(held.get(place), Int8Embedding):
            found[f"{layer}.scale"] = f"{place}.scale"
    return found


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Wherever it hangs: a table of embeddings may in several places."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)


def _has_engine() -> bool:
    return torch.backends.quantized.engine in _ENGINES


def _has_vnni() -> bool:
    return bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())


def _pack(weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.ScriptObject:
    """In the order in which torch's engine reads it: another copy, beside the one that is saved."""
    with warnings.catch_warnings():
        # quantised tensors are to leave torch; the engine has no other entrance yet
        warnings.filterwarnings("ignore", ".*quantized tensor creation functions.*")
        zeros = torch.zeros_like(scale, dtype=torch.long)
        rows = torch._make_per_channel_quantized_tensor(weight, scale.float(), zeros, 0)
    return torch.ops.quantized.linear_prepack(rows, bias)
