"""Adapters of peft on a model: what a recipe's section `lora` makes of it, and how a finished one is opened again.

An adapter belongs to one base, whose weights it does not hold: `base.json` beside it says which, with a hash of them.
"""

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import GENERATION_CONFIG_NAME

from zoo.adapter_types import ADAPTER_TYPES, BASE, DEFAULT_TYPE
from zoo.errors import UserError, did_you_mean
from zoo.files import write_json
from zoo.models.linear import FastLinear
from zoo.models.pretrained import ZooPreTrainedModel, is_standard
from zoo.sections import ModelSection
from zoo.weights import assert_same_adapter, saved_tensors

# what peft calls a task; of others it knows no head, and its form for questions (QUESTION_ANS) loses the segments that
# tell question and context apart
TASK_KINDS = {
    "text-classification": "SEQ_CLS", "token-classification": "TOKEN_CLS", "text-generation": "CAUSAL_LM",
    "instruction-tuning": "CAUSAL_LM", "summarization": "SEQ_2_SEQ_LM", "translation": "SEQ_2_SEQ_LM",
    "span-corruption": "SEQ_2_SEQ_LM", "sentence-similarity": "FEATURE_EXTRACTION",
}  # fmt: skip
# official classes of which peft has no targets of its own
OFFICIAL_TARGETS = {
    "lora": {"albert": ["query", "value"], "distilbert": ["q_lin", "v_lin"], "vit": ["q_proj", "v_proj"]},
    "ia3": {"albert": ["key", "value", "ffn_output"], "distilbert": ["k_lin", "v_lin", "lin2"],
            "vit": ["k_proj", "v_proj", "fc2"]},
}  # fmt: skip
# peft multiplies what goes into these, and what comes out of the others (IA3, arXiv 2205.05638, section 3.3)
FEED_FORWARD = ("fc2", "ffn_output", "lin2")
LAYERS = (nn.Linear, Conv1D, nn.Embedding, nn.Conv2d)


def adapt(model: PreTrainedModel, section: Mapping[str, Any], task: str) -> PeftModel:
    """The model with new adapters, all else frozen but what the checkpoint lacked, which is part of the adapter.

    section: a recipe's `lora`. Raises UserError for what this model, or the task, cannot be adapted by.
    """
    kind = section.get("type", DEFAULT_TYPE)
    # a key that is null is one that is not there, also where a recipe takes back what its base has said
    given = {key: value for key, value in section.items() if key != "type" and value is not None}
    prompts = ADAPTER_TYPES[kind].prompts
    if prompts:
        _check_prompts(model, kind, task)
    fields = (_of_prompts(model, kind, given) if prompts else _of_layers(model, kind)) | given
    # what the checkpoint lacked, such as the head of a new task, is learned whole and kept with the adapter
    saved = sorted({*(given.get("modules_to_save") or ()), *new_modules(model)})
    try:
        config = getattr(peft, ADAPTER_TYPES[kind].name)(
            **{**fields, "task_type": TASK_KINDS.get(task), "modules_to_save": saved or None}
        )
        if not prompts:
            _check_targets(model, config)
        with _quiet():
            adapted = get_peft_model(model, config)
        _finish(adapted)
    except (ValueError, TypeError, KeyError, ImportError, AttributeError, RuntimeError) as error:
        raise UserError(f"lora: refused by peft: {' '.join(str(error).split())[:300]}") from error
    return adapted


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning of a name that transformers has changed and peft has not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)
        yield


def learned(model: PeftModel) -> str:
    """What of a model learns, in words."""
    trained, whole = model.get_nb_trainable_parameters()
    share = f"{trained:,} of {whole:,} parameters ({100 * trained / whole:.2f} %)"
    names = sorted({name.rpartition(".")[2] for name in getattr(model.base_model, "targeted_module_names", ())})
    return f"lora: {share} learn" + (f", beside {', '.join(names)}" if names else "")


def new_modules(model: PreTrainedModel) -> set[str]:
    """Names of the modules that hold what the checkpoint lacked: a head, a pooler, a kernel's own parameters."""
    found, base = set(), f"{model.base_model_prefix}."
    for key in getattr(model, "new_weights", ()):
        inside = key.partition(".kernel.")
        if inside[1]:
            found.add(f"{inside[0]}.kernel")
        elif key.startswith(base):
            found.add(base + key.removeprefix(base).partition(".")[0])
        else:
            found.add(key.partition(".")[0])
    return found


def _of_layers(model: PreTrainedModel, kind: str) -> dict[str, Any]:
    """Which layers are adapted where a recipe names none."""
    if isinstance(model, ZooPreTrainedModel):
        targets = list(model.peft_targets[kind])
    else:
        targets = OFFICIAL_TARGETS[kind].get(model.config.model_type, [])
    if not targets:
        return {}  # peft's own
    within = [name for name in targets if name in FEED_FORWARD]
    return {"target_modules": targets} | ({"feedforward_modules": within} if kind == "ia3" else {})


