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
    """All of them: full attention, then the patterns of `masks.py`, then the kernels, each in a file of its own."""
    found = {FULL: Variant("Every token sees every other; causal: those before it.")}
    tree = _parsed("masks")
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for name, function in _registry(tree, "MASKS").items():
        found[name] = _described(functions[function], functions[function])
    tree = _parsed("attention_variants")
    files = {node.names[0].name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.level}
    for name, kernel in _registry(tree, "ATTENTIONS").items():
        body = _parsed(files[kernel] or "").body
        node = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == kernel)
        made = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
        found[name] = _described(node, *made)
    return found


def _parsed(name: str) -> ast.Module:
    return ast.parse((MODELS / f"{name}.py").read_text(encoding="utf-8"))


def _registry(tree: ast.Module, name: str) -> dict[str, str]:
    """Key -> the name that it stands for."""
    values = (node.value for node in tree.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name)
    registry = next(values)
    assert isinstance(registry, ast.Dict)
    return {
        ast.literal_eval(key): ast.unparse(value)
        for key, value in zip(registry.keys, registry.values, strict=True)
        if key is not None
    }


def _described(documented: ast.FunctionDef | ast.ClassDef, made: ast.FunctionDef | None = None) -> Variant:
    """made: the function whose keywords are the parameters."""
    own = {}
    if made is not None:
        given = zip(made.args.kwonlyargs, made.args.kw_defaults, strict=True)
        # the other two are the model's to say
        own = {argument.arg: default for argument, default in given if argument.arg not in ("causal", "layer")}
    required = tuple(name for name, default in own.items() if default is None)
    return Variant((ast.get_docstring(documented) or "").partition("\n")[0], tuple(own), required)


def contradictions(attentions: dict[str, list[str]], kwargs: dict[str, dict]) -> Iterator[tuple[Keys, str]]:
    """What is wrong with the variants that the fields of a recipe's model name, with the keys of each."""
    if kwargs or any(set(names) != {FULL} for names in attentions.values()):
        for field, names in attentions.items():
            for name in names:
                yield from _of_variant(field, name, kwargs.get(name))
    named = list(dict.fromkeys(name for names in attentions.values() for name in names)) or [FULL]
    for name in kwargs:
        if name not in named:
            text = f"model.attention is {', '.join(named)}: nothing reads this{did_you_mean(name, named)}"
            yield ("attention_kwargs", name), text


def _of_variant(field: str, name: str, given: dict | None) -> Iterator[tuple[Keys, str]]:
    known = variants()
    if name not in known:
        listed = f"; there are {', '.join(known)}"
        yield (field,), f"no variant is called {name}{did_you_mean(name, known) or listed}"
        return
    variant = known[name]
    for key in given or {}:
        if key not in variant.parameters:
            there = did_you_mean(key, variant.parameters) or f"; it takes {', '.join(variant.parameters) or 'none'}"
            yield ("attention_kwargs", name, key), f"unknown key{there}"
    missing = [key for key in variant.required if key not in (given or {})]
    if missing:
        yield (field,), f"{name} needs model.attention_kwargs.{name}.{missing[0]}"
