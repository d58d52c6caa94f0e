"""A model and its processor from a recipe: native or official, its variant."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import cached_file

from zoo.errors import UserError, did_you_mean, in_a_line
from zoo.fitting import fit_tokens
from zoo.fresh import recipe_config
from zoo.hub_errors import hub_failure
from zoo.quantized import assert_kept, assert_near, fence, quantisation
from zoo.recipe_loading import shipped_recipes
from zoo.sections import ATTENTION_FIELDS, ModelSection, TokenizerSection
from zoo.sources import resolve
from zoo.weights import MASK_TOKEN, assert_same_weights, base_prefix, may_be_new

# what from_pretrained raises for files that are missing, damaged or of the wrong shape
_LOAD_ERRORS = (
    *(OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, EOFError),
    *(ArithmeticError, IndexError, AssertionError),
    *(SafetensorError, StrictDataclassError, pickle.UnpicklingError, httpx2.HTTPError),
)
Processor = PreTrainedTokenizerBase | BaseImageProcessor
_AGAIN = "try again: what has arrived is kept"


def load_processor(section: ModelSection, kind: str) -> Processor:
    """What makes a model's inputs: kind is "tokenizer" or "image_processor". Raises UserError."""
    path = section.path or section.tokenizer
    if isinstance(path, TokenizerSection):
        raise UserError("model.tokenizer: it is learned by zoo train and zoo tokenizer; name a directory here")
    if path is None and kind == "tokenizer":
        raise UserError("model.tokenizer: required, and not there: a model from random weights brings none")
    if path is None:
        return ViTImageProcessorPil()
    if kind == "image_processor" and section.tokenizer is not None:
        raise UserError("model.tokenizer: images have none; remove the key")
    _check_made(path)
    source = resolve(path, kind="model", revision=section.revision)
    auto = AutoTokenizer if kind == "tokenizer" else _auto_image_processor()
    try:
        processor = auto.from_pretrained(
            source.location, revision=source.revision or "main", trust_remote_code=section.trust_remote_code
        )
    except _LOAD_ERRORS as error:
        what = f"its {kind.replace('_', ' ')} cannot be read"
        raise _wants_trust(path, error) or _unreadable(path, what, error) from error
    if kind == "tokenizer":
        complete(processor, section.added_tokens)
    return processor


def complete(tokenizer: PreTrainedTokenizerBase, added: Sequence[str]) -> None:
    """The recipe's own tokens; and where there is no padding token, the one that ends a text, or an unknown one."""
    if added:
        known = len(tokenizer)
        tokenizer.add_tokens(list(added))
        # what the library returns counts those too that were there
        print(f"model.added_tokens: {len(tokenizer) - known} new ones")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is not None:
            print(f"the tokenizer has no padding token: {tokenizer.pad_token} pads, and is saved as such")


def _check_made(path: str) -> None:
    """Raises UserError for what a shipped recipe leaves, and has not left yet: a hub would be asked for it."""
    made = {f"runs/{name.replace('/', '-')}": name for name in shipped_recipes()}
    if path in made and not Path(path).exists():
        raise UserError(f"model {path}: not there; this makes it: zoo train {made[path]}")


def _auto_image_processor():
    # transformers puts another module in its own place when this one is imported: only where there are images
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    return AutoImageProcessor


