"""`zoo adapters ...`: parse, call one function of zoo, print."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from zoo.console import AsJson, ending, only_json
from zoo.files import json_line
from zoo.quiet import quiet_libraries

app = typer.Typer(
    no_args_is_help=True, help="What a recipe's section lora has left: merge an adapter into its base, or rename it."
)


@app.callback()
def main() -> None:
    """Adapters of finished runs."""


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
