"""What README and docs show is run: the notebook, the commands, the Python."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

import cli
from tests.commands import zoo
from tests.conftest import read_r8, write_csv

REPO = Path(__file__).parents[1]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
# they take minutes, begin a server that does not end, or want a hub: that they parse is looked at, and what they do is
# tested where the verb is
NOT_RUN = ("zoo bench", "zoo serve", "zoo push runs/bert-finetune-topics me/topics --private")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            lines = [line.partition("  #")[0].strip() for line in block.splitlines()]
            found += [line for line in lines if re.search(r"(^|&& |\S=\S+ )zoo ", line)]
    return list(dict.fromkeys(found))


def test_commands_are_found():
    verbs = {word.split()[1] for word in commands()}
    shown = {command.name or command.callback.__name__ for command in cli.app.registered_commands} | {"bench"}
    assert shown - {"schema", "cp"} <= verbs, f"not shown: {shown - verbs}"


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    """Verb, arguments and options are those of the command line."""
    words = [word for word in shlex.split(command.partition(" > ")[0]) if "=" not in word or not word[0].isupper()]
    group = typer.main.get_command(cli.app)
    context = group.make_context("zoo", words[1:], resilient_parsing=False)
    name, found, rest = group.resolve_command(context, list(context._protected_args) + list(context.args))
    while hasattr(found, "resolve_command"):
        context = found.make_context(name, rest, parent=context)
        name, found, rest = found.resolve_command(context, list(context._protected_args) + list(context.args))
    found.make_context(name, rest, parent=context)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder in which the commands can run: a finished run of the real recipe in small, and files they name."""
    folder = tmp_path_factory.mktemp("docs")
    run(folder, "zoo train bert/finetune-topics --smoke --output-dir runs/bert-finetune-topics")
    write_csv(folder / "new.csv", read_r8("test", 12), ("body", "topic"))
    texts = [{"text": text} for text, _ in read_r8("test", 3)]
    (folder / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    run(folder, "zoo cp bert/finetune-topics my-topics.yaml")
    return folder


def run(folder: Path, command: str) -> str:
    words = shlex.split(command)
    assert words[0] == "zoo"
    # a training of some hours is tried in small
    small = ["--smoke"] if words[1] == "train" and "--smoke" not in words else []
    if words[1] == "train" and "--resume" in words:
        words += ["--output-dir", "runs/bert-finetune-topics"]
    status, out, err = zoo(*words[1:], *small, cwd=folder)
    # doctor finds that no hub is there
    assert status == 0 or words[1] == "doctor", out + err
    return out


@pytest.mark.parametrize("command", [line for line in commands() if not line.startswith(NOT_RUN)])
def test_commands_run(place, command):
    line, _, target = command.partition(" > ")
    shutil.rmtree(place / "runs" / "longer", ignore_errors=True)
    if "cp " in line:
        (place / line.split()[-1]).unlink(missing_ok=True)
    said = run(place, line)
    assert said.strip()
    if target:
        (place / target).write_text(said)


def test_the_python_of_the_readme_runs(place):
    for block in blocks(REPO / "README.md", "python"):
        if "google-bert" in block:
            # no hub here: an official BERT of this machine in its place
            block = block.replace('"google-bert/bert-base-uncased"', '"runs/bert-finetune-topics"')
        python(place, block)


def test_the_notebook_runs(place):
    notebook = json.loads((REPO / "docs" / "python.ipynb").read_text())
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    said = python(place, "\n".join(code))
    assert "did you mean learning_rate?" in said and "5e-05 command line" in said


def python(folder: Path, code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
