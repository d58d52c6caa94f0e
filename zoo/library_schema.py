"""What a library's config class accepts, read from its installed source: nothing of the library is imported.

`transformers.TrainingArguments` takes seconds to import; its source takes milliseconds to parse, and what is found is
cached.
"""

import ast
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zoo.errors import RunError, did_you_mean, shown
from zoo.sources import cache_home

_TYPE_WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a string"}
_MAPPINGS = {"dict", "Dict", "Mapping"}
_SEQUENCES = {"list", "List", "Sequence", "tuple", "Tuple", "set", "Set"}


@dataclass(frozen=True)
class LibraryField:
    """One field of a config class.

    `annotation` and `default` are source text (no default: the field is required). `enums` holds the string values of
    the enums that the annotation names; `choices` and `const` come from the field's argparse metadata.
    """

    annotation: str = "Any"
    default: str | None = None
    enums: dict[str, list[str]] = field(default_factory=dict)
    choices: list[Any] = field(default_factory=list)
    const: list[Any] = field(default_factory=list)

    def problem(self, value: Any) -> str | None:
        """What is wrong with `value`, in words, or None."""
        if any(value is constant or (type(value) is type(constant) and value == constant) for constant in self.const):
            return None
        node = ast.parse(self.annotation, mode="eval").body
        if not _accepts(node, value, self.enums):
            words = [word for values in self.enums.values() for word in values]
            return f"expected {_describe(node, self.enums)}, got {shown(value)}{_hint(node, value, words)}"
        if self.choices and isinstance(value, str) and value not in self.choices:
            return f"expected {_one_of(self.choices)}, got {shown(value)}{_hint(node, value, self.choices)}"
        return None

    def json_schema(self) -> dict[str, Any]:
        """The field as JSON Schema."""
        schema = _schema_of(ast.parse(self.annotation, mode="eval").body, self.enums)
        if self.choices:
            schema = {"enum": self.choices}
        if self.const:
            schema = {"anyOf": [schema, {"enum": self.const}]}
        try:
            return schema | ({} if self.default is None else {"default": ast.literal_eval(self.default)})
        except ValueError:  # an expression
            return schema


