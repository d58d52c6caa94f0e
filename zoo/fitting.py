"""A model made to fit what it is given: rows for new tokens, positions for images of another size, how it generates."""

import copy
import inspect
from typing import Any

import torch
from transformers import BaseImageProcessor, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from zoo.errors import UserError, in_a_line
from zoo.models.linformer import Linformer
from zoo.models.patches import as_pair, resize_positions
from zoo.models.pretrained import ZooPreTrainedModel


@torch.no_grad()
def _at_the_mean(model: PreTrainedModel, known: int) -> None:
    """The rows behind `known` of both tables: the library would draw them near it, others each time it is opened."""
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        for name in ("weight", "bias"):
            rows: torch.Tensor | None = getattr(table, name, None)
            if rows is not None:
                rows[known:] = rows[:known].mean(0)


def fit_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Embeddings for tokens that the checkpoint has not seen, at the mean of all others; what pads, in the config."""
    wanted = max(tokenizer.get_vocab().values()) + 1
    there: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[index, assignment]
    if wanted > there:
        tied = _is_tied(model)
        # the output layer grows with it (Hewitt 2021: the mean leaves the distribution as it was)
        model.resize_token_embeddings(wanted, mean_resizing=False)
        _at_the_mean(model, there)
        if _is_tied(model) != tied:
            # what the official T5 does to a head of v1.1
            raise UserError(
                "model.added_tokens: the official class would lose its output layer; use implementation: native"
            )
        print(f"model: {wanted - there} tokens beyond its vocabulary of {there:,}: embedded at the mean of the others")
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    # another family's tokenizer may make inputs, such as segments, that this model does not have
    read = inspect.signature(model.forward).parameters
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in read]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # what is saved


def _is_tied(model: PreTrainedModel) -> bool:
    """Whether the output layer is the embeddings themselves."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def fit_images(
    model: PreTrainedModel, processor: PreTrainedTokenizerBase | BaseImageProcessor, side: int | None
) -> None:
    """Images and positions of `side` x `side` pixels, where a recipe says so; a model that has no size takes any.

    Positions between the trained ones are interpolated, and stay so: the model then is one of the new size.
    Raises UserError for sizes that the model cannot have.
    """
    if isinstance(processor, PreTrainedTokenizerBase):
        return
    own, patch = (getattr(model.config, name, None) for name in ("image_size", "patch_size"))
    if own is not None and patch is not None:
        size, patches = as_pair(side or own), as_pair(patch)
        if any(pixels % one for pixels, one in zip(size, patches, strict=True)):
            raise UserError(
                f"task.image_size: {size[0]} x {size[1]} pixels are no whole number of patches of {patches[0]} x "
                f"{patches[1]} (model.config.patch_size); give a multiple"
            )
        if size != as_pair(own):
            tokens = size[0] // patches[0] * (size[1] // patches[1]) + 1
            if any(isinstance(module, Linformer) for module in model.modules()) and not _own_length(model.config):
                raise UserError(
                    "task.image_size: the projections of linformer are as long as the model's own images; give "
                    f"model.attention_kwargs.linformer.max_length: {tokens}"
                )
            if not isinstance(model, ZooPreTrainedModel):
                raise UserError("task.image_size: official classes keep the size they have; use implementation: native")
            resize_positions(model, size)
    elif side is not None or own is not None:
        size = as_pair(side or own)
    else:
        return
    sizes = {"height": size[0], "width": size[1]}
    processor.size = sizes  # type: ignore[attr-defined]
    if getattr(processor, "do_center_crop", False):
        processor.crop_size = sizes  # type: ignore[attr-defined]


def _own_length(config) -> int | None:
    return config.attention_kwargs["linformer"].get("max_length")


def set_generation(model: PreTrainedModel, defaults: dict[str, Any], settings: dict[str, Any]) -> GenerationConfig:
    """Lays the recipe's `generate` section over the model's own generation config. Returns a copy to save with it: in
    the model's own, generating writes all that it did not say. Raises UserError."""
    if "max_length" in settings:
        defaults = {key: value for key, value in defaults.items() if key != "max_new_tokens"}
    chosen = {"_from_model_config": False, **defaults, **settings}
    config = model.generation_config
    if config is None:
        raise UserError(f"model: {type(model).__name__} generates nothing")
    try:
        config.update(**chosen)
        config.validate(strict=True)
    except (ValueError, TypeError) as error:
        raise UserError(f"generate: {in_a_line(error)}") from error
    return copy.deepcopy(config)
