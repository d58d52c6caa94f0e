"""`zoo bench`: its commands."""

import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from zoo.console import AsJson, Overrides, attention_kwargs_of, ending, only_json
from zoo.errors import UserError
from zoo.files import json_line
from zoo.quiet import quiet_libraries

app = typer.Typer(no_args_is_help=True, help="Measure native against official classes, interleaved in one process.")

Family = Annotated[str | None, typer.Option(help="A native family, in six layers of width 384: zoo ls models.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds, each both sides; the median counts.")]
Steps = Annotated[int, typer.Option(min=2, help="Training steps a side and round, after one to warm up.")]
Profile = Annotated[bool, typer.Option("--profile", help="Where a training step's time goes, instead.")]
Lengths = Annotated[list[int] | None, typer.Option(help="Tokens a text; repeatable. The recipe's own if not given.")]
NoDropout = Annotated[bool, typer.Option("--no-dropout", help="On neither side.")]


@app.command("finetune")
def finetune(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A recipe, or use --family.")] = None,
    overrides: Overrides = None,
    family: Family = None,
    max_length: Lengths = None,
    rounds: Rounds = 5,
    steps: Steps = 4,
    profile: Profile = False,
    no_dropout: NoDropout = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tuning and evaluation speed of a recipe as it stands, or of a family on topics of news.

    Examples:

      zoo bench finetune bert/finetune-topics --max-length 128 --max-length 256

      zoo bench finetune --family roberta train.per_device_train_batch_size=16

      zoo bench finetune bert/finetune-topics --profile
    """
    with ending(), only_json(as_json) as answer:
        if family is not None and recipe is not None and "=" in recipe:
            # the first of the overrides, where a recipe would stand
            overrides, recipe = [recipe, *(overrides or [])], None
        if (recipe is None) == (family is None):
            raise UserError("bench finetune: give a recipe, or --family; one of the two")
        from zoo.bench import settings
        from zoo.recipe_loading import load_recipe

        if recipe is not None:
            setting = settings.of_recipe(load_recipe(recipe, overrides or []))
        else:
            setting = settings.finetuning(str(family), overrides or [])
        _bench(setting, max_length, rounds, steps, profile, no_dropout, as_json, answer)


@app.command("pretrain")
def pretrain(
    family: Annotated[str, typer.Option(help="A native family, in six layers of width 384: zoo ls models.")],
    overrides: Overrides = None,
    max_length: Lengths = None,
    rounds: Rounds = 5,
    steps: Steps = 4,
    profile: Profile = False,
    no_dropout: NoDropout = False,
    as_json: AsJson = False,
) -> None:
    """Pretraining speed: masked words for the encoders, the next word for GPT in full rows, pairs of texts for T5.

    Examples:

      zoo bench pretrain --family bert

      zoo bench pretrain --family gpt2 --no-dropout
    """
    with ending(), only_json(as_json) as answer:
        from zoo.bench import settings

        setting = settings.pretraining(family, overrides or [])
        _bench(setting, max_length, rounds, steps, profile, no_dropout, as_json, answer)


@app.command("images")
def images(
    overrides: Overrides = None,
    rounds: Rounds = 5,
    steps: Steps = 4,
    profile: Profile = False,
    as_json: AsJson = False,
) -> None:
    """Training and evaluation speed of ViT on images of 224 pixels.

    Example:

      zoo bench images model.size=vit-small-patch16-224
    """
    with ending(), only_json(as_json) as answer:
        from zoo.bench import settings

        _bench(settings.images(overrides or []), None, rounds, steps, profile, False, as_json, answer)


@app.command("generate")
def generate(
    family: Annotated[str, typer.Option(help="gpt2 or t5.")],
    rounds: Rounds = 5,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to write.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Milliseconds a token of greedy generation, beside those of its matrix products alone.

    Example:

      zoo bench generate --family gpt2
    """
    with ending(), only_json(as_json) as answer:
        quiet_libraries()
        from zoo.bench import generation

        result = generation.run(family, rounds, new_tokens)
        print(json_line(result) if as_json else generation.table(result), file=answer)


@app.command("attention")
def attention(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Variants; all if none.")] = None,
    length: Annotated[list[int] | None, typer.Option(min=1, help="Tokens; repeatable.")] = None,
    attention_kwargs: Annotated[str | None, typer.Option(help="Parameters by variant, as JSON.")] = None,
    causal: Annotated[bool, typer.Option("--causal", help="As in a decoder.")] = False,
    heads: Annotated[int, typer.Option(min=1)] = 12,
    width: Annotated[int, typer.Option(min=1, help="Of a head.")] = 64,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of all that is computed.")
    ] = "float32",
    rounds: Rounds = 5,
    png: Annotated[Path | None, typer.Option(help="Draw the curves into this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time and memory of each attention by length, beside torch's fused full attention.

    Examples:

      zoo bench attention

      zoo bench attention local performer --length 4096 --length 8192 --causal

      zoo bench attention linformer --attention-kwargs '{"linformer": {"rank": 128}}' --png curves.png

      zoo bench attention local linear --length 32768 --dtype bfloat16
    """
    with ending(), only_json(as_json) as answer:
        quiet_libraries()
        from zoo.bench import attention as measured

        kwargs = attention_kwargs_of(attention_kwargs)
        found = measured.run(names or [], length or measured.LENGTHS, rounds, heads, width, causal, kwargs, dtype)
        if png is not None:
            measured.draw(found, png)
        print(json_line(found) if as_json else measured.table(found), file=answer)


def _bench(
    setting, max_length, rounds: int, steps: int, profile: bool, no_dropout: bool, as_json: bool, answer
) -> None:
    quiet_libraries()
    from zoo.bench import training

    setting = replace(setting, dropout=not no_dropout)
    # what reading the data says is no part of the answer
    with redirect_stdout(sys.stderr):
        if profile:
            found: Any = training.profile(setting, max_length or [], steps)
        else:
            found = training.run(setting, max_length or [], rounds, steps)
    shown = training.profile_table if profile else training.table
    print(json_line(found) if as_json else shown(found), file=answer)