def _of_prompts(model: PreTrainedModel, kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that peft does not find in every config."""
    config: Any = model.config
    embeddings: Any = model.get_input_embeddings()
    heads = config.num_attention_heads
    head_width = getattr(config, "d_kv", None) or config.hidden_size // heads
    heads = (getattr(config, "block", None) or {}).get("num_key_value_heads") or heads
    width = heads * head_width if kind == "prefix_tuning" else embeddings.weight.shape[1]
    fields = {"num_virtual_tokens": 20, "token_dim": width, "num_attention_heads": heads}
    fields |= {"num_layers": config.num_hidden_layers}
    if kind == "p_tuning" or given.get("prefix_projection"):
        fields["encoder_hidden_size"] = width
    return fields


def _check_prompts(model: PreTrainedModel, kind: str, task: str) -> None:
    if TASK_KINDS.get(task) in (None, "FEATURE_EXTRACTION"):
        raise UserError(f"lora.type: {kind} has no form for {task}; use lora or ia3")
    if kind != "prefix_tuning" and task == "token-classification":
        raise UserError(
            f"lora.type: {kind} puts tokens before the text, which peft does not count in the places of tags; use "
            "prefix_tuning, lora or ia3"
        )
    family, native = str(model.config.model_type).removeprefix("zoo_"), isinstance(model, ZooPreTrainedModel)
    if kind == "prefix_tuning" and (family == "albert" or (not native and family == "distilbert")):
        what = "runs one layer many times" if family == "albert" else "takes no keys in its official class"
        remedy = "lora or ia3" if family == "albert" else "implementation: native, lora or ia3"
        raise UserError(f"lora.type: {family} {what}, so there is no place for a prefix; use {remedy}")


def _check_targets(model: PreTrainedModel, config: Any) -> None:
    """Raises UserError for targets that match nothing, and for a rank that no layer has."""
    wanted = getattr(config, "target_modules", None)
    if wanted is None or wanted == "all-linear":
        return
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    names = [wanted] if isinstance(wanted, str) else sorted(wanted)
    for one in names:
        pattern = isinstance(wanted, str)
        try:
            found = [name for name in layers if _matches(one, name, pattern)]
        except re.error as error:
            raise UserError(f"lora.target_modules: {one!r} is no regular expression: {error}") from error
        if not found:
            there = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
            near = "" if pattern else did_you_mean(one, there)
            raise UserError(f"lora.target_modules: {one!r} matches no layer{near}; there are {', '.join(there)}")
        for name in found if isinstance(getattr(config, "r", None), int) else ():
            layer: Any = layers[name]
            # the weight of a quantised one has another shape
            sides = (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else layer.weight.shape[:2]
            if config.r > min(sides):
                raise UserError(
                    f"lora.r: {config.r} is more than the {min(sides)} of {name}, whose changes it spans "
                    "all by then; give less"
                )


def _matches(wanted: str, name: str, pattern: bool) -> bool:
    return bool(re.fullmatch(wanted, name)) if pattern else name == wanted or name.endswith(f".{wanted}")


# Kept and opened again


def save(model: PeftModel, section: ModelSection, directory: Path) -> None:
    """The adapter, the base's config with the task's labels, and which base it is of."""
    for config in model.peft_config.values():
        config.base_model_name_or_path, config.revision = section.path, section.revision
    base: Any = model.get_base_model()
    model.save_pretrained(str(directory))
    official = isinstance(base, ZooPreTrainedModel) and is_standard(base.config)
    (base.official_config() if official else base.config).save_pretrained(directory)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(directory)
    write_json(directory / BASE, {**_named(section), "sha256": base_hash(base)})
    assert_same_adapter(model, directory)


def open_adapter(base: PreTrainedModel | PeftModel, section: ModelSection, directory: Path, name: str) -> PeftModel:
    """The adapter in a finished directory, on its base and active, beside those that the base has already.

    Raises UserError where it is of another base.
    """
    plain: Any = base.get_base_model() if isinstance(base, PeftModel) else base
    try:
        record = json.loads((directory / BASE).read_text(encoding="utf-8"))
        wanted = record["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory / BASE}: cannot be read: {error}; the adapter's directory is damaged") from error
    if base_hash(plain) != wanted:
        raise UserError(
            f"{directory}: its adapter is of other weights than {section.path} has now (hashes differ); put the base "
            "back that it was trained on, or train anew"
        )
    try:
        with _quiet():
            if isinstance(base, PeftModel):
                model = base
                model.load_adapter(str(directory), name)
                model.set_adapter(name)
            else:
                model = PeftModel.from_pretrained(base, str(directory), name)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{directory}: its adapter does not fit {section.path}: {error}") from error
    _finish(model)
    assert_same_adapter(model, directory)
    return model


def _finish(model: Any) -> None:
    """What peft calls by itself, in our way."""
    # tokens that the base lacked are embedded alike whenever it is opened: no part of the adapter
    model.save_pretrained = partial(type(model).save_pretrained, model, save_embedding_layers=False)
    # layers within adapters of a native model: by the library that multiplies them outside too
    if isinstance(model.get_base_model(), ZooPreTrainedModel):
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = FastLinear


def activate(model: PeftModel, name: str, directory: Path, labels: list[str]) -> None:
    """Switches to an adapter that is open, with the labels and the way of generating of its directory."""
    model.set_adapter(name)
    model.eval()
    base: Any = model.get_base_model()
    base.config.id2label, base.config.label2id = dict(enumerate(labels)), {label: n for n, label in enumerate(labels)}
    if (directory / GENERATION_CONFIG_NAME).exists():
        base.generation_config = GenerationConfig.from_pretrained(directory)


def _named(section: ModelSection) -> dict[str, Any]:
    return {"path": section.path, "revision": section.revision, "implementation": section.implementation}


def base_hash(model: PreTrainedModel) -> str:
    """SHA-256 of the tensors in the files that a model was opened from, whatever their order and division."""
    found = []
    for name, tensor in saved_tensors(model.weights_directory):  # type: ignore[arg-type]
        one = hashlib.sha256(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        one.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        found.append(one.hexdigest())
    return hashlib.sha256("".join(sorted(found)).encode()).hexdigest()
