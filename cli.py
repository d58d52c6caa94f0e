"""The command line: parse, load the recipe, call one function of zoo, print."""

import io
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from zoo.adapter_commands import app as adapters
from zoo.bench.commands import app as bench
from zoo.console import AsJson, Overrides, RecipeName, Trusted, attention_kwargs_of, ending, only_json
from zoo.errors import UserError
from zoo.files import json_line
from zoo.quiet import quiet_libraries

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
app.add_typer(bench, name="bench")
app.add_typer(adapters, name="adapters")


@app.callback()
def main() -> None:
    """Train and adapt transformers from one recipe."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a text may hold what a terminal's encoding does not
        sys.stdout.reconfigure(errors="backslashreplace")


@app.command("ls")
def list_(
    kind: Annotated[str | None, typer.Argument(metavar="[recipes|models|attentions|tasks]")] = None,
    as_json: AsJson = False,
) -> None:
    """List shipped recipes, native models, attention variants and tasks; of models alone, their sizes too.

    Examples:

      zoo ls

      zoo ls models

      zoo ls recipes --json
    """
    with ending():
        from zoo.catalogue import as_text, listed

        entries = listed(kind)
        print(json_line(entries) if as_json else as_text(entries, details=kind is not None))


@app.command()
def cp(
    name: Annotated[str, typer.Argument(help="The name of a shipped recipe: zoo ls recipes.")],
    file: Annotated[Path, typer.Argument(help="Where to: a file, or a directory.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Copy a shipped recipe, to change it.

    Example:

      zoo cp bert/finetune-topics my-recipe.yaml
    """
    with ending():
        from zoo.catalogue import copy_recipe

        copied = copy_recipe(name, file, overwrite)
        print(json_line({"file": str(copied)}) if as_json else f"{copied}: run it with zoo train {copied}")


