"""The proof that weights arrived: a model holds exactly the tensors of the files, bit by bit."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from zoo.errors import RunError

# what hides a patch, which only a model that learns to fill them has
MASK_TOKEN = ".mask_token"


def assert_same_weights(model: PreTrainedModel, directory: Path, whole: bool = False) -> None:
    """Raises RunError unless the model holds exactly the tensors saved in `directory`, a task's new head aside.

    whole: the directory is this model's own, so nothing may be aside.
    """
    state = dict(model.state_dict())
    # a model with blocks or weights of its own is saved under its own names
    own = getattr(model.config, "block", None) or getattr(model.config, "int8", None)
    held = state if own else revert_weight_conversion(model, state)
    prefix = f"{model.base_model_prefix}."
    seen, different, unknown = set(), [], []
    for name, tensor in saved_tensors(directory):
        key = next((key for key in _names_in_a_model(name, prefix) if key in held), None)
        if key is None:
            unknown.append(name)
            continue
        ours = held[key].detach().cpu()
        # the load has allowed another shape for a head with other labels
        if tensor.shape == ours.shape or whole:
            seen.add(key)
            if ours.is_floating_point() and not bool(torch.isfinite(ours).all()):
                raise RunError(f"{directory}: {name} holds values that are not finite numbers; the weights are damaged")
            if tensor.shape != ours.shape or not torch.equal(tensor.to(ours.dtype), ours):
                different.append(name)
    what = f"{len(different)} tensors differ, such as {different[0]}" if different else ""
    if not seen:
        what = "no tensor was found again"
    elif not what:
        # of tied tensors one is saved
        found = {held[key].data_ptr() for key in seen}
        found |= {tensor.data_ptr() for key, tensor in state.items() if not whole and may_be_new(model, key)}
        lost = [key for key, tensor in held.items() if key not in seen and tensor.data_ptr() not in found]
        lost += unknown if whole else []
        what = f"{len(lost)} tensors are in one of them only, such as {lost[0]}" if lost else ""
    if what:
        raise RunError(f"the weights in {directory} and in the model are not the same: {what}; please report this")


def assert_same_adapter(model: PeftModel, directory: Path) -> None:
    """Raises RunError unless the active adapter holds exactly the tensors saved in `directory`."""
    held = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    saved = load_file(directory / "adapter_model.safetensors")
    different = [name for name in saved if name not in held or not torch.equal(saved[name], held[name].detach().cpu())]
    if different or saved.keys() != held.keys():
        names = ", ".join(sorted(different or set(held) ^ set(saved))[:3])
        raise RunError(f"the adapter in {directory} did not arrive in the model: {names}; please report this")


def _names_in_a_model(name: str, prefix: str) -> Iterator[str]:
    """What a saved tensor may be called in a model: with or without the base's prefix, old norms by their new names."""
    new = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    for one in (name, new):
        yield from (one, prefix + one, one.removeprefix(prefix))


def saved_tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a checkpoint, in whichever of transformers' forms it has them; one file at a time in memory."""
    for stem, read in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", _read_pickled)):
        index = directory / f"{stem}.index.json"
        # transformers takes the one file where there are both
        if index.exists() and not (directory / stem).exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = [stem] if (directory / stem).exists() else []
        for name in names:
            yield from read(directory / name)
        if names:
            return


def _read_safetensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as saved:
        for name in saved.keys():  # noqa: SIM118 (not a dict)
            yield name, saved.get_tensor(name)


def _read_pickled(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    yield from torch.load(file, map_location="cpu", weights_only=True).items()


def base_prefix(model: PreTrainedModel) -> str:
    """`bert.` where the model is a base with a head on it; nothing where it has no such base, as T5's own classes."""
    prefix = f"{model.base_model_prefix}."
    return prefix if any(key.startswith(prefix) for key in model.state_dict()) else ""


def may_be_new(model: PreTrainedModel, key: str) -> bool:
    """Whether a checkpoint may lack a weight: of a task's head, of pooler and mask token beneath it, of a kernel."""
    base = base_prefix(model)
    head = bool(base) and not key.startswith(base)
    return head or key.startswith(f"{base}pooler.") or key.endswith(MASK_TOKEN) or ".kernel." in key
