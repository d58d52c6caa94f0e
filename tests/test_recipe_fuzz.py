"""Whatever is written in a recipe: it is read, or refused in words with a place. Never a traceback."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from zoo.errors import UserError
from zoo.recipe import Recipe, leaves, plain
from zoo.recipe_loading import json_schema, load_recipe, shipped_recipes, validated
from zoo.task_types import TASK_TYPES

SHIPPED = shipped_recipes()["bert/finetune-topics"].read_text()
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

SCHEMA = json_schema()
SECTIONS = {name: Recipe.model_fields[name].annotation for name in Recipe.model_fields}
# words that mean something in a recipe, beside any other text
WORDS = sorted(
    {*SECTIONS, *SCHEMA["properties"]["train"]["properties"], *TASK_TYPES, "extends"}
    | {key for section in SECTIONS.values() for key in getattr(section, "model_fields", ())}
    | {"native", "official", "balanced", "mean", "regression", "text", "label", "train", "test", "local", "full", "~"}
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(WORDS),
    st.sampled_from(["1e400", "-.inf", ".nan", "0x1F", "1_000", "2026-01-01", "yes", "no", "..", "/", "pypi://", "\0"]),
)  # fmt: skip
keys = st.one_of(st.sampled_from(WORDS), st.sampled_from(WORDS), st.text(max_size=10), st.integers(), st.none())
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=5)),
    max_leaves=15,
)
recipes = st.dictionaries(st.one_of(st.sampled_from(sorted(SECTIONS)), keys), values, max_size=9)


def read(path, overrides=()) -> str | None:
    """None for a recipe that is accepted, which then says itself again; else what is said of it."""
    try:
        recipe = load_recipe(str(path), overrides)
    except UserError as error:
        assert str(error).strip()
        return str(error)
    again = path.with_name("again.yaml")
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(str(again)) == recipe
    recipe.smoke()
    return None


def written(path, value) -> bool:
    yaml = YAML(typ="safe", pure=True)
    try:
        with path.open("w", encoding="utf-8") as file:
            yaml.dump(value, file)
    except Exception:
        return False  # YAML has no way to write it
    return True


@QUICK
@given(value=recipes)
def test_any_mapping(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    if written(path, value):
        said = read(path)
        for line in (said or "").splitlines():
            assert re.match(r"\S*r\.yaml:\d+: |shipped recipes: ", line), line


@QUICK
@given(text=st.text())
def test_any_text(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    read(path)


@QUICK
@given(data=st.data())
def test_a_shipped_recipe_with_a_wound(tmp_path_factory, data):
    """A piece is cut out, doubled, or replaced by noise."""
    start = data.draw(st.integers(0, len(SHIPPED)))
    length = data.draw(st.integers(0, 30))
    noise = data.draw(st.text(max_size=6))
    path = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    wounded = SHIPPED[:start] + noise + SHIPPED[start + length :]
    path.write_bytes(wounded.encode("utf-8", "surrogatepass"))
    read(path)


@QUICK
@given(section=st.sampled_from(sorted(SECTIONS)), key=keys, value=values)
def test_a_shipped_recipe_with_another_value(tmp_path_factory, section, key, value):
    yaml = YAML(typ="safe", pure=True)
    content = yaml.load(SHIPPED)
    if isinstance(content.get(section), dict) and key is not None:
        content[section][key] = value
    else:
        content[section] = value
    path = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    if written(path, content):
        said = read(path)
        assert said is None or "r.yaml:" in said


@QUICK
@given(key=st.one_of(st.sampled_from(sorted(leaves(plain(load_recipe("bert/finetune-topics"))))), st.text(max_size=20)),
       value=st.one_of(scalars.map(str), st.text(max_size=30)))  # fmt: skip
def test_any_override(tmp_path_factory, key, value):
    path = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    path.write_text(SHIPPED)
    said = read(path, [f"{key}={value}"])
    # a stream contradicts shares, which the file says
    assert said is None or "command line" in said or key == "data.streaming", said


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"\x80abc", b"name: \xc3\x28", b"a: &a [*a]", b"[" * 2000, b"{a: " * 500]
)
def test_bytes_that_are_no_recipe(tmp_path, content):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    answer = validated(str(path))
    assert not answer["valid"] and answer["problems"]