def library_fields(package: str, module_path: str, class_name: str) -> dict[str, LibraryField]:
    """The fields of `package.module_path.class_name`, in order, from the installed source.

    A class with its own `__init__` has that function's parameters, or what it takes out of its keywords; a dataclass
    has its fields and its bases'. Raises RunError where the package or the class is not there.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise RunError(f"the package {package} is not installed: a recipe is checked against it; pip install {package}")
    version = importlib.metadata.version(package)
    root = Path(spec.origin).parent
    module = _module_file(root, module_path.split("."))
    cache = cache_home() / "zoo" / "schemas" / f"{package}-{version}-{class_name}.json"
    # The library's file is in the stamp for checkouts edited in place, this file for what it reads out of it.
    stamp = [_stamp(module), _stamp(Path(__file__))]
    fields = _read_cache(cache, stamp)
    if fields is None:
        found = _find_class(module, class_name, root)
        if found is None:
            raise RunError(f"{package} {version} has no {class_name} in {module}: install a version that zoo declares")
        fields = _class_fields(*found, root)
        _write_cache(cache, stamp, fields)
    return fields


# Annotations against values


def _alternatives(node: ast.expr, enums: dict[str, list[str]]) -> list[ast.expr]:
    """The members of a union, flat. Beside an enum a plain `str` means "the enum's value as text": it is left out."""
    found = list(_flatten(node))
    if any(_name(member) in enums for member in found):
        found = [member for member in found if _name(member) != "str"]
    return found


def _flatten(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # a quoted annotation
        yield from _flatten(ast.parse(node.value, mode="eval").body)
    elif isinstance(node, ast.BinOp):
        yield from _flatten(node.left)
        yield from _flatten(node.right)
    elif isinstance(node, ast.Subscript) and _name(node) in ("Optional", "Union"):
        for member in _arguments(node):
            yield from _flatten(member)
        if _name(node) == "Optional":
            yield ast.Constant(None)
    else:
        yield node


def _accepts(node: ast.expr, value: Any, enums: dict[str, list[str]]) -> bool:
    return any(_accepts_one(member, value, enums) for member in _alternatives(node, enums))


def _accepts_one(node: ast.expr, value: Any, enums: dict[str, list[str]]) -> bool:
    name = _name(node)
    arguments = _arguments(node)
    if isinstance(node, ast.Constant):
        return value is None
    if name in enums:
        return value in enums[name]
    if name == "Literal":
        literals = [ast.literal_eval(argument) for argument in arguments]
        return any(type(value) is type(literal) and value == literal for literal in literals)
    if name in _TYPE_WORDS:
        return type(value).__name__ == name or (name == "float" and type(value) is int)
    if name in _SEQUENCES:
        return isinstance(value, list) and all(_accepts(arguments[0], item, enums) for item in value if arguments)
    if name in _MAPPINGS:
        if not isinstance(value, dict):
            return False
        return len(arguments) < 2 or all(_accepts(arguments[1], item, enums) for item in value.values())
    return True  # Any, or a class that only the library can judge


_JSON_TYPES = {"bool": "boolean", "int": "integer", "float": "number", "str": "string"}


def _schema_of(node: ast.expr, enums: dict[str, list[str]]) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    for member in _alternatives(node, enums):
        name, arguments = _name(member), _arguments(member)
        if isinstance(member, ast.Constant):
            found.append({"type": "null"})
        elif name in enums:
            found.append({"enum": enums[name]})
        elif name == "Literal":
            found.append({"enum": [ast.literal_eval(argument) for argument in arguments]})
        elif name in _JSON_TYPES:
            found.append({"type": _JSON_TYPES[name]})
        elif name in _SEQUENCES:
            found.append({"type": "array", **({"items": _schema_of(arguments[0], enums)} if arguments else {})})
        elif name in _MAPPINGS:
            found.append({"type": "object"})
        else:
            return {}  # only the library can judge
    return found[0] if len(found) == 1 else {"anyOf": found}


def _describe(node: ast.expr, enums: dict[str, list[str]]) -> str:
    return " or ".join(dict.fromkeys(_describe_one(member, enums) for member in _alternatives(node, enums)))


def _describe_one(node: ast.expr, enums: dict[str, list[str]]) -> str:
    name = _name(node)
    arguments = _arguments(node)
    if isinstance(node, ast.Constant):
        return "null"
    if name in enums:
        return _one_of(enums[name])
    if name == "Literal":
        return _one_of([ast.literal_eval(argument) for argument in arguments])
    if name in _SEQUENCES:
        return "a list" + (f" (of {_describe(arguments[0], enums)} each)" if arguments else "")
    if name in _MAPPINGS:
        return "a mapping"
    return _TYPE_WORDS.get(name, name)


def _one_of(words: list[Any]) -> str:
    rest = f", ... ({len(words)} in all)" if len(words) > 20 else ""
    return "one of " + ", ".join(map(str, words[:20])) + rest


def _hint(node: ast.expr, value: Any, words: list[Any]) -> str:
    if not isinstance(value, str):
        return ""
    numbers = {"int": int, "float": float}
    for member in _flatten(node):
        try:
            numbers[_name(member)](value)
            return f": write {value.strip()} without quotes"
        except (KeyError, ValueError):
            continue
    return did_you_mean(value, map(str, words))


def _name(node: ast.expr) -> str:
    """`Optional` for Optional, typing.Optional and Optional[int]."""
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _arguments(node: ast.expr) -> list[ast.expr]:
    if not isinstance(node, ast.Subscript):
        return []
    return node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]


# Source to fields


def _class_fields(module: Path, node: ast.ClassDef, root: Path) -> dict[str, LibraryField]:
    init = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
    if init is not None:
        return _parameters(init, module, root) or _popped(init, ast.get_docstring(node) or "")
    fields: dict[str, LibraryField] = {}
    for base in reversed(node.bases):
        found = _find_class(module, _name(base), root)
        if found is not None:
            fields |= _class_fields(*found, root)
    if any(_name(d.func if isinstance(d, ast.Call) else d) == "dataclass" for d in node.decorator_list):
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                _add_dataclass_field(fields, item, module, root)
    return fields


def _popped(init: ast.FunctionDef, documentation: str) -> dict[str, LibraryField]:
    """Of an `__init__(**kwargs)`: what it takes out of them, with the types that the class's docstring gives."""
    kinds = dict(re.findall(r"^\s*(\w+) \(`(.+?)`?(?:, \*optional\*.*)?\):", documentation, re.MULTILINE))
    fields = {}
    calls = [node for node in ast.walk(init) if isinstance(node, ast.Call)]
    for node in (call for call in calls if ast.unparse(call.func) == "kwargs.pop" and len(call.args) == 2):
        if isinstance(node.args[0], ast.Constant):
            name = str(node.args[0].value)
            # `int` or `list[int]`; what is no type, such as tuple(int, float), may be anything
            written = " | ".join(part.strip("` ") for part in kinds.get(name, "Any").split(" or "))
            annotation = written if re.fullmatch(r"[\w\[\], |]+", written) else "Any"
            fields[name] = LibraryField(f"{annotation} | None", ast.unparse(node.args[1]))
    return fields


