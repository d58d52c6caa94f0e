"""Reading a recipe: files and overrides are merged, and all that is wrong with them is listed at once.

Nothing here imports torch or transformers: a wrong key is answered in a fraction of a second.
"""

import difflib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from zoo.adapter_types import ADAPTER_TYPES, DEFAULT_TYPE
from zoo.errors import Keys, Problems, UserError, did_you_mean, shown
from zoo.files import finite
from zoo.library_schema import LibraryField, library_fields
from zoo.recipe import Recipe, leaves, plain
from zoo.recipe_yaml import BASE, COMMAND_LINE, RECIPE, Written, display, read_file, read_override
from zoo.sections import Section
from zoo.task_types import TASK_TYPES

# Keys of TrainingArguments that this project decides: what to do instead.
_TRAIN_KEYS = {
    "output_dir": "the run's directory is given by --output-dir; remove the key",
    "remove_unused_columns": "the task decides which columns reach the model; remove the key",
    "push_to_hub": "write it as hub.repo, or use 'zoo push' on the finished directory; remove the key",
    "hub_": "write it in the section hub, or use 'zoo push' on the finished directory; remove the key",
    "label_names": "the task decides what the labels are; remove the key",
    "prediction_loss_only": "a run measures more than the loss; remove the key",
    "eval_do_concat_batches": "metrics are of all batches together; remove the key",
    "resume_from_checkpoint": "add --resume to the command; remove the key",
    "do_train": "the stage decides what runs; remove the key",
    "do_eval": "the stage decides what runs; remove the key",
    "do_predict": "the stage decides what runs; remove the key",
}
_MEASURED = "a run asks for what it measures; remove the key"
_GENERATE_KEYS = {
    "output_": _MEASURED,
    "return_dict_in_generate": _MEASURED,
    "num_return_sequences": "an answer is one text; remove the key",
    "_": "it is the library's own; remove the key",
    "transformers_version": "it is the library's own; remove the key",
}


_DECIDED = "the run decides it; remove the key"
_LORA_KEYS = dict.fromkeys(
    ("task_type", "peft_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"),
    _DECIDED,
)


@dataclass(frozen=True)
class LibrarySection:
    """A section that goes verbatim to a class of a library, without the keys, or beginnings of keys, of `owned`."""

    module: str
    name: str
    owned: dict[str, str]
    package: str = "transformers"

    def fields(self) -> dict[str, LibraryField]:
        return library_fields(self.package, self.module, self.name)

    def remedy(self, key: Any) -> str | None:
        """What to do instead of a key that this project decides."""
        for owned, remedy in self.owned.items():
            if key == owned or ((owned.endswith("_") or owned == "push_to_hub") and str(key).startswith(owned)):
                return remedy
        return None

    def usable(self) -> dict[str, LibraryField]:
        return {key: field for key, field in self.fields().items() if self.remedy(key) is None}

    def problem(self, key: Any, value: Any) -> str | None:
        """What is wrong with a key or its value, in words, or None."""
        remedy = self.remedy(key)
        if remedy is not None:
            return f"not for a recipe: {remedy}"
        fields = self.fields()
        if key not in fields:
            near = did_you_mean(key, self.usable())
            return f"unknown key{near or f'; the keys are those of {self.package}.{self.name}'}"
        return fields[key].problem(value)