def load_model(
    section: ModelSection,
    auto_class: str,
    labels: list[str] | None = None,
    problem_type: str | None = None,
    whole: bool = False,
    processor: Processor | None = None,
    quantize: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The recipe's model in fp32, with a head for `labels`; its weights are compared with the files.

    problem_type: of transformers' sequence classification, which decides the loss and what a pipeline applies. whole:
    the checkpoint is a finished model, so that nothing may be new, its head least of all. processor: a model from
    random weights takes its vocabulary and special tokens from it. quantize: a recipe's section, for its
    layers.

    Raises UserError where the recipe or the checkpoint is wrong, RunError if weights did not arrive.
    """
    changes = dict(section.config)
    if labels:
        changes |= {"id2label": dict(enumerate(labels)), "label2id": {name: n for n, name in enumerate(labels)}}
    if problem_type is not None:
        changes["problem_type"] = problem_type
    if section.attentions and section.implementation == "native":
        # a variant's checkpoint keeps its own attention unless the recipe names another
        changes |= {field: getattr(section, field) for field in section.attentions}
        changes["attention_kwargs"] = section.attention_kwargs
    if section.block is not None:
        changes["block"] = section.block.model_dump(exclude_none=True)
    model = _fresh(section, auto_class, changes, processor) if section.path is None else None
    model = model or _trained(section, section.path or "", auto_class, changes, whole, quantize)
    if section.implementation == "native":
        model.set_ragged(section.ragged)  # type: ignore[operator]
    if isinstance(processor, PreTrainedTokenizerBase):
        fit_tokens(model, processor)
    return model


def _trained(
    section: ModelSection,
    path: str,
    auto_class: str,
    changes: dict[str, Any],
    whole: bool,
    quantize: Mapping[str, Any] | None,
) -> PreTrainedModel:
    source = resolve(path, kind="model", revision=section.revision)
    location, revision = source.location, source.revision or "main"
    try:
        fields, _ = PreTrainedConfig.get_config_dict(location, revision=revision)
    except _LOAD_ERRORS as error:
        raise _unreadable(path, "no readable config.json", error) from error
    if not isinstance(fields, dict) or not fields.get("model_type"):
        raise UserError(f"model {path}: no readable config.json: it is missing, or names no model_type")
    model_type = fields.get("model_type")
    if section.implementation == "native":
        model_class = native_class(path, model_type, auto_class)
        config = _config(section, model_class.config_class, location, revision, changes)
    else:
        if str(model_type).startswith("zoo_"):
            raise UserError(f"model {path}: a native checkpoint ({model_type}); use implementation: native")
        config = _config(section, AutoConfig, location, revision, changes)
        model_class = _official_class(auto_class, config)
    arguments: dict[str, Any] = {"config": config, "revision": revision, "dtype": torch.float32}
    if section.attn_implementation is not None:
        arguments["attn_implementation"] = section.attn_implementation
    if section.implementation == "official":
        arguments["trust_remote_code"] = section.trust_remote_code
    quantised = bool(fields.get("quantization_config"))
    if quantize and (quantised or fields.get("int8")):
        raise UserError(f"model {path}: its weights are quantised already; remove the section quantize")
    if quantize:
        make = getattr(model_class, "from_config", None) or model_class._from_config
        arguments["quantization_config"] = quantisation(quantize, lambda: make(config))
    model = _open(path, model_class, location, arguments, whole)
    directory = _directory(location, revision) if source.kind == "hub" else Path(location)
    if quantize or quantised:
        fence(model)
    if quantize and "torchao" not in quantize:
        assert_near(model, directory)
    elif quantize or quantised:
        assert_kept(model, directory)
    else:
        assert_same_weights(model, directory)
    # an adapter is told by them apart from those of other weights
    model.weights_directory = directory  # type: ignore[assignment]
    return model


def _fresh(
    section: ModelSection, auto_class: str, changes: dict[str, Any], processor: Processor | None
) -> PreTrainedModel:
    """A model of the recipe's size, or model_type, with random weights."""
    config = recipe_config(section, changes, processor)
    if section.implementation == "native":
        model_class: Any = native_class(f"{config.model_type}", config.model_type, auto_class)
        make = model_class._from_config
    else:
        make = _official_class(auto_class, config).from_config
    chosen = {} if section.attn_implementation is None else {"attn_implementation": section.attn_implementation}
    try:
        return make(config, dtype=torch.float32, **chosen)
    except (ImportError, ValueError) as error:
        field = "attn_implementation" if chosen else "config"
        raise UserError(f"model.{field}: {in_a_line(error)}") from error


def _directory(repo: Path | str, revision: str) -> Path:
    """Where the files of a hub's model are that has just been opened."""
    config = cached_file(repo, "config.json", revision=revision, local_files_only=True)
    assert config is not None
    return Path(config).parent


def native_class(path: str, model_type: str | None, auto_class: str) -> type[PreTrainedModel]:
    """The class that an Auto class means for a model type. Raises UserError.

    path: of the checkpoint, for words.
    """
    from zoo.models import FAMILIES

    family = str(model_type).removeprefix("zoo_")
    if family not in FAMILIES:
        raise UserError(
            f"model {path}: no native class for the type {model_type!r}, only for {', '.join(FAMILIES)}; "
            "use implementation: official"
        )
    module, base, _ = FAMILIES[family]
    if auto_class not in base.auto_map:
        raise UserError(f"model {path}: the native {family} has no {auto_class}; use implementation: official")
    return getattr(module, base.auto_map[auto_class].rpartition(".")[2])


def _official_class(auto_class: str, config: PreTrainedConfig) -> Any:
    """The Auto class itself; for texts' encoders that the library has not listed there, such as MPNet, AutoModel."""
    named = getattr(transformers, auto_class)
    return AutoModel if named is AutoModelForTextEncoding and type(config) not in named._model_mapping else named


def _config(section: ModelSection, config_class, location, revision: str, changes: dict) -> PreTrainedConfig:
    given: dict[str, Any] = {"revision": revision}
    if section.implementation == "official":
        given["trust_remote_code"] = section.trust_remote_code
    try:
        config = config_class.from_pretrained(location, **given)
        known = set(config.to_dict()) | set(type(config).attribute_map)
        own = section.attentions if section.implementation == "native" else {}
        for key in (*section.config, *own):
            if key not in known and not hasattr(type(config), key):
                where = f"model.{key}" if key in own else f"model.config.{key}"
                raise UserError(f"{where}: {type(config).__name__} has no such field{did_you_mean(key, known)}")
        if own:
            changes = {**changes, "attention_kwargs": _parameters(section, config)}
        config = config_class.from_pretrained(location, **given, **changes)
        # the changes are set on a config that has been validated without them
        config.validate()
        return config
    except UserError:
        raise
    except _LOAD_ERRORS as error:
        raise _wants_trust(str(section.path), error) or UserError(
            f"model {section.path}: its config is refused: {in_a_line(error)}"
        ) from error


def _parameters(section: ModelSection, config) -> dict[str, dict]:
    """Of the variants that the recipe names, and of those that a checkpoint keeps, such as T5's of the other stack."""
    kept: set[str] = set()
    for field in ATTENTION_FIELDS:
        names = None if field in section.attentions else getattr(config, field, None)
        kept.update([names] if isinstance(names, str) else names or [])
    return {name: own for name, own in config.attention_kwargs.items() if name in kept} | section.attention_kwargs


def _wants_trust(path: str, error: BaseException) -> UserError | None:
    """Words where a checkpoint can be opened with its own code only, which nobody has allowed."""
    if "trust_remote_code=True" not in str(error):
        return None
    return UserError(
        f"model {path}: it opens with code of its own only; read that code, then allow it: model.trust_remote_code: "
        "true in a recipe, --trust-remote-code for a finished model"
    )


def _open(path: str, model_class, location, arguments: dict[str, Any], whole: bool) -> PreTrainedModel:
    try:
        model, info = model_class.from_pretrained(
            location, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    except _LOAD_ERRORS as error:
        if "attn_implementation" in arguments and isinstance(error, ImportError | ValueError):
            raise UserError(f"model.attn_implementation: {in_a_line(error)}") from error
        raise (
            _wants_trust(path, error)
            or hub_failure(f"model {path}", error, _AGAIN)
            or UserError(
                f"model {path}: its weights cannot be read: {in_a_line(error)}; fetch or copy the checkpoint again"
            )
        ) from error
    wrong = {
        "missing": [key for key in info["missing_keys"] if whole or not may_be_new(model, key)],
        "of another shape": [key for key, *_ in info["mismatched_keys"] if whole or not may_be_new(model, key)],
        "unexpected": [key for key in info["unexpected_keys"] if whole or _has_a_place(model, key)],
    }
    for kind, keys in wrong.items():
        if keys:
            listed = ", ".join(sorted(keys)[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise UserError(f"model {path}: {len(keys)} weights are {kind}: {listed}; is it a whole checkpoint?")
    # what an adapter has to keep, its base having none
    model.new_weights = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    return model


def _has_a_place(model: PreTrainedModel, key: str) -> bool:
    """Whether an unused weight of a checkpoint is of a part that the model has; another task's head is not."""
    if key.endswith(MASK_TOKEN):
        return False
    base = base_prefix(model)
    parts = {name.removeprefix(base).split(".")[0] for name in model.state_dict() if name.startswith(base)}
    return key.removeprefix(base).split(".")[0] in parts - {"pooler"}


def _unreadable(path: str, what: str, error: BaseException) -> Exception:
    return hub_failure(f"model {path}", error, _AGAIN) or UserError(f"model {path}: {what}: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
