"""The command line as a person meets it: exit statuses, words instead of tracebacks, one JSON object, a fast start."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file

from tests.commands import zoo
from zoo.console import ending
from zoo.errors import UserError

REPO = Path(__file__).parents[1]


def plain(*arguments: str, cwd: Path = REPO) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(REPO / "cli.py"), *arguments], cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def folder(tiny_bert, r8, tmp_path) -> Path:
    """With tiny.yaml, a recipe of a few seconds."""
    recipe = f"""
name: tiny
model: {{path: {tiny_bert}}}
task: {{type: text-classification, max_length: 32}}
data: {{path: {r8}, files: {{train: train.csv, test: test.csv}}}}
train:
  max_steps: 8
  per_device_train_batch_size: 8
  eval_strategy: steps
  eval_steps: 4
  save_steps: 4
  logging_steps: 1
  load_best_model_at_end: true
  metric_for_best_model: accuracy
"""
    (tmp_path / "tiny.yaml").write_text(recipe)
    return tmp_path


# Words


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["trian"], 2, "No such command 'trian'"),
        (["train"], 2, "Missing argument 'RECIPE'"),
        (["train", "tiny.yml"], 2, "tiny.yml: neither a file"),
        (["train", "bert/finetune-topic"], 2, "did you mean bert/finetune-topics?"),
        (["train", "."], 2, ".: is a directory (with tiny.yaml); name a recipe's .yaml file"),
        (["train", "tiny.yaml", "--smok"], 2, "No such option: --smok"),
        (["train", "tiny.yaml", "train.learning_rat=1"], 2, "did you mean learning_rate?"),
        (["train", "tiny.yaml", "train.learning_rate"], 2, "an override is written section.key=value"),
        (["train", "tiny.yaml", "train.resume_from_checkpoint=x"], 2, "add --resume to the command"),
        (["train", "tiny.yaml", "data.splits={test: train, train: train}"], 2, "one split has one use"),
        (["train", "tiny.yaml", "--output-dir", "tiny.yaml"], 2, "a file of that name exists"),
        (["train", "tiny.yaml", "--output-dir", "."], 2, "not empty, and not a run of zoo"),
        (["train", "tiny.yaml", "model.path=./nowhere"], 2, "no such file or directory"),
        (["train", "tiny.yaml", "model.path=no/such-model"], 2, "zoo: model no/such-model: "),
        (
            ["train", "tiny.yaml", "data.path=no/such-data", "data.files={}"],
            2,
            "zoo: data no/such-data: not in the cache, and HF_HUB_OFFLINE is set",
        ),
        (["train", "tiny.yaml", "data.columns.label=topic"], 2, "no column 'topic'; it has text, label"),
        (["train", "tiny.yaml", "model.attention=loca"], 2, "no variant is called loca; did you mean local?"),
        (["train", "tiny.yaml", "task.max_length=1"], 2, "task.max_length: 1"),
        (["train", "tiny.yaml", "model.attn_implementation=flash_attention_2"], 2, "model.attn_implementation: "),
        (["train", "tiny.yaml", "train.fp16=true", "train.eval_steps=3"], 2, "train: refused by transformers: "),
        (["train", "tiny.yaml", "train.learning_rate=1e30", "train.max_grad_norm=0.0"], 1, "the loss is nan at step 2"),
        (["predict", "nowhere", "a text"], 2, "nowhere: no such directory"),
        (["evaluate", "nowhere"], 2, "nowhere: no such directory"),
        (["evaluate", "."], 2, "not a finished run"),
        (["evaluate", ".", "--split", "tset"], 2, "it is one of train, validation, test"),
        (["bench", "finetune", "tiny.yaml", "--rounds", "0"], 2, "Invalid value for '--rounds'"),
        (["bench", "finetune", "tiny.yaml", "model.implementation=official"], 2, "must be native"),
        (["bench", "finetune", "tiny.yaml", "--max-length", "4096"], 2, "the model has 64 positions"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_words_for_what_is_wrong(folder, arguments, status, says):
    code, out, err = zoo(*arguments, cwd=folder)
    # a frame of rich may break a line anywhere
    assert (code, says.replace(" ", "")) == (status, says.replace(" ", "")) and says.replace(" ", "") in "".join(
        character for character in err if character not in "│╭╮╰╯─ "
    ), err
    assert not list(folder.glob("runs/*/model.safetensors"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "LONG"],
        ["validate", "LONG"],
        ["cp", "bert/finetune-topics", "LONG"],
        ["train", "tiny.yaml", "--output-dir", "LONG"],
        ["train", "tiny.yaml", "--smoke", "--output-dir", "below/LONG"],
        ["train", "tiny.yaml", "data.path=LONG"],
        ["train", "tiny.yaml", "data.path=./LONG"],
        ["train", "tiny.yaml", "data.path=pypi://LONG@1.0/x"],
        ["train", "tiny.yaml", "data.files={train: LONG, test: test.csv}"],
        ["train", "tiny.yaml", "model.path=LONG"],
        ["train", "tiny.yaml", "model.path=./LONG"],
        ["evaluate", "LONG"],
        ["evaluate", "TOPICS", "--data", "LONG"],
        ["predict", "TOPICS", "--file", "LONG"],
        ["predict", "TOPICS", "a text", "--output", "LONG"],
        ["push", "LONG", "me/topics", "--dry-run"],
    ],
    ids=" ".join,
)
def test_names_longer_than_files_may_have(folder, topics_run, arguments):
    arguments = [word.replace("LONG", "n" * 5000).replace("TOPICS", str(topics_run)) for word in arguments]
    code, out, err = zoo(*arguments, cwd=folder)
    assert code == 2 and "nnnn" in err


def test_standard_output_that_is_full(folder, topics_run):
    """Also where Python keeps what is printed until a command ends."""
    for arguments in (["ls"], ["ls", "--json"], ["validate", "nowhere", "--json"], ["schema"]):
        for unbuffered in ("", "1"):
            environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
            command = [sys.executable, str(REPO / "cli.py"), *arguments]
            with open("/dev/full", "w") as full:
                done = subprocess.run(
                    command, cwd=folder, stdout=full, stderr=subprocess.PIPE, text=True, env=environment
                )
            assert done.returncode == 1
            assert done.stderr == "zoo: No space left on device: make room where standard output goes, and the run\n"


def test_a_terminal_without_letters(folder, topics_run, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = plain("predict", str(topics_run), "café", cwd=folder)
    assert done.returncode == 0 and "caf\\xe9" in done.stdout
    done = plain("predict", str(topics_run), "café", "--json", cwd=folder)
    assert done.returncode == 0 and json.loads(done.stdout)[0]["text"] == "café"
    (folder / "tiny.yaml").write_text((folder / "tiny.yaml").read_text() + "  run_name: Zoë\n", encoding="utf-8")
    done = plain("validate", "tiny.yaml", "--resolved", cwd=folder)
    assert done.returncode == 0 and 'train.run_name: "Zo\\xeb"' in done.stdout


def test_the_file_itself_speaks_the_same_way(folder):
    done = plain("train", "tiny.yaml", "train.sed=1", cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "zoo: command line: train.sed=1: unknown key; did you mean seed?\n"


# Answers


def test_one_json_object(folder):
    code, out, err = zoo("train", "tiny.yaml", "--json", cwd=folder)
    assert code == 0, err
    answer = json.loads(out)
    assert answer.pop("directory") == "runs/tiny"
    assert answer == json.loads((folder / "runs" / "tiny" / "metrics.json").read_text())
    code, out, err = zoo("evaluate", "runs/tiny", "--json", cwd=folder)
    again = json.loads(out)
    assert code == 0 and again["test_accuracy"] == answer["test_accuracy"] and again["directory"] == "runs/tiny"
    code, out, err = zoo("train", "tiny.yaml", "--resume", "--json", cwd=folder)
    assert code == 0 and json.loads(out)["test_loss"] == answer["test_loss"]
    code, out, err = zoo("train", "tiny.yaml", "--json", cwd=folder)
    assert (code, out) == (2, "") and "holds a finished run; add --resume" in err
    code, out, err = zoo("evaluate", "runs/tiny", "--split", "validation", cwd=folder)
    assert code == 0 and f"{answer['eval_accuracy']:.4f}" in out and "validation_accuracy" in out


def test_numbers_that_json_has_no_word_for(folder):
    (folder / "mine.py").write_text("""
