"""The config of a model that is trained from random weights: of a published size, or of any model type."""

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, BaseImageProcessor, PreTrainedConfig, PreTrainedTokenizerBase

from zoo.errors import UserError, did_you_mean
from zoo.models import FAMILIES
from zoo.sections import ATTENTION_FIELDS, ModelSection
from zoo.sizes import SIZES

# a size's own value goes with that of another field: where that is changed, it means nothing
BELONGS_TO = {"num_labels": "id2label", "attention_kwargs": "attention"}
SPECIAL = ("pad", "bos", "eos", "sep", "cls")


def recipe_config(
    section: ModelSection, changes: dict[str, Any], processor: PreTrainedTokenizerBase | BaseImageProcessor | None
) -> PreTrainedConfig:
    """The config of `model.size` or `model.config.model_type`, with `changes` to its fields.

    Of a tokenizer it takes the vocabulary and the special tokens, where `changes` do not say. Raises UserError.
    """
    changes = dict(changes)
    name = section.size or str(changes.pop("model_type"))
    if section.size is not None and section.size not in SIZES:
        near = did_you_mean(section.size, SIZES) or "; zoo ls models shows all"
        raise UserError(f"model.size: {section.size}: there is no such size{near}")
    taken = _of_tokenizer(processor) if isinstance(processor, PreTrainedTokenizerBase) else {}
    known = known_fields(config_class(name, section.implementation == "native"))
    taken = {field: value for field, value in taken.items() if field in known}
    return fresh_config(name, section.implementation == "native", **{**taken, **changes})


def fresh_config(name: str, native: bool = True, **changes: Any) -> PreTrainedConfig:
    """The native config, or the official one, of a size of `SIZES` or a model type, with `changes` to its fields.

    Raises UserError for a name that there is not, a field that its config has not, and a value that it refuses.
    """
    made = config_class(name, native)
    known = known_fields(made)
    for field in changes:
        if field not in known:
            where = "model" if field in ATTENTION_FIELDS else "model.config"
            raise UserError(f"{where}.{field}: {made.__name__} has no such field{did_you_mean(field, known)}")
    fields = {field: value for field, value in _own(name).items() if BELONGS_TO.get(field) not in changes}
    if not native and "attention" in fields:
        raise UserError(f"model.size: {name}: official classes know full attention only; use implementation: native")
    try:
        return made(**{**fields, **changes})
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UserError(f"model {name}: its config is refused: {' '.join(str(error).split())}") from error


def _own(name: str) -> dict[str, Any]:
    return SIZES[name][1] if name in SIZES else {}


def config_class(name: str, native: bool) -> type[PreTrainedConfig]:
    model_type = SIZES[name][0] if name in SIZES else name
    if native:
        family = model_type.removeprefix("zoo_")
        if family not in FAMILIES:
            near = did_you_mean(name, [*SIZES, *FAMILIES]) or "; zoo ls models shows all"
            raise UserError(f"model {name}: no size or native family{near}; or use implementation: official")
        return FAMILIES[family][1].config_class
    try:
        return type(AutoConfig.for_model(model_type))
    except ValueError as error:
        raise UserError(f"model.config.model_type: {name}: transformers has no such model type") from error


def known_fields(of: type[PreTrainedConfig]) -> set[str]:
    made = of()
    # transformers writes a decoder's first token only where there is one
    decoder = {"decoder_start_token_id"} if made.is_encoder_decoder else set()
    # T5's of its own, which are not written where they are not set
    attentions = {field for field in ATTENTION_FIELDS if hasattr(of, field)}
    return {*made.to_dict(), *of.attribute_map, "num_labels", *decoder, *attentions}


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Vocabulary and special tokens; a text begins with its class token, and ends with its separator, where there are
    no others for it."""
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in SPECIAL}
    ids["bos_token_id"] = ids["cls_token_id"] if ids["bos_token_id"] is None else ids["bos_token_id"]
    ids["eos_token_id"] = ids["sep_token_id"] if ids["eos_token_id"] is None else ids["eos_token_id"]
    # T5's decoder begins with padding (arXiv 1910.10683, section 2.1)
    return {"vocab_size": len(tokenizer), "decoder_start_token_id": ids["pad_token_id"], **ids}
