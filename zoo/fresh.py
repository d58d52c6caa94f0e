"""The config of a model that is trained from random weights: of a published size, or of any model type."""

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, BaseImageProcessor, PreTrainedConfig, PreTrainedTokenizerBase

from zoo.errors import UserError, did_you_mean
from zoo.recipe import ModelSection
from zoo.sizes import SIZES

# a size's own value goes with that of another field: where that is changed, it means nothing
BELONGS_TO = {"num_labels": "id2label", "attention_kwargs": "attention"}
SPECIAL = ("pad", "bos", "eos", "sep", "cls")


def fresh_config(
    section: ModelSection,
    changes: dict[str, Any],
    processor: PreTrainedTokenizerBase | BaseImageProcessor | None = None,
) -> PreTrainedConfig:
    """The config of `model.size` or `model.config.model_type`, with `changes` to its fields.

    processor: a tokenizer, whose vocabulary and special tokens it takes where `changes` do not say. Raises UserError
    for a name that there is not, a field that its config has not, and a value that it refuses.
    """
    from_size = section.size is not None
    where = f"model.size: {section.size}" if from_size else f"model.config.model_type: {changes['model_type']}"
    if from_size and section.size not in SIZES:
        near = did_you_mean(section.size, SIZES) or "; zoo ls models shows all"
        raise UserError(f"{where}: there is no such size{near}")
    model_type, fields = SIZES[str(section.size)] if from_size else (str(changes["model_type"]), {})
    changes = {field: value for field, value in changes.items() if field != "model_type"}
    config_class = _config_class(section, where, model_type)
    known = {*config_class().to_dict(), *config_class.attribute_map, "num_labels"}
    for field in section.config.keys() - {"model_type"}:
        if field not in known:
            near = did_you_mean(field, known)
            raise UserError(f"model.config.{field}: {config_class.__name__} has no such field{near}")
    kept = {field: value for field, value in fields.items() if BELONGS_TO.get(field) not in changes}
    taken = _of_tokenizer(processor) if isinstance(processor, PreTrainedTokenizerBase) else {}
    taken = {field: value for field, value in taken.items() if field in known}
    try:
        return config_class(**{**kept, **taken, **changes})
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UserError(f"{where}: its config is refused: {' '.join(str(error).split())}") from error


def _config_class(section: ModelSection, where: str, model_type: str) -> type[PreTrainedConfig]:
    from zoo.models import FAMILIES

    if section.implementation == "native":
        family = model_type.removeprefix("zoo_")
        if family not in FAMILIES:
            raise UserError(f"{where}: no native class, only for {', '.join(FAMILIES)}; use implementation: official")
        return FAMILIES[family][1].config_class
    try:
        return type(AutoConfig.for_model(model_type))
    except ValueError as error:
        raise UserError(f"{where}: transformers has no such model type") from error


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Vocabulary and special tokens; a text begins with its class token, and ends with its separator, where there are
    no others for it."""
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in SPECIAL}
    ids["bos_token_id"] = ids["cls_token_id"] if ids["bos_token_id"] is None else ids["bos_token_id"]
    ids["eos_token_id"] = ids["sep_token_id"] if ids["eos_token_id"] is None else ids["eos_token_id"]
    # T5's decoder begins with padding (arXiv 1910.10683, section 2.1)
    return {"vocab_size": len(tokenizer), "decoder_start_token_id": ids["pad_token_id"], **ids}
