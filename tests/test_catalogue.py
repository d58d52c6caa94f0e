"""What is listed is what there is; copies and checks of recipes; the schema that editors read."""

import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from zoo.catalogue import KINDS, as_text, copy_recipe, listed
from zoo.errors import UserError
from zoo.recipe_loading import json_schema, load_recipe, shipped_recipes, validated
from zoo.sizes import SIZES

REPO = Path(__file__).parents[1]


def zoo(*arguments: str, cwd: Path = REPO) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(REPO / "cli.py"), *arguments], cwd=cwd, capture_output=True, text=True)


# Lists


def test_models_are_those_of_the_registry():
    """The list is read from source text; the registry is what the code has."""
    from zoo.models import FAMILIES

    found = {entry["name"]: entry for entry in listed("models")}
    assert list(found) == list(FAMILIES)
    for name, (module, base, _) in FAMILIES.items():
        classes = {auto: path.rpartition(".")[2] for auto, path in base.auto_map.items()}
        assert found[name]["classes"] == classes and found[name]["model_type"] == base.config_class.model_type
        assert all(hasattr(module, class_name) for class_name in classes.values())


def test_models_have_the_tasks_that_recipes_train():
    from zoo.models import FAMILIES
    from zoo.tasks import TASKS

    for entry in listed("models"):
        module, base, _ = FAMILIES[entry["name"]]

        def learns(task, module=module, base=base) -> bool:
            if task.auto_class not in base.auto_map:
                return False
            head = getattr(module, base.auto_map[task.auto_class].rpartition(".")[2])
            return task.label is None or task.label in inspect.signature(head.forward).parameters

        assert entry["tasks"] == [name for name, tasks in TASKS.items() if all(map(learns, tasks))]


def test_models_have_their_sizes():
    found = {entry["name"]: {size["name"]: size for size in entry["sizes"]} for entry in listed("models")}
    assert [(name, family) for family in found for name in found[family]] == [
        (name, family) for name, (family, _) in SIZES.items()
    ]
    assert found["gpt2"]["gpt2"] == {
        "name": "gpt2", "parameters": 124_439_808, "flops_per_token": 284_812_800, "train_bytes": 1_991_036_928,
        "serve_bytes": 497_759_232, "cache_bytes_per_token": 36_864,
    }  # fmt: skip


def test_the_table_of_sizes():
    lines = as_text(listed("models"), details=True).splitlines()
    table = [line for line in lines if line.startswith("    ") and "tasks of recipes" not in line]
    assert len({len(line) for line in table}) == 1, "numbers end below each other"
    rows = {line.split()[0]: line.split()[1:] for line in table}
    assert rows.keys() == {"size", *SIZES}
    assert rows["gpt2"] == ["124.4M", "284.8M", "2.0", "GB", "497.8", "MB", "36.9", "kB"]
    assert rows["gpt3-175b"] == ["174.6B", "358.8G", "2.8", "TB", "698.4", "GB", "4.7", "MB"]
    assert rows["bert-tiny"] == ["4.4M", "9.2M", "70.7", "MB", "17.7", "MB", "-"]
    of_texts = "text-classification, token-classification"
    encoders = "text-classification, multiple-choice, token-classification, fill-mask"
    causal, vectors = "text-generation, instruction-tuning", "sentence-similarity, question-answering"
    for tasks, families in (
        (f"{encoders}, {vectors}", 1),  # DistilBERT
        (f"{encoders}, sentence-order-prediction, {vectors}", 1),
        (f"{encoders}, next-sentence-prediction, {causal}, {vectors}", 1),
        (f"{encoders}, {causal}, {vectors}", 1),  # RoBERTa as a decoder
        (f"{of_texts}, {causal}, question-answering", 1),
        (f"{of_texts}, span-corruption, summarization, translation, {vectors}", 1),
        ("image-classification, masked-image-modeling", 1),
    ):
        assert lines.count(f"    tasks of recipes: {tasks}") == families
    assert len(as_text(listed("models"), details=False).splitlines()) == 1 + len(listed("models"))


def test_attentions_and_tasks_are_those_of_the_registries():
    from zoo.models.attention_variants import ATTENTIONS, FULL
    from zoo.models.masks import MASKS
    from zoo.tasks import TASKS

    found = {entry["name"]: entry for entry in listed("attentions")}
    assert list(found) == [FULL, *MASKS, *ATTENTIONS] and found["local"]["parameters"] == ["window"]
    for name, made in {**MASKS, **ATTENTIONS}.items():
        assert found[name]["summary"] == (made.__doc__ or "").splitlines()[0]
    for name, kernel in ATTENTIONS.items():
        assert ["config", *found[name]["parameters"]] == list(inspect.signature(kernel.check).parameters)
    assert [entry["name"] for entry in listed("tasks")] == list(TASKS)


def test_everything_has_a_name_and_a_summary():
    entries = listed()
    assert {entry["kind"] for entry in entries} == set(KINDS)
    assert all(entry["name"] and entry["summary"] for entry in entries)
    assert [entry["name"] for entry in listed("recipes")] == list(shipped_recipes())
    with pytest.raises(UserError, match=r"ls recpes: there are recipes, .*; did you mean recipes"):
        listed("recpes")


# Copies