@app.command()
def validate(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Files, or names of shipped recipes.")],
    resolved: Annotated[bool, typer.Option("--resolved", help="Print each value, and where it comes from.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check recipes without loading anything; exit status 2 if one of them is wrong.

    Examples:

      zoo validate recipes/bert/*.yaml

      zoo validate my-recipe.yaml --resolved
    """
    with ending():
        from zoo.recipe_loading import validated

        results = [validated(name) for name in recipes]
        if as_json:
            print(json_line(results))
        for result in [] if as_json else results:
            for problem in result["problems"]:
                typer.secho(problem, err=True, fg="red")
            if result["valid"]:
                print(f"{result['recipe']}: valid")
            for key, value in result["values"].items() if resolved else ():
                print(f"  {key}: {json.dumps(value['value'], ensure_ascii=False)}  # {value['origin']}")
        if not all(result["valid"] for result in results):
            raise typer.Exit(2)


@app.command()
def schema(as_json: AsJson = False) -> None:
    """Print the JSON Schema of a recipe, for editors.

    Example:

      zoo schema > recipe.schema.json    # then, at a recipe's top: # yaml-language-server: $schema=recipe.schema.json
    """
    with ending():
        from zoo.recipe_loading import json_schema

        print(json.dumps(json_schema(), indent=None if as_json else 2))


@app.command()
def preview(
    recipe: RecipeName,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    rows: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Show what the model really sees of a recipe's first rows: tokens, and in colour what it learns.

    Green is learned as it stands there; red=green is shown the one and learns the other; what is dim is only read.

    Examples:

      zoo preview bert/finetune-topics

      zoo preview t5/pretrain-news --rows 1 task.mlm_probability=0.3
    """
    with ending(), only_json(as_json) as answer:
        _check_split(split)
        from zoo.recipe_loading import load_recipe

        loaded = load_recipe(recipe, overrides or [])
        quiet_libraries()
        from rich.console import Console

        from zoo.preview import in_colour, run

        samples = run(loaded, split, rows)
        if as_json:
            print(json_line(samples), file=answer)
        for sample in [] if as_json else samples:
            Console().print(in_colour(sample))


@app.command()
def tokenizer(
    recipe: RecipeName,
    overrides: Overrides = None,
    output_dir: Annotated[Path | None, typer.Option(help="Where it goes; default tokenizers/<name>.")] = None,
    as_json: AsJson = False,
) -> None:
    """Learn the tokenizer that a recipe describes under model.tokenizer, for several recipes to share.

    zoo train learns it by itself, and keeps it with the model.

    Examples:

      zoo tokenizer bert/pretrain-newsgroups

      zoo tokenizer my-recipe.yaml model.tokenizer='{type: t5, vocab_size: 8000, byte_fallback: true}'
    """
    with ending(), only_json(as_json) as answer:
        from zoo.recipe_loading import load_recipe

        loaded = load_recipe(recipe, overrides or [])
        directory = output_dir or Path("tokenizers") / loaded.name
        quiet_libraries()
        from zoo.tokenizer import run

        _report(run(loaded, directory), f"{loaded.name}: the tokenizer is in {directory}", as_json, answer, directory)


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    output_dir: Annotated[Path | None, typer.Option(help="Where the model goes; default runs/<name>.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Shrink the recipe to a few seconds, to try it.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output directory.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train by a recipe and evaluate the best checkpoint on the test split.

    Examples:

      zoo train bert/finetune-topics

      zoo train my-recipe.yaml train.num_train_epochs=3 --output-dir runs/three-epochs

      zoo train my-recipe.yaml --smoke
    """
    with ending(), only_json(as_json) as answer:
        from zoo.recipe_loading import load_recipe

        loaded = load_recipe(recipe, overrides or [])
        loaded = loaded.smoke() if smoke else loaded
        directory = output_dir or Path("runs") / (loaded.name + ("-smoke" if smoke else ""))
        quiet_libraries()
        if smoke and output_dir is None and not resume:
            # one trial takes the place of another
            from zoo.run_directory import discard

            discard(directory)
        if loaded.seeds:
            from zoo.seeds import run
        else:
            from zoo.train import run

        metrics = run(loaded, directory, resume)
        where = f"the models are in {directory}/seed-*" if loaded.seeds else f"the model is in {directory}"
        _report(metrics, f"{loaded.name}: {where}", as_json, answer, directory)


@app.command()
def evaluate(
    directory: Annotated[Path, typer.Argument(help="A directory that zoo train has made.")],
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    data: Annotated[str | None, typer.Option(help="Other data: a file, a directory or a hub id.")] = None,
    trust_remote_code: Trusted = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a finished model on a split of its data, or of other data with the same columns and labels.

    Examples:

      zoo evaluate runs/bert-finetune-topics

      zoo evaluate runs/bert-finetune-topics --data new.csv data.columns='{text: body, label: topic}'
    """
    with ending(), only_json(as_json) as answer:
        _check_split(split)
        quiet_libraries()
        from zoo.evaluation import run

        metrics = run(directory, split, overrides or [], data, trust_remote_code)
        _report(metrics, f"{directory} on {split}", as_json, answer, directory)


@app.command()
def predict(
    directory: Annotated[Path, typer.Argument(help="A directory that zoo train has made.")],
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts to answer for.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Rows with a column text (or as the task has): jsonl, csv, parquet, txt.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write JSON lines to this file; images made, beside it.")] = None,
    adapter: Annotated[
        list[Path] | None, typer.Option(help="Another run with an adapter of the same base, which answers too.")
    ] = None,
    trust_remote_code: Trusted = False,
    as_json: AsJson = False,
) -> None:
    """Predict with a finished model: labels, spans, numbers, masked words, vectors or answers.

    Examples:

      zoo predict runs/bert-finetune-topics "wheat shipments to the soviet union rose"

      zoo predict runs/bert-finetune-topics --file new.jsonl --output answers.jsonl

      zoo predict runs/topics-lora --adapter runs/topics-lora-16 "wheat shipments to the soviet union rose"
    """
    with ending(), only_json(as_json) as answer:
        quiet_libraries()
        from zoo import prediction

        pictures = None if output is None else output.with_name(f"{output.stem}-pictures")
        answers = prediction.run(directory, texts or [], file, trust_remote_code, pictures, adapter or [])
        if output is not None:
            count = prediction.write(answers, output)
            print(
                json_line({"file": str(output), "count": count}) if as_json else f"{count} answers in {output}",
                file=answer,
            )
        elif as_json:
            print(json_line(list(answers)), file=answer)
        else:
            for line in prediction.in_lines(answers):
                print(line, file=answer)


@app.command()
def quantize(
    directory: Annotated[Path, typer.Argument(help="A directory that zoo train has finished.")],
    method: Annotated[
        Literal["dynamic-int8", "smooth-int8", "bnb-int8", "bnb-nf4", "torchao-int8"],
        typer.Option(help="dynamic-int8 and smooth-int8 are faster on CPUs; the others smaller."),
    ] = "dynamic-int8",
    output_dir: Annotated[Path | None, typer.Option(help="DIRECTORY-METHOD unless given.")] = None,
    calibrate: Annotated[int, typer.Option(min=0, help="Rows of train that smooth-int8 reads.")] = 128,
    as_json: AsJson = False,
) -> None:
    """Give a finished model weights of 8 or 4 bits; say what it then reaches, how large it is, and how fast.

    Examples:

      zoo quantize runs/bert-finetune-topics

      zoo quantize runs/gpt2-pretrain-news --method smooth-int8 --calibrate 64
    """
    with ending(), only_json(as_json) as answer:
        quiet_libraries()
        from zoo import quantize as stage

        target = output_dir or directory.with_name(f"{directory.name}-{method}")
        report = stage.run(directory, method, target, calibrate)
        if as_json:
            print(json_line({"directory": str(target), **report}), file=answer)
        else:
            print(f"{stage.table(report)}\n\nthe model is in {target}", file=answer)


@app.command()
def transplant(
    directory: Annotated[Path, typer.Argument(help="A directory that zoo train has finished.")],
    overrides: Overrides = None,
    attention: Annotated[
        list[str] | None, typer.Option(help="A variant; several take turns: zoo ls attentions.")
    ] = None,
    attention_kwargs: Annotated[str | None, typer.Option(help="Parameters by variant, as JSON.")] = None,
    heal: Annotated[str | None, typer.Option(metavar="RECIPE", help="Whose train and distill heal it.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="DIRECTORY-ATTENTION unless given.")] = None,
    texts: Annotated[int, typer.Option(min=1, help="Texts to compare the attention on.")] = 64,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an unfinished run was.")] = False,
    as_json: AsJson = False,
) -> None:
    """Give a finished model another attention, say how far it is from full attention, and heal it.

    Examples:

      zoo transplant runs/bert-finetune-topics --attention linformer --attention-kwargs '{"linformer": {"rank": 64}}'

      zoo transplant runs/bert-finetune-topics --attention full --attention local --attention-kwargs
      '{"local": {"window": 32}}' train.num_train_epochs=2
    """
    with ending(), only_json(as_json) as answer:
        if not attention:
            raise UserError("transplant: give --attention; zoo ls attentions shows all")
        kwargs = attention_kwargs_of(attention_kwargs)
        quiet_libraries()
        from zoo import transplant as stage

        target = output_dir or directory.with_name(f"{directory.name}-{'-'.join(dict.fromkeys(attention))}")
        names = attention[0] if len(attention) == 1 else attention
        report = stage.run(directory, names, kwargs, target, heal, overrides or [], texts, resume)
        if as_json:
            print(json_line({"directory": str(target), **report}), file=answer)
        else:
            print(f"{stage.table(report)}\n\nthe model is in {target}", file=answer)


@app.command()
def push(
    directory: Annotated[Path, typer.Argument(help="A directory that zoo train has made, or one with an adapter.")],
    repo: Annotated[str, typer.Argument(help="name, or namespace/name; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="If it is made: for nobody else to see.")] = False,
    branch: Annotated[str | None, typer.Option(help="Commit to this branch instead of main.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Push a finished model to a hub, in one commit. The token is that of HF_TOKEN, or of hf auth login.

    Examples:

      zoo push runs/bert-finetune-topics me/topics --private

      HF_ENDPOINT=http://127.0.0.1:8080 zoo push runs/bert-finetune-topics topics
    """
    with ending(), only_json(as_json) as answer:
        quiet_libraries()
        from zoo import hub

        pushed = hub.push(directory, repo, private, branch, dry_run)
        if as_json:
            print(json_line(pushed), file=answer)
            return
        if dry_run:
            for name, size in pushed["files"].items():
                print(f"{size:>13,}  {name}")
        total = sum(pushed["files"].values())
        where = f"would go to {repo}" if dry_run else f"are in {pushed['url']}, commit {pushed['commit'][:8]}"
        print(f"{len(pushed['files'])} files, {total / 2**20:,.1f} MiB, {where}")


@app.command()
def serve(
    directory: Annotated[Path, typer.Argument(help="Where the repositories are, or will be.")],
    host: Annotated[
        str, typer.Option(help="The address to listen at. Others than local ones see everything public.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    owner: Annotated[str, typer.Option(help="The namespace of repositories named without one.")] = "zoo",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the address as a JSON object, once it listens.")
    ] = False,
) -> None:
    """Serve a hub from a directory, to the stock clients. It holds models and data sets.

    Writing wants a token: the one in ZOO_HUB_TOKEN, or a new one that is printed at the start.

    Example:

      zoo serve hub    # then, elsewhere: export HF_ENDPOINT=... HF_TOKEN=... as it prints
    """
    with ending(), only_json(as_json) as answer:
        from zoo.service.server import run

        def say(address: str) -> None:
            if as_json:
                print(json_line({"address": address, "directory": str(directory)}), file=answer, flush=True)

        run(directory, host, port, owner, say)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Look at versions, devices, caches and the hub; each problem with its remedy. Exit status 1 if there is one.

    Example:

      zoo doctor
    """
    with ending(), only_json(as_json) as answer:
        quiet_libraries()
        from zoo.doctor import examine

        findings = examine()
        if as_json:
            print(json_line([asdict(finding) for finding in findings]), file=answer)
        for finding in [] if as_json else findings:
            print(f"{'!' if finding.problem else ' '} {finding.name:<16} {finding.value}")
            if finding.problem:
                print(f"  {'':<16} {finding.problem}")
        problems = sum(finding.problem is not None for finding in findings)
        if not as_json:
            print(f"{problems} problem{'' if problems == 1 else 's'} found" if problems else "no problem found")
        if problems:
            raise typer.Exit(1)


@app.command()
def baseline(
    recipe: RecipeName,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="validation or test.")] = "test",
    as_json: AsJson = False,
) -> None:
    """What the simplest methods reach on a recipe's data: the largest class, TF-IDF, a sentence of the text, bigrams.

    Examples:

      zoo baseline bert/finetune-topics

      zoo baseline gpt2/pretrain-news
    """
    with ending(), only_json(as_json) as answer:
        from zoo.recipe_loading import load_recipe

        loaded = load_recipe(recipe, overrides or [])
        quiet_libraries()
        from zoo.baselines import run

        _check_split(split)

        found = run(loaded, split)
        if as_json:
            print(json_line(found), file=answer)
            return
        width = max(map(len, found))
        for name, metrics in found.items():
            print(f"{name:<{width}}  " + "  ".join(f"{metric} {value:.4f}" for metric, value in metrics.items()))


def _check_split(split: str) -> None:
    if split not in ("train", "validation", "test"):
        raise UserError(f"--split {split}: it is one of train, validation, test")


def _report(metrics: dict[str, Any], title: str, as_json: bool, answer, directory: Path) -> None:
    if as_json:
        print(json_line({"directory": str(directory), **metrics}), file=answer)
        return
    from rich.console import Console

    from zoo.report import metrics_table

    Console().print(metrics_table(metrics, title))


if __name__ == "__main__":
    app()