ADAPTERS = {
    kind: LibrarySection(adapter.module, adapter.name, _LORA_KEYS, "peft") for kind, adapter in ADAPTER_TYPES.items()
}
LIBRARY_SECTIONS = {
    "train": LibrarySection("training_args", "TrainingArguments", _TRAIN_KEYS),
    "generate": LibrarySection("generation.configuration_utils", "GenerationConfig", _GENERATE_KEYS),
    "quantize": LibrarySection("utils.quantization_config", "BitsAndBytesConfig", {}),
    "lora": ADAPTERS[DEFAULT_TYPE],
}


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe (a file, or the name of a shipped one), lay `section.key=value` overrides on it, check it all.

    Precedence: command line, recipe, base. Mappings merge; lists, and an empty mapping, replace what was there.
    Raises UserError with every problem found, a line each: file, line, key, remedy.
    """
    path = _find(str(name_or_path))
    problems = Problems()
    written = _with_base(path, problems)
    for number, text in enumerate(overrides):
        override = read_override(text, number, problems)
        _refuse_below_a_value(written, override, problems)
        written.merge(override)
    recipe = _checked(written, problems)
    problems.raise_any()
    assert recipe is not None  # pydantic refuses nothing without an error
    recipe._file = path
    for key in leaves(plain(recipe)):
        recipe._origins[key] = "default"
    recipe._origins |= _origins(recipe, written)
    return recipe


def validated(name_or_path: str) -> dict[str, Any]:
    """What `load_recipe` says of a recipe: `valid`, its `problems`, and its `values` with the origin of each.

    Of the values JSON has no word for infinity: they are the strings that YAML reads as such, ".inf" and "-.inf".
    """
    try:
        recipe = load_recipe(name_or_path)
    except UserError as error:
        return {"recipe": name_or_path, "valid": False, "problems": str(error).splitlines(), "values": {}}
    written = finite(leaves(plain(recipe)), lambda number: ".inf" if number > 0 else "-.inf")
    values = {key: {"value": value, "origin": recipe.origins[key]} for key, value in written.items()}
    return {"recipe": name_or_path, "valid": True, "problems": [], "values": values}


def _with_base(path: Path, problems: Problems) -> Written:
    written = read_file(path, RECIPE, problems)
    place = written.place(("extends",))
    extends = written.values.pop("extends", None)
    if extends is None:
        return written
    if not isinstance(extends, str):
        problems.add(place, ("extends",), f"expected a recipe's file or name, got {shown(extends)}")
        return written
    try:
        base = read_file(_find(extends, path.parent), BASE, problems)
    except UserError as error:
        raise UserError(f"{place.label}: extends: {error}") from None
    if "extends" in base.values:
        text = "a base does not itself extend; extend one recipe that says it all"
        problems.add(base.place(("extends",)), ("extends",), text)
        del base.values["extends"]
    base.places[()] = written.places[()]  # what neither of them has is missing in the recipe
    base.merge(written)
    return base


def _refuse_below_a_value(written: Written, override: Written, problems: Problems) -> None:
    place = min(override.places.values())
    keys = tuple(place.key.split("."))
    value: Any = written.values
    for n, key in enumerate(keys[:-1], start=1):
        value = value.get(key)
        if value is None:
            return
        if not isinstance(value, dict):
            problems.add(place, keys, f"{'.'.join(keys[:n])} is {shown(value)}, it has no keys; give it whole")
            return


def _origins(recipe: Recipe, written: Written) -> dict[str, str]:
    known = leaves(plain(recipe))
    dotted = {".".join(map(str, keys)): place for keys, place in written.places.items()}
    places = {key: place for key, place in dotted.items() if key in known}
    return {key: "command line" if place.rank == COMMAND_LINE else place.label for key, place in places.items()}


# Checks


def _checked(written: Written, problems: Problems) -> Recipe | None:
    recipe = None
    try:
        recipe = Recipe.model_validate(written.values)
    except ValidationError as error:
        for item in error.errors():
            for keys, text in _explained(item, written.values):
                problems.add(written.place(keys), keys, text)
    for keys in _not_numbers(written.values):
        problems.add(written.place(keys), keys, "is not a number (.nan), and equals nothing, not even itself")
    for section, library in LIBRARY_SECTIONS.items():
        given = written.values.get(section)
        for key, value in given.items() if isinstance(given, dict) else ():
            if section == "lora" and isinstance(given, dict):
                kind = given.get("type", DEFAULT_TYPE)
                # of an unknown type the recipe says what is wrong
                if key == "type" or not isinstance(kind, str) or kind not in ADAPTERS:
                    continue
                library = ADAPTERS[kind]
            problem = library.problem(key, value)
            if problem is not None:
                problems.add(written.place((section, key)), (section, key), problem)
    return recipe


def _not_numbers(value: Any, keys: Keys = ()) -> Iterator[Keys]:
    if isinstance(value, float) and math.isnan(value):
        yield keys
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inside:
        yield from _not_numbers(below, (*keys, key))


def _explained(error: ErrorDetails, values: dict[Any, Any]) -> Iterator[tuple[Keys, str]]:
    """A pydantic error as (path, message in our words)."""
    keys, value = _path(error["loc"], values)
    context = error.get("ctx", {})
    if error["type"] == "missing":
        yield (*keys, error["loc"][-1]), "required, and not there"
    elif error["type"] == "extra_forbidden":
        yield keys, f"unknown key{_nearest_key(keys)}"
    elif error["type"] == "contradiction":
        for below, text in context["found"]:
            yield (*keys, *below), text
    elif (keys and not isinstance(keys[-1], str) and error["loc"][-1] == "[key]") or error["type"] == "invalid_key":
        # a number too large for pydantic is not found again by its location
        wrong = keys[-1] if keys else error["loc"][-1]
        yield keys, f"a key is a string; write {wrong!r} in quotes if you mean it"
    elif error["msg"].startswith("Input should be "):
        expected = error["msg"].removeprefix("Input should be ")
        expected = (
            re.sub(r"a valid dictionary.*", "a mapping (key: value)", expected)
            .replace("a valid integer", "a whole number")
            .replace("a valid ", "a ")
        )
        wrong = keys[-1] if error["loc"][-1] == "[key]" else value
        hint = did_you_mean(wrong, re.findall(r"'([^']*)'", expected)) if isinstance(wrong, str) else ""
        yield keys, f"expected {expected}, got {shown(wrong)}{hint}"
    else:
        yield keys, error["msg"]


def _path(loc: tuple[int | str, ...], values: Any) -> tuple[Keys, Any]:
    """The part of pydantic's location that was written (it also names union members), and the value there."""
    keys: Keys = ()
    for part in loc:
        if part in values if isinstance(values, dict) else isinstance(values, list) and isinstance(part, int):
            keys, values = (*keys, part), values[part]
    return keys, values


