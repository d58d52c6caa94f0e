"""Weights of 8 or 4 bits by bitsandbytes, as a recipe's section `quantize` says, with the library's faults fenced.

Only the layers of the stacks are quantised: embeddings, heads and poolers stay as they are.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from zoo.errors import RunError, UserError
from zoo.models.int8 import Int8Embedding, Int8Linear, in_stack
from zoo.weights import saved_tensors

# relative error, over a tensor, that no right quantisation has: rounding to 8 bits is off by about 0.01, to 4 by 0.1
HIGHEST_ERROR = {8: 0.05, 4: 0.2}
# of layers of 4 bits on a CPU the library asserts that outputs are a multiple of the one; where inputs are none of the
# other, which is its block, it loses a quarter of the weight without a word (bitsandbytes 0.50)
OUTPUTS, INPUTS = 32, 64
# how files of weights end
WEIGHT_BYTES = (".safetensors", ".bin")


def quantisation(section: Mapping[str, Any], make: Callable[[], PreTrainedModel]) -> Any:
    """The library's config, which skips what is outside the stacks. make: the model with weights of whatever value.

    section: of BitsAndBytesConfig, or `torchao` with the name of one of its configs. Raises UserError for what the
    library refuses.
    """
    if "torchao" in section:
        return _of_torchao(section["torchao"], make)
    try:
        config = BitsAndBytesConfig(**section)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"quantize: refused by transformers: {' '.join(str(error).split())[:300]}") from error
    if not (config.load_in_8bit or config.load_in_4bit):
        raise UserError("quantize: say load_in_8bit: true, or load_in_4bit: true")
    with torch.device("meta"):
        model = make()
    outside, odd = [], []
    for name, module in model.named_modules():
        if type(module) is not nn.Linear and not isinstance(module, Conv1D):
            continue
        if not in_stack(name):
            outside.append(name)
        elif config.load_in_4bit:
            outputs, inputs = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
            if outputs % OUTPUTS or inputs % INPUTS:
                odd.append(name)
    if odd:
        widths = f"inputs are no multiple of {INPUTS}, or outputs none of {OUTPUTS}"
        print(f"quantize: {len(odd)} layers stay as they are, whose {widths}: {odd[0]} ...")
    config.llm_int8_skip_modules = [*(config.llm_int8_skip_modules or ()), *outside, *odd]
    return config


def _of_torchao(name: str, make: Callable[[], PreTrainedModel]) -> TorchAoConfig:
    import torchao.quantization

    with torch.device("meta"):
        model = make()
    outside = [n for n, module in model.named_modules() if type(module) is nn.Linear and not in_stack(n)]
    if not any(type(module) is nn.Linear and in_stack(n) for n, module in model.named_modules()):
        raise UserError(f"quantize: torchao knows no layer of {type(model).__name__}; use dynamic-int8")
    return TorchAoConfig(getattr(torchao.quantization, name)(), modules_to_not_convert=outside)


def fence(model: PreTrainedModel) -> None:
    """Keeps 4-bit layers on CPUs with AVX512-BF16 from repacking their weights in the first evaluation.

    What is saved after that is damaged, and training fails, or goes on without gradients (bitsandbytes 0.50).
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_learns(model: PreTrainedModel, path: str | None) -> None:
    """Raises UserError for a model of `models/int8.py`."""
    if getattr(model.config, "int8", None):
        raise UserError(
            f"model.path: the weights in {path} are of 8 bits, which do not learn; name the run that they were made of"
        )


