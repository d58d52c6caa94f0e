"""`zoo adapters ...`: parse, call one function of zoo, print."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from zoo.console import AsJson, ending, only_json
from zoo.files import json_line
from zoo.quiet import quiet_libraries

app = typer.Typer(
    no_args_is_help=True, help="What a recipe's section lora has left: list, combine, rename adapters, or merge them."
)


@app.callback()
def main() -> None:
    """Adapters of finished runs."""


@app.command("list")
def list_adapters(
    directory: Annotated[Path, typer.Argument(help="A finished run, or a directory of runs.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Which adapters there are, of which base, and what they reach.

    Examples:

      zoo adapters list

      zoo adapters list runs/topics-lora --json
    """
    with ending(), only_json(as_json) as answer:
        from zoo import adapter_list

        found = adapter_list.run(directory)
        if as_json:
            print(json_line(found), file=answer)
            return
        for one in found:
            rank, targets = f" {one['r']}" if one["r"] else "", ", ".join(one["targets"]) or "the input"
            what = f"{one['type']}{rank} on {targets}"
            name, value = next(iter(one["metrics"].items()), ("untested", None))
            measured = name if value is None else f"{name} {value:.4f}"
            base = f"{one['model']} {one['base']}, {one['implementation']}"
            print(f"{one['directory']}  {what}  {one['bytes'] / 2**20:.1f} MiB  {measured}  of {base}", file=answer)
        if not found:
            print(f"{directory}: no adapters; a recipe with a section lora makes one", file=answer)


@app.command()
def combine(
    directories: Annotated[list[Path], typer.Argument(help="Directories with LoRA adapters of one base.")],
    weight: Annotated[list[float], typer.Option(help="Of each, in their order.")],
    output_dir: Annotated[Path, typer.Option(help="For the adapter that they make.")],
    combination_type: Annotated[str, typer.Option(help="peft's: cat, svd, linear, ties, dare_ties, ...")] = "cat",
    density: Annotated[float | None, typer.Option(min=0, max=1, help="What ties, dare and pruning leave.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make one adapter of several, their weighted sum, and measure it on the test rows of the first.

    cat is that sum and stacks their ranks, svd rounds it to the largest rank; the others are peft's.

    Examples:

      zoo adapters combine runs/a runs/b --weight 0.5 --weight 0.5 --output-dir runs/both

      zoo adapters combine runs/a runs/b --weight 1 --weight 1 --combination-type ties --density 0.3 --output-dir runs/c
    """
    with ending(), only_json(as_json) as answer:
        quiet_libraries()
        from zoo import merging

        report = merging.combine(directories, weight, output_dir, combination_type, density)
        if as_json:
            print(json_line({"directory": str(output_dir), **report}), file=answer)
        else:
            name, value = next((n, x) for n, x in report.items() if n != "r")
            print(f"an adapter of rank {report['r']}, {name} {value:.4f}, is in {output_dir}", file=answer)


@app.command()
def merge(
    directory: Annotated[Path, typer.Argument(help="A directory that zoo train has finished, with an adapter.")],
    output_dir: Annotated[Path | None, typer.Option(help="DIRECTORY-merged unless given.")] = None,
    texts: Annotated[int, typer.Option(min=1, help="Rows to compare outputs on.")] = 64,
    bound: Annotated[float, typer.Option(min=0, help="Refuse a larger difference, over the largest output.")] = 1e-3,
    as_json: AsJson = False,
) -> None:
    """Make an adapter part of its base, if outputs stay what they are: a whole model, which any tool opens.

    Examples:

      zoo adapters merge runs/topics-lora

      zoo adapters merge runs/topics-lora --output-dir runs/topics
    """
    with ending(), only_json(as_json) as answer:
        quiet_libraries()
        from zoo import merging

        target = output_dir or directory.with_name(f"{directory.name}-merged")
        report = merging.run(directory, target, texts, bound)
        if as_json:
            print(json_line({"directory": str(target), **report}), file=answer)
        else:
            said = f"outputs of {report['texts']} rows differ by {report['difference']:.1e} of the largest at most"
            print(f"{said}; the model is in {target}", file=answer)


@app.command()
def rename(
    directory: Annotated[Path, typer.Argument(help="A directory that zoo train has finished, with an adapter.")],
    to: Annotated[Literal["native", "official"], typer.Option(help="The class whose names it gets.")],
    output_dir: Annotated[Path | None, typer.Option(help="DIRECTORY-TO unless given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Give an adapter the names of the other class, so that it opens there: official by peft and transformers alone.

    Examples:

      zoo adapters rename runs/topics-lora --to official
    """
    with ending(), only_json(as_json) as answer:
        quiet_libraries()
        from zoo import adapter_names

        target = output_dir or directory.with_name(f"{directory.name}-{to}")
        report = adapter_names.run(directory, to, target)
        if as_json:
            print(json_line({"directory": str(target), **report}), file=answer)
        else:
            print(
                f"{report['layers']} layers have the names of the {to} class; the adapter is in {target}", file=answer
            )