def test_a_copy_is_a_recipe_of_its_own(tmp_path):
    copied = copy_recipe("bert/finetune-topics", tmp_path / "mine.yaml")
    assert copied.read_text() == shipped_recipes()["bert/finetune-topics"].read_text()
    assert load_recipe(str(copied)) == load_recipe("bert/finetune-topics")
    assert copy_recipe("bert/finetune-topics", tmp_path) == tmp_path / "finetune-topics.yaml"


def test_copies_that_are_refused(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("precious")
    for name, target, says in (
        ("bert/finetune-topics", mine, "mine.yaml exists; name another file, or add --overwrite"),
        ("bert/finetune-topic", mine, "no shipped recipe of that name; did you mean bert/finetune-topics?"),
        ("bert/finetune-topics", tmp_path / "no" / "folder.yaml", "cannot be written: No such file or directory"),
    ):
        with pytest.raises(UserError) as caught:
            copy_recipe(name, target)
        assert says in str(caught.value)
    assert mine.read_text() == "precious" and [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    assert copy_recipe("bert/finetune-topics", mine, overwrite=True).read_text() != "precious"


# Checks


@pytest.fixture
def wrong(tmp_path) -> Path:
    text = shipped_recipes()["bert/finetune-topics"].read_text()
    (tmp_path / "wrong.yaml").write_text(text.replace("learning_rate:", "learning_rat:"))
    return tmp_path / "wrong.yaml"


def test_infinity_is_a_word(tmp_path):
    text = shipped_recipes()["bert/finetune-topics"].read_text().rstrip()
    (tmp_path / "r.yaml").write_text(f"{text}\n  max_grad_norm: .inf\n")
    assert load_recipe(str(tmp_path / "r.yaml")).train["max_grad_norm"] == math.inf
    done = zoo("validate", str(tmp_path / "r.yaml"), "--json")
    (result,) = json.loads(done.stdout, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert result["values"]["train.max_grad_norm"]["value"] == ".inf"


def test_validated_tells_where_each_value_comes_from(wrong):
    result = validated("bert/finetune-topics")
    assert result["valid"] and result["problems"] == []
    rate, ragged = result["values"]["train.learning_rate"], result["values"]["model.ragged"]
    file, _, line = rate["origin"].rpartition(":")
    assert rate["value"] == 1e-4 and (REPO / file).read_text().splitlines()[int(line) - 1] == "  learning_rate: 1e-4"
    assert ragged == {"value": "auto", "origin": "default"}
    result = validated(str(wrong))
    assert not result["valid"] and result["values"] == {}
    (problem,) = result["problems"]
    assert "train.learning_rat: unknown key; did you mean learning_rate?" in problem


def test_the_commands(wrong, tmp_path):
    done = zoo("validate", "bert/finetune-topics", str(wrong), "no-such")
    assert (done.returncode, done.stdout) == (2, "bert/finetune-topics: valid\n")
    assert "did you mean learning_rate?" in done.stderr and "no-such: neither a file" in done.stderr
    done = zoo("validate", "bert/finetune-topics", str(wrong), "--json")
    assert done.returncode == 2 and [result["valid"] for result in json.loads(done.stdout)] == [True, False]
    done = zoo("validate", "bert/finetune-topics", "--resolved")
    assert done.returncode == 0
    assert "\n  train.learning_rate: 0.0001  # recipes/bert/finetune-topics.yaml:" in done.stdout
    done = zoo("ls", "--json")
    assert json.loads(done.stdout) == listed()
    done = zoo("ls")
    assert [line for line in done.stdout.splitlines() if line in KINDS] == list(KINDS)
    done = zoo("cp", "bert/finetune-topics", str(tmp_path / "mine.yaml"), "--json")
    assert json.loads(done.stdout) == {"file": str(tmp_path / "mine.yaml")}
    for words in (("ls", "tsks"), ("cp", "nothing", str(tmp_path)), ("cp", "bert/finetune-topics", str(wrong))):
        done = zoo(*words)
        assert done.returncode == 2 and done.stderr.startswith("zoo: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["ls"], ["ls", "models"], ["validate", "bert/finetune-topics"], ["schema"]])
def test_they_bring_in_no_framework(words):
    code = (
        f"import sys; sys.argv = {['zoo', *words]!r}\nimport cli\ntry:\n    cli.app()\nexcept SystemExit:\n    pass\n"
    )
    code += "print({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules), file=sys.stderr)"
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stderr.strip() == "set()" and done.stdout


# The schema


def written(name: str) -> dict:
    return YAML(typ="safe", pure=True).load(shipped_recipes()[name].read_text())


def test_the_schema_accepts_what_is_shipped_and_refuses_typos():
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    check = Draft202012Validator(schema)
    for name in shipped_recipes():
        assert list(check.iter_errors(written(name))) == []
    for section, key, value in (
        ("train", "learning_rat", 1e-4),
        ("train", "learning_rate", "1e-4"),
        ("train", "eval_strategy", "epochs"),
        ("train", "output_dir", "here"),
        ("task", "type", "text-clasification"),
        ("model", "ragged", "maybe"),
        ("data", "validation", 1.5),
    ):
        recipe = written("bert/finetune-topics")
        recipe[section][key] = value
        assert len(list(check.iter_errors(recipe))) == 1, (section, key)
    # a recipe with a base says only what differs
    assert list(check.iter_errors({"extends": "bert/finetune-topics", "model": {"ragged": "off"}})) == []