def int8_model(source: Any, way: str, largest: Mapping[str, torch.Tensor]) -> Any:
    """The same native model with layers of 8 bits. way: of `models/int8.py`; largest: of layers' input features."""
    config = copy.deepcopy(source.config)
    config.int8 = way
    model = type(source)._from_config(config, attn_implementation=source.config._attn_implementation)
    made = {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear | Int8Embedding)}
    parts = dict(source.named_modules())
    for name, module in made.items():
        if isinstance(module, Int8Linear):
            module.fill(parts[name], largest.get(name))
        else:
            module.fill(parts[name])
    own = {f"{name}.{key}" for name, module in made.items() for key in module.state_dict()}
    others = {key: value for key, value in source.state_dict().items() if key not in own}
    lost = set(model.load_state_dict(others, strict=False).missing_keys) - own
    if lost:
        raise RunError(f"quantize: {sorted(lost)[0]} has no weight; please report this")
    if source.can_generate():
        model.generation_config = source.generation_config
    model.set_ragged(source._ragged)
    return model.eval()


def quantised_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weights are quantised, by name."""
    import bitsandbytes

    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def restored(layer: Any) -> torch.Tensor:
    """The weight of a quantised layer in fp32, as its file has it: (outputs, inputs), of a Conv1D the other way."""
    import bitsandbytes

    weight = layer.weight
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        whole = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    else:
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        # int8 rows are multiples of their largest value / 127 (LLM.int8, arXiv 2208.07339, section 2.1)
        whole = weight.data.float() * scales.float()[:, None] / 127
    return whole.T if getattr(layer, "source_cls", None) is Conv1D else whole


def assert_near(model: PreTrainedModel, directory: Path) -> None:
    """Raises RunError unless every weight is that of the files: to rounding where it is quantised, exactly elsewhere.

    A layer of the stack at a time is restored, so that the whole model is never in memory at full width.
    """
    layers = quantised_layers(model)
    if not layers:
        raise UserError(f"quantize: no layer of {type(model).__name__} was quantised; remove the section")
    bits = 4 if getattr(model, "is_loaded_in_4bit", False) else 8
    files = dict(saved_tensors(directory))
    prefix, compared = f"{model.base_model_prefix}.", 0
    for state, touched in _parts(model, layers):
        for name, ours in revert_weight_conversion(model, state).items():
            saved = next((files[one] for one in (name, name.removeprefix(prefix), prefix + name) if one in files), None)
            if saved is None or saved.shape != ours.shape:
                continue
            difference = (saved.to(ours.dtype) - ours.detach().cpu()).norm() / saved.float().norm().clamp(min=1e-12)
            compared += 1
            if float(difference) > (HIGHEST_ERROR[bits] if touched and ours.ndim == 2 else 0.0):
                raise RunError(
                    f"{directory}: {name} is off by {float(difference):.2g} in the model; please report this"
                )
    if not compared:
        raise RunError(f"{directory}: no tensor was found again in the quantised model; please report this")


def assert_kept(model: PreTrainedModel, directory: Path) -> None:
    """Raises RunError unless what files of a quantised model hold at full width is what the model holds."""
    state, compared = model.state_dict(), 0
    for name, saved in saved_tensors(directory):
        ours = state.get(name)
        # torchao's weights are a type of tensor of its own
        if type(ours) is not torch.Tensor or not saved.is_floating_point():
            continue
        if saved.dtype != ours.dtype or saved.shape != ours.shape:
            continue
        compared += 1
        if not torch.equal(saved, ours.detach().cpu()):
            raise RunError(f"{directory}: {name} is another one in the model; please report this")
    if not compared:
        raise RunError(f"{directory}: no tensor was found again in the quantised model; please report this")


def _parts(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> Iterator[tuple[dict[str, torch.Tensor], bool]]:
    """State by the layer of the stack, and what is left; whether weights of it were quantised."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.named_parameters():
        parts = name.split(".")
        place = next((n for n, part in enumerate(parts) if part.isdigit()), None)
        group = "" if place is None else ".".join(parts[: place + 1])
        groups.setdefault(group, {})[name] = tensor
    for state in groups.values():
        touched = False
        for name in list(state):
            layer = layers.get(name.rpartition(".")[0])
            if layer is not None and name.endswith(".weight"):
                state[name], touched = restored(layer), True
        yield state, touched