def _nearest_key(keys: Keys) -> str:
    """For an unknown key: the nearest right one beside it, or the same word where it belongs."""
    sections = {name: set(_section_keys(name)) for name in Recipe.model_fields}
    beside = set(_section_keys(*map(str, keys[:-1]))) if len(keys) > 1 else {*sections, "extends"}
    elsewhere = [f"{name}.{keys[-1]}" for name, known in sections.items() if keys[-1] in known]
    if not did_you_mean(keys[-1], beside) and elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    return did_you_mean(keys[-1], beside) or f"; the keys here are {', '.join(sorted(beside))}"


def _section_keys(name: str, *below: str) -> Iterator[str]:
    annotation: Any = Recipe.model_fields[name].annotation
    for key in below:
        annotation = annotation.model_fields[key].annotation
    # a section, or one that need not be there
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    for kind in kinds:
        if issubclass(kind, Section):
            yield from kind.model_fields
    if not below and name in LIBRARY_SECTIONS:
        yield from LIBRARY_SECTIONS[name].fields()


def json_schema() -> dict[str, Any]:
    """A recipe as JSON Schema, for editors; sections of a library are filled from its installed source."""
    schema = Recipe.model_json_schema()
    for section, library in LIBRARY_SECTIONS.items():
        fields = {key: field.json_schema() for key, field in library.usable().items()}
        if section == "lora":
            others = [library.usable() for library in ADAPTERS.values()]
            more = {key: field.json_schema() for fields_of in others for key, field in fields_of.items()}
            fields = {"type": {"enum": list(ADAPTERS), "default": DEFAULT_TYPE}} | more | fields
        schema["properties"][section] |= {"properties": fields, "additionalProperties": False}
    schema["properties"]["extends"] = {"type": "string", "description": "A base recipe: a file beside, or a name."}
    schema["$defs"]["TaskSection"]["properties"]["type"]["enum"] = list(TASK_TYPES)
    # what a recipe lacks its base may have
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "description": "A recipe of zoo."}


# Shipped recipes


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the project: `bert/finetune-topics`."""
    package = Path(__file__).resolve().parent
    # The wheel carries them inside the package; a checkout has them beside it.
    folder = package / "_recipes" if (package / "_recipes").is_dir() else package.parent / "recipes"
    return {file.relative_to(folder).as_posix().removesuffix(".yaml"): file for file in sorted(folder.rglob("*.yaml"))}


def _find(name: str, folder: Path = Path()) -> Path:
    path = folder / os.path.expanduser(name)
    if os.path.exists(path) and not path.is_dir():
        return path
    shipped = shipped_recipes()
    short = name.removeprefix("recipes/").removesuffix(".yaml")
    if short in shipped:
        return shipped[short]
    if os.path.isdir(path):
        inside = ", ".join(sorted(file.name for file in path.glob("*.y*ml"))) or "no recipe"
        raise UserError(f"{name}: is a directory (with {inside}); name a recipe's .yaml file")
    beside = [p.name for p in path.parent.glob("*.y*ml")] if os.path.isdir(path.parent) else []
    hint = did_you_mean(path.name, beside) or did_you_mean(short, shipped)
    far = difflib.get_close_matches(short, shipped, n=3, cutoff=0.4)
    raise UserError(
        f"{name}: neither a file ({display(path.absolute())}) nor a shipped recipe"
        + (hint or (f"; did you mean {' or '.join(far)}?" if far else ""))
        + f"\nshipped recipes: {', '.join(shipped) or 'none'}"
    )
