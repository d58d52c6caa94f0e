"""What the sizes of `SIZES` cost, counted on models without memory (the meta device).

`python -m zoo.size_counts` writes sizes.json beside this file, which `zoo ls models` reads without torch.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from zoo.files import write_json
from zoo.fresh import fresh_config
from zoo.models import FAMILIES
from zoo.models.spec import BlockSpec
from zoo.models.t5_stack import block_spec as t5_spec
from zoo.sizes import SIZES

# the head that a size is published with: the first of these that the family has
USUAL_HEADS = (
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageClassification",
    "AutoModelForCausalLM",
)
# weight, gradient and Adam's two moments in fp32; or, in mixed precision, 2 + 2 and a copy and the moments in fp32
TRAIN_BYTES, SERVE_BYTES = 16, 4
# what T5 was trained on; its positions have no end
T5_LENGTH = 512


def counted(name: str) -> dict[str, int]:
    """A size with its usual head: parameters, `flops_per_token`, bytes.

    train_bytes: weights, gradients and Adam's moments, 16 a parameter; activations are not among them. serve_bytes:
    weights in fp32. cache_bytes_per_token: keys and values of a decoder at 16 bits; 0 of an encoder. Of T5 they are
    those of a token it writes; one it reads leaves as many, for the cross-attention.
    """
    model = on_meta(name)
    parameters = model.num_parameters()
    cached = [spec.cache_bytes_per_token() for spec in layers(model.config) if spec.causal]
    return {
        "parameters": parameters,
        "flops_per_token": flops_per_token(model),
        "train_bytes": TRAIN_BYTES * parameters,
        "serve_bytes": SERVE_BYTES * parameters,
        "cache_bytes_per_token": sum(cached),
    }


def on_meta(name: str, **changes: Any) -> PreTrainedModel:
    """The model of a size, with its usual head."""
    config = fresh_config(name, **changes)
    module, base, _ = FAMILIES[SIZES[name][0]]
    head = next(base.auto_map[auto] for auto in USUAL_HEADS if auto in base.auto_map)
    with torch.device("meta"):
        return getattr(module, head.rpartition(".")[2])(config)


def flops_per_token(model: PreTrainedModel) -> int:
    """Those of a forward pass over one text, or image, of the greatest length, divided by its tokens.

    Counted are the matrix products, a multiply-add as 2: each linear layer as often as it is met (ALBERT's one block
    in all of its layers, an output layer that is tied to the embeddings too, ViT's classifier once an image), ViT's
    patches, and in attention scores and weighted sums over all keys, those that a causal or a local mask hides
    included, as masked attention computes them. Looking up embeddings, biases, norms, activations, softmax and T5's
    position bias are not counted. T5 reads 512 tokens and writes as many: its products are divided by all 1,024.
    """
    config = model.config
    length, specs = max_length(config), layers(config)
    flops = sum(length * spec.flops_per_token(length, encoder_length=length) for spec in specs)
    flops += sum(2 * weights * tokens for weights, tokens in _around_the_blocks(model, length))
    return flops // (2 * length if config.is_encoder_decoder else length)


def _around_the_blocks(model: PreTrainedModel, length: int) -> Iterator[tuple[int, int]]:
    """(weights, tokens that meet them) of each linear layer outside the blocks."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            # all but the class token were patches
            yield module.weight.numel(), length - 1
        elif isinstance(module, nn.Linear) and "layers." not in name:
            yield module.weight.numel(), 1 if model.main_input_name == "pixel_values" else length


def max_length(config: PreTrainedConfig) -> int:
    """Tokens of the longest text, or of an image with its class token."""
    family = config.model_type.removeprefix("zoo_")
    if family == "t5":
        return T5_LENGTH
    if family == "vit":
        return (config.image_size // config.patch_size) ** 2 + 1
    # RoBERTa counts from behind the padding id
    skipped = config.pad_token_id + 1 if family == "roberta" else 0
    return config.max_position_embeddings - skipped


def layers(config: PreTrainedConfig) -> list[BlockSpec]:
    """Of each layer in the order in which they run, T5's decoder behind its encoder."""
    family = config.model_type.removeprefix("zoo_")
    if family == "t5":
        encoder = t5_spec(config)  # type: ignore[arg-type]
        decoder = replace(encoder, causal=True, cross_attention=True)
        return [encoder] * config.num_layers + [decoder] * config.num_decoder_layers
    block_spec = FAMILIES[family][0].block_spec
    if family == "gpt2":
        return [block_spec(config, index) for index in range(config.n_layer)]
    return [block_spec(config)] * config.num_hidden_layers


if __name__ == "__main__":
    write_json(Path(__file__).with_name("sizes.json"), {name: counted(name) for name in SIZES})