import datasets
import evaluate


class Mine(evaluate.Metric):
    def _info(self):
        features = {name: datasets.Value("int64") for name in ("predictions", "references")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(features))

    def _compute(self, predictions, references):
        return {"undefined": float("nan"), "endless": float("inf")}
""")
    metric = "task.metrics={./mine.py: {}}"
    train = ["train", "tiny.yaml", "train.max_steps=4", metric]
    for command in (train, [*train, "--resume"], ["evaluate", "runs/tiny", "--trust-remote-code"]):
        code, out, err = zoo(*command, "--json", cwd=folder)
        assert code == 0, err
        answer = json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
        assert answer["test_undefined"] is None and answer["test_endless"] is None and answer["test_loss"] > 0
    for file in ("metrics.json", "events.jsonl"):
        for line in (folder / "runs" / "tiny" / file).read_text().splitlines():
            assert "NaN" not in line and "Infinity" not in line
    code, out, err = zoo(*train, "--resume", cwd=folder)
    assert code == 0 and "nan" in out


def test_predict(folder):
    code, out, err = zoo("train", "tiny.yaml", "train.max_steps=4", cwd=folder)
    assert code == 0, err
    text = "wheat shipments rose"
    code, out, err = zoo("predict", "runs/tiny", text, text, "--json", cwd=folder)
    answers = json.loads(out)
    assert code == 0 and [answer["text"] for answer in answers] == [text, text]
    code, out, err = zoo("predict", "runs/tiny", text, cwd=folder)
    best = answers[0]["predicted"]
    assert (code, out) == (0, f"{best} {answers[0]['probabilities'][best]:.3f}  {text}\n")
    (folder / "new.csv").write_text(f"id,text\n7,{text}\n")
    code, out, err = zoo("predict", "runs/tiny", "--file", "new.csv", "--output", "answers.jsonl", cwd=folder)
    assert (code, out) == (0, "1 answers in answers.jsonl\n"), err
    assert json.loads((folder / "answers.jsonl").read_text()) == answers[0]
    code, out, err = zoo("predict", "runs/tiny", cwd=folder)
    assert (code, out) == (2, "") and "give texts (or image files), or --file" in err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_interrupted_and_resumed(folder, number, status):
    longer = ["train.max_steps=120", "train.eval_steps=10", "train.save_steps=20", "train.seed=5"]
    command = [sys.executable, str(REPO / "cli.py"), "train", "tiny.yaml", "--output-dir", "run", *longer]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a shell's background job, as these tests may be, ignores SIGINT, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(folder.glob("run/checkpoints/checkpoint-20/complete.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    steps = [int(path.name.partition("-")[2]) for path in (folder / "run" / "checkpoints").iterdir()]
    assert err.endswith(f"\nzoo: interrupted; step {max(steps)} is saved, continue with --resume\n")
    assert "Traceback" not in err and max(steps) < 120
    assert not (folder / "run" / "metrics.json").exists()
    for number, directory in enumerate(("run", "whole")):
        code, out, err = zoo("train", "tiny.yaml", "--output-dir", directory, "--resume", *longer, cwd=folder)
        assert code == 0, (number, err)
    ends = [load_file(folder / name / "model.safetensors") for name in ("run", "whole")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


def test_what_nobody_expected(monkeypatch, capsys):
    """The last net: a line and exit status 1, and the whole of it for those who ask."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(typer.Exit) as caught, ending():
            raise KeyError("nobody")
        said = capsys.readouterr().err
        assert caught.value.exit_code == 1 and said.startswith("zoo: unexpected KeyError: 'nobody' (test_cli.py:")
        assert "ZOO_DEBUG=1 shows the whole of it" in said and said.count("\n") == 1
        monkeypatch.setenv("ZOO_DEBUG", "1")
        with pytest.raises(KeyError), ending():
            raise KeyError("nobody")
        with pytest.raises(typer.Exit) as caught, ending():
            raise UserError("wrong")
        assert caught.value.exit_code == 2 and "Traceback" in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGTERM, handler)


# The start


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["bench", "finetune", "--help"]])
def test_help_is_there_at_once(arguments):
    """What takes seconds is importing these; times themselves are not asserted beside other tests."""
    code = f"import sys; sys.argv = {['zoo', *arguments]!r}\n"
    code += "import cli\ntry:\n    cli.app()\nexcept SystemExit:\n    pass\n"
    code += "print({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules), file=sys.stderr)"
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stderr.strip() == "set()" and "Usage:" in done.stdout


def cpu_seconds(*arguments: str, cwd: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = plain(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["ls"],
        ["ls", "models"],
        ["cp", "bert/finetune-topics", "copy.yaml", "--overwrite"],
        ["validate", "tiny.yaml"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_should_be_quick_takes_little_cpu(folder, arguments):
    """The least of several: other tests make a command wait, and its caches cold, but never quicker."""
    plain(*arguments, cwd=folder)
    assert min(cpu_seconds(*arguments, cwd=folder) for _ in range(6)) < 0.3


# The shipped recipes
