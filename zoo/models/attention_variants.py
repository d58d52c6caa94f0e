"""Which attention each layer has: the names of a config, what goes with what, and the registry of kernels.

A config names its *variant* (the maths): `attention: full`, a pattern of `masks.py`, or a list of names that is cycled
over the layers; `attention_kwargs: {name: {...}}` holds the parameters. The *implementation* of the maths (eager, sdpa,
flex) is transformers' `attn_implementation`, which is not saved.
"""

import difflib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from .kernel import Kernel
from .linear_attention import LinearAttention
from .linformer import Linformer
from .masks import MASKS, Pattern, takes_layer
from .nystrom import Nystrom
from .performer import Performer
from .spec import check_block, positions_of
from .taylor import Taylor

FULL = "full"

ATTENTIONS: dict[str, type[Kernel]] = {
    "linformer": Linformer, "performer": Performer, "linear": LinearAttention, "nystrom": Nystrom,
    "taylor": Taylor,
}  # fmt: skip


def check_variant(config) -> None:
    """Raises ValueError unless the config's variants exist, have their parameters and can do what is asked of them."""
    for field, names, is_causal in _self_attentions(config):
        if not names:
            raise ValueError(f"{field}: an empty list; name at least one of {', '.join(known_variants())}.")
        for name in names:
            _check_name(config, field, name)
            if name not in ATTENTIONS:
                continue
            if is_causal and not ATTENTIONS[name].causal:
                able = ", ".join(name for name, kernel in ATTENTIONS.items() if kernel.causal)
                raise ValueError(f"{field}: {name} cannot be causal, and a decoder must be; patterns can, and {able}.")
            if positions_of(config) in ("alibi", "buckets"):
                raise ValueError(
                    f"{field}: {name} has no scores to which a position bias could be added; with "
                    "block.positions: rotary, sinusoidal or none it can be."
                )
            if len(names) > 1 and hasattr(config, "num_hidden_groups"):
                raise ValueError(f"{field}: the layers of ALBERT are one; name {name} alone.")
    cross = getattr(config, "cross_attention", FULL)
    _check_name(config, "cross_attention", cross)
    if cross != FULL and (cross in MASKS or not ATTENTIONS[cross].cross):
        able = ", ".join(name for name, kernel in ATTENTIONS.items() if kernel.cross)
        raise ValueError(f"cross_attention: {cross} relates tokens of one text; full does not, nor do {able}.")
    if cross != FULL and not has_stacks(config) and not getattr(config, "add_cross_attention", False):
        raise ValueError(f"cross_attention: {cross}, but this model reads no other text.")
    if config.attention_kwargs.get(FULL):
        raise ValueError(f"attention_kwargs.{FULL}: full attention has no parameters.")
    used = {name for _, names, _ in _self_attentions(config) for name in names} | {cross}
    check_block(config, {name for _, names, _ in _self_attentions(config) for name in names if name in ATTENTIONS})
    for name in config.attention_kwargs:
        if name not in used:
            raise ValueError(f"attention_kwargs has an entry for {name!r}, but attention is {config.attention!r}.")


def known_variants() -> list[str]:
    return [FULL, *MASKS, *ATTENTIONS]


def _self_attentions(config) -> Iterator[tuple[str, list[str], bool]]:
    """(config field, the variants it names, whether they are causal)."""
    default = _listed(config.attention)
    if not has_stacks(config):
        yield "attention", default, config.always_causal or getattr(config, "is_decoder", False)
        return
    for field, is_causal in (("encoder_attention", False), ("decoder_attention", True)):
        own = getattr(config, field)
        yield ("attention" if own is None else field), default if own is None else _listed(own), is_causal


def has_stacks(config) -> bool:
    """Whether a config is T5's, of an encoder alone too: either of its stacks may have an attention of its own."""
    return hasattr(type(config), "encoder_attention")


def _listed(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _check_name(config, field: str, name: str) -> None:
    if name not in known_variants():
        near = difflib.get_close_matches(name, known_variants(), n=1)
        meant = f"did you mean {near[0]}" if near else f"there are {', '.join(known_variants())}"
        raise ValueError(f"{field}: no variant is called {name!r}; {meant}.")
    if name in MASKS:
        pattern_of(config, name, causal=False, layer=0)
    if name in ATTENTIONS:
        kwargs = config.attention_kwargs.get(name, {})
        _check_keys(name, ATTENTIONS[name].check, kwargs)
        ATTENTIONS[name].check(config, **kwargs)


def own_attention(config) -> str | list[str]:
    """The variants of a stack's self-attention: T5's encoder and decoder may each have their own."""
    own: Any = None
    if has_stacks(config):
        own = config.decoder_attention if config.is_decoder else config.encoder_attention
    return own or getattr(config, "attention", FULL)


def variant_of_layer(config, layer_idx: int) -> str:
    """The name of a layer's variant: a list is a cycle over the layers (GPT-3, arXiv 2005.14165, section 2.1)."""
    names = _listed(own_attention(config))
    return names[layer_idx % len(names)]


def _check_keys(name: str, build: Callable, kwargs: Any) -> None:
    """Raises ValueError unless `kwargs` are the parameters of a variant, those without a default among them."""
    if not isinstance(kwargs, dict):
        raise ValueError(f"attention_kwargs.{name}: a mapping of parameters, not {kwargs!r}.")
    own = {
        key: parameter.default is parameter.empty
        for key, parameter in inspect.signature(build).parameters.items()
        if key not in ("causal", "layer", "config")
    }
    for key in kwargs:
        if key not in own:
            raise ValueError(f"attention_kwargs.{name}: unknown key {key!r}; it takes {', '.join(own)}.")
    for key, required in own.items():
        if required and key not in kwargs:
            raise ValueError(f"attention_kwargs.{name}: {key} is missing.")


# patterns that were asked for; one object each, under which its blocks are kept
_PATTERNS: dict[tuple, Pattern] = {}


def pattern_of(config, name: str, causal: bool, layer: int) -> Pattern:
    """That of a layer whose variant is a pattern's name."""
    kwargs = config.attention_kwargs.get(name, {})
    own = {"layer": layer} if takes_layer(name) else {}
    asked = (name, causal, repr(own), repr(kwargs))
    if asked not in _PATTERNS:
        _check_keys(name, MASKS[name], kwargs)
        _PATTERNS[asked] = MASKS[name](causal=causal, **own, **kwargs)
    return _PATTERNS[asked]