def _add_dataclass_field(fields: dict[str, LibraryField], item: ast.AnnAssign, module: Path, root: Path) -> None:
    assert isinstance(item.target, ast.Name)
    default, metadata = item.value, {}
    if isinstance(default, ast.Call) and _name(default.func) == "field":
        keywords = {keyword.arg: keyword.value for keyword in default.keywords}
        if ast.unparse(keywords.get("init", ast.Constant(True))) == "False":
            return
        default = keywords.get("default", keywords.get("default_factory"))
        metadata = _literal_items(keywords.get("metadata"))
    if _name(item.annotation) == "ClassVar":
        return
    fields[item.target.id] = LibraryField(
        annotation=ast.unparse(item.annotation),
        default=None if default is None else ast.unparse(default),
        enums=_enums(item.annotation, module, root),
        choices=list(metadata.get("choices", [])),
        const=[metadata["const"]] if "const" in metadata else [],
    )


def _parameters(init: ast.FunctionDef, module: Path, root: Path) -> dict[str, LibraryField]:
    positional = init.args.posonlyargs + init.args.args
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(init.args.defaults))
    pairs = list(zip(positional, defaults + list(init.args.defaults), strict=True))[1:]  # without self
    pairs += zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
    fields = {}
    for parameter, default in pairs:
        annotation = parameter.annotation or ast.Name(_type_of_default(default))
        fields[parameter.arg] = LibraryField(
            annotation=ast.unparse(annotation),
            default=None if default is None else ast.unparse(default),
            enums=_enums(annotation, module, root),
        )
    return fields


def _type_of_default(default: ast.expr | None) -> str:
    value = default.value if isinstance(default, ast.Constant) else None
    return "Any" if value is None else type(value).__name__


def _literal_items(node: ast.expr | None) -> dict[str, Any]:
    """The items of a dict display whose keys and values are literals; others (`choices=levels.keys()`) are left out."""
    items = {}
    for key, value in zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ():
        try:
            items[ast.literal_eval(key or ast.Name("unpacked"))] = ast.literal_eval(value)
        except ValueError:
            continue
    return items


def _enums(annotation: ast.expr, module: Path, root: Path) -> dict[str, list[str]]:
    enums = {}
    for name in {node.id for member in _flatten(annotation) for node in ast.walk(member) if isinstance(node, ast.Name)}:
        found = _find_class(module, name, root)
        if found is not None and any(_name(base).endswith("Enum") for base in found[1].bases):
            values = [item.value for item in found[1].body if isinstance(item, ast.Assign)]
            enums[name] = [v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]
    return enums


@functools.cache
def _find_class(module: Path, name: str, root: Path) -> tuple[Path, ast.ClassDef] | None:
    """Where `name` is defined, as `module` sees it: there, or through its imports from the same package."""
    for node in _parsed(module):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                source = _imported_file(module, node, root) if (alias.asname or alias.name) == name else None
                if source is not None and source != module and source.is_file():
                    return _find_class(source, alias.name, root)
    return None


@functools.cache
def _parsed(module: Path) -> list[ast.stmt]:
    """The module's statements; those under a top-level `if` or `try` stand beside the others."""
    statements: list[ast.stmt] = []
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        nested = isinstance(node, ast.If | ast.Try)
        statements += [item for item in ast.walk(node) if isinstance(item, ast.stmt)] if nested else [node]
    return statements


def _imported_file(module: Path, node: ast.ImportFrom, root: Path) -> Path | None:
    parts = node.module.split(".") if node.module else []
    if node.level:
        return _module_file(module.parents[node.level - 1], parts)
    return _module_file(root, parts[1:]) if parts[0] == root.name else None


def _module_file(folder: Path, parts: list[str]) -> Path:
    path = folder.joinpath(*parts)
    return path / "__init__.py" if path.is_dir() else path.with_name(path.name + ".py")


# Cache


def _stamp(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path), status.st_mtime_ns, status.st_size]


def _read_cache(cache: Path, stamp: list[Any]) -> dict[str, LibraryField] | None:
    try:
        content = json.loads(cache.read_text(encoding="utf-8"))
        if content["stamp"] != stamp:
            return None
        return {name: LibraryField(**item) for name, item in content["fields"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # missing or damaged: it is built again


def _write_cache(cache: Path, stamp: list[Any], fields: dict[str, LibraryField]) -> None:
    content = json.dumps({"stamp": stamp, "fields": {name: asdict(item) for name, item in fields.items()}})
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache.parent, delete=False, encoding="utf-8") as file:
            file.write(content)
        os.replace(file.name, cache)
    except OSError:
        return  # a read-only home costs the parse each time, nothing else
