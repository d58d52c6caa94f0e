"""Attention variants by name, with their parameters, read from the models' source as text: without torch."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from zoo.errors import Keys, did_you_mean

MODELS = Path(__file__).parent / "models"
FULL = "full"


@dataclass(frozen=True)
class Variant:
    """A value of `model.attention`; the names of its parameters, and of those among them that must be given."""

    summary: str
    parameters: tuple[str, ...] = ()
    required: tuple[str, ...] = ()


@cache
def variants() -> dict[str, Variant]:
    """All of them: full attention, then the patterns of `masks.py`."""
    found = {FULL: Variant("Every token sees every other; causal: those before it.")}
    tree = ast.parse((MODELS / "masks.py").read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    registry = next(
        node.value for node in tree.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "MASKS"
    )
    assert isinstance(registry, ast.Dict)
    for key, value in zip(registry.keys, registry.values, strict=True):
        assert key is not None
        found[ast.literal_eval(key)] = _described(functions[ast.unparse(value)])
    return found


def _described(function: ast.FunctionDef) -> Variant:
    given = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    # the other two are the model's to say
    own = {argument.arg: default for argument, default in given if argument.arg not in ("causal", "layer")}
    required = tuple(name for name, default in own.items() if default is None)
    return Variant((ast.get_docstring(function) or "").partition("\n")[0], tuple(own), required)


def contradictions(names: list[str], kwargs: dict[str, dict]) -> Iterator[tuple[Keys, str]]:
    """What is wrong with `attention` and `attention_kwargs` of a recipe's model, with the keys of each."""
    if set(names) == {FULL} and not kwargs:
        return
    known = variants()
    for name in names:
        if name not in known:
            near = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            yield ("attention",), f"no variant is called {name}{near}"
            continue
        given, variant = kwargs.get(name, {}), known[name]
        for key in given:
            if key not in variant.parameters:
                there = did_you_mean(key, variant.parameters) or f"; it takes {', '.join(variant.parameters) or 'none'}"
                yield ("attention_kwargs", name, key), f"unknown key{there}"
        missing = [key for key in variant.required if key not in given]
        if missing:
            yield ("attention",), f"{name} needs model.attention_kwargs.{name}.{missing[0]}"
    for name in kwargs:
        if name not in names:
            text = f"model.attention is {', '.join(names)}: nothing reads this{did_you_mean(name, names)}"
            yield ("attention_kwargs", name), text
