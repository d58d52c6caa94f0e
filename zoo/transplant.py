"""`zoo transplant`: another attention in a finished model, how far it is from full attention, and its healing.

The new attention begins with the queries, keys and values of the old one. How far its output is, layer by layer and
head by head, is measured on texts of the model's own data, each layer given what the old model gives it. Healing is a
short training that learns from the old model, its answers and the states of its layers (`distill`).
"""

import json
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from zoo import stages, train
from zoo.distillation import WITHOUT_LOGITS
from zoo.errors import UserError
from zoo.files import write_json
from zoo.loading import load_model
from zoo.model_directory import RECIPE, Finished, collate_of, open_finished, read_metrics, tested_rows
from zoo.models.attention_variants import ATTENTIONS, FULL, pattern_of, variant_of_layer
from zoo.models.pretrained import ZooPreTrainedModel
from zoo.recipe import Recipe
from zoo.recipe_loading import load_recipe
from zoo.run_directory import check_directory
from zoo.sections import DistillSection
from zoo.tasks import task_of
from zoo.variants import contradictions

REPORT = "transplant.json"
# what is learned from the old model unless the healing recipe says otherwise
HEAL: dict[str, Any] = {"labels": 1.0, "logits": 1.0, "hidden": 1.0}


@dataclass(frozen=True)
class Distance:
    """Of one layer: the relative error of its attention's output, and that of each head; what no error can be above.

    Only a pattern has bounds: see `bound`.
    """

    layer: str
    error: float
    heads: list[float]
    bound: float | None = None
    head_bounds: list[float] | None = None


def run(
    directory: Path,
    attention: str | list[str],
    attention_kwargs: dict[str, dict[str, Any]],
    output_dir: Path,
    heal: str | None = None,
    overrides: Sequence[str] = (),
    texts: int = 64,
    resume: bool = False,
) -> dict[str, Any]:
    """The report: errors by layer and head, and the test metrics before, after the swap and after healing.

    heal: a recipe whose `train` and `distill` the healing takes; the model's own where none is given. overrides:
    `section.key=value` on the recipe that heals. Raises UserError where the model cannot take the attention.
    """
    names = [attention] if isinstance(attention, str) else attention
    for keys, text in contradictions({"attention": names}, attention_kwargs):
        raise UserError(f"transplant: {'.'.join(map(str, keys))}: {text}")
    finished = open_finished(directory)
    _check(finished, directory)
    recipe = healing_recipe(directory, attention, attention_kwargs, heal, overrides)
    swapped = load_model(recipe.model, finished.task.auto_class, finished.labels, finished.task.problem_type)
    check_directory(recipe, output_dir, resume)
    distances = list(errors(finished, swapped, texts))
    report: dict[str, Any] = {
        "model": str(directory),
        "attention": attention,
        "attention_kwargs": attention_kwargs,
        "texts": texts,
        "layers": [vars(distance) for distance in distances],
        "before": _of_test(read_metrics(directory)),
        "after_swap": _of_test(stages.measured(finished, swapped)),
    }
    metrics = train.run(recipe, output_dir, resume)
    report["after_healing"] = _of_test(metrics)
    write_json(output_dir / REPORT, report)
    return report


def _check(finished: Finished, directory: Path) -> None:
    """Raises UserError for a model whose attention cannot be swapped, or that no teacher heals."""
    model, task = finished.model, finished.task
    if finished.recipe.lora:
        raise UserError(f"transplant: {directory} is an adapter; its base is what has attention")
    if not isinstance(model, ZooPreTrainedModel):
        raise UserError(f"transplant: {directory} has an official class, which knows full attention only")
    if model.config.is_encoder_decoder or task.learn is not None:
        what = "a model with an encoder and a decoder" if task.learn is None else task.name
        raise UserError(f"transplant: {what} learns from no teacher; train it with model.attention instead")
    own = model.config.attention
    if set([own] if isinstance(own, str) else own) != {FULL}:
        raise UserError(f"transplant: {directory} has {own!r} attention already, not full")


def healing_recipe(
    directory: Path,
    attention: str | list[str],
    attention_kwargs: dict[str, dict[str, Any]],
    heal: str | None,
    overrides: Sequence[str],
) -> Recipe:
    """The recipe of a finished run, on its model with another attention, which learns from that model."""
    own = load_recipe(str(directory / RECIPE))
    asked = {key.partition("=")[0] for key in overrides}
    for key in asked:
        if key.partition(".")[0] not in ("train", "distill"):
            raise UserError(f"{key}: healing does not read it; it takes train and distill")
    teacher = f"distill.teacher={json.dumps(str(directory))}"
    with_keys = load_recipe(heal or str(directory / RECIPE), [*overrides, teacher])
    kind = with_keys.task.problem_type
    quiet = task_of(own.task).auto_class in WITHOUT_LOGITS or kind in ("regression", "multi_label_classification")
    heal_by = HEAL | ({"logits": 0.0} if quiet else {})
    short: dict[str, Any] = {}
    if heal is None and not {"train.num_train_epochs", "train.max_steps"} & asked:
        short = {"num_train_epochs": 1, "max_steps": -1}
    said = own.model_dump() | {"train": with_keys.train | short, "seeds": []}
    names = attention if isinstance(attention, str) else "-".join(dict.fromkeys(attention))
    said["name"] = f"{own.name}-{names}"
    said["model"] |= {
        **dict.fromkeys(("size", "tokenizer", "revision")),
        "path": str(directory), "added_tokens": [], "config": {}, "attention": attention,
        "attention_kwargs": attention_kwargs,
        # the checkpoint keeps its blocks
        "block": None,
    }  # fmt: skip
    # a trial is no new version of what was published
    said["hub"] = {}
    written = own.distill if heal is None else load_recipe(heal).distill
    plain = written == DistillSection(teacher=written.teacher)
    kept = {key for key in heal_by if plain and f"distill.{key}" not in asked}
    said["distill"] = with_keys.distill.model_dump() | {key: heal_by[key] for key in kept}
    return Recipe.model_validate(said)


def errors(finished: Finished, swapped: nn.Module, texts: int) -> Iterator[Distance]:
    """Of each attention layer in turn, over the first `texts` rows that the model was tested on, one at a time."""
    _, rows = tested_rows(finished)
    count = min(texts, len(rows))
    collate = collate_of(finished)
    names = [name for name, module in finished.model.named_modules() if hasattr(module, "self_attn")]
    sums: dict[tuple[str, int], torch.Tensor] = {}
    for model in (finished.model, swapped):
        model.eval()
    with torch.no_grad(), _weighing(finished.model), _padded(swapped):
        for number in tqdm(range(count), desc="Comparing attention", unit="text"):
            batch = collate([rows[number]])
            batch = {key: x for key, x in batch.items() if key != "row"}
            before, after, bounds = _outputs(finished.model, swapped, names, batch)
            for (place, wanted), (_, found), highest in zip(before, after, bounds, strict=True):
                difference, size = ((x.square().sum((0, 2))) for x in (found - wanted, wanted))
                # (3, heads)
                of_text = torch.stack([difference, size, highest])
                sums[place] = sums.get(place, torch.zeros_like(of_text)) + of_text
    for (name, turn), (difference, size, highest) in sums.items():
        size = size.clamp(min=1e-30)
        heads, head_bounds = (difference / size).sqrt(), (highest / size).sqrt()
        whole, bound = (float((x.sum() / size.sum()).sqrt()) for x in (difference, highest))
        # a layer that runs several times (ALBERT) is told apart by its turn
        layer = name if turn == 0 else f"{name} (turn {turn + 1})"
        bounded = not bool(highest.isnan().any())
        yield Distance(layer, whole, heads.tolist(), *((bound, head_bounds.tolist()) if bounded else ()))


@contextmanager
def _weighing(model) -> Iterator[None]:
    """Attention tells its weights meanwhile, which only the eager one has."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with _padded(model):
            yield
    finally:
        model.set_attn_implementation(implementation)


@contextmanager
def _padded(model) -> Iterator[None]:
    """States are (batch, length, hidden) meanwhile, never packed."""
    ragged = model._ragged
    model.set_ragged("off")
    try:
        yield
    finally:
        model.set_ragged(ragged)


def bound(weights: torch.Tensor, values: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """What the squared error of a pattern's output cannot exceed, summed over the queries: (heads,).

    With m of the weight on keys that the pattern hides, full attention is (1 - m) p + m h, where p is what the
    pattern gives and h what it leaves out: the two differ by m |h - p|, and h and p, means of values, lie no further
    apart than the values do: twice the largest distance from their centre.

    weights: (heads, queries, keys); values: (heads, keys, head_dim); visible: (heads or 1, queries, keys).
    """
    hidden = weights.masked_fill(visible, 0.0).sum(-1)
    apart = 2 * (values - values.mean(1, keepdim=True)).norm(dim=-1).amax(1)
    return (hidden * apart[:, None]).square().sum(-1)


def _bound_of(attention, layer: int, weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`bound` of a layer that has a pattern now; NaN of one that has none. values: (1, tokens, width)."""
    heads, queries, keys = weights.shape[1:]
    name = variant_of_layer(attention.config, layer)
    if name in ATTENTIONS:
        return weights.new_full((heads,), math.nan)
    own = values[0].unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
    own = own.repeat_interleave(attention.num_key_value_groups, 0)
    if name == FULL:
        return weights.new_zeros(heads)
    pattern = pattern_of(attention.config, name, attention.is_causal, layer)
    places = torch.arange(keys, device=weights.device)
    of_head = torch.arange(heads, device=weights.device)[:, None, None]
    return bound(weights[0], own, pattern(places[:queries, None], places[None, :], of_head))


def _outputs(model, swapped, names: list[str], batch: dict[str, Any]):
    """((layer, turn), (tokens, heads, head_dim)) of the attention of both, where each layer of `swapped` gets the
    states that the layer of `model` gets; and the bound of each."""
    entering: dict[str, deque] = {name: deque() for name in names}
    found: list[list] = [[], []]
    bounds: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    turns: list[dict[str, int]] = [{}, {}]

    def keep(side: int, name: str, heads: int):
        def hook(module, args):
            turn = turns[side].get(name, 0)
            turns[side][name] = turn + 1
            found[side].append(((name, turn), args[0].reshape(-1, heads, args[0].shape[-1] // heads)))

        return hook

    def weigh(attention):
        # a layer that runs several times (ALBERT) has another pattern each time
        return lambda module, args, output: bounds.append(_bound_of(attention, len(bounds), output[1], values.pop()))

    with ExitStack() as hooks:
        for side, one in enumerate((model, swapped)):
            for name in names:
                block = one.get_submodule(name)
                heads = one.config.num_attention_heads
                made = [block.self_attn.o_proj.register_forward_pre_hook(keep(side, name, heads))]
                if side == 0:
                    made.append(block.register_forward_pre_hook(_taker(entering[name])))
                    made.append(block.self_attn.v_proj.register_forward_hook(lambda m, a, out: values.append(out)))
                    other = swapped.get_submodule(name).self_attn
                    made.append(block.self_attn.register_forward_hook(weigh(other)))
                else:
                    made.append(block.register_forward_pre_hook(_giver(entering[name])))
                for hook in made:
                    hooks.callback(hook.remove)
            # asked for all states, so that the last layer computes more than the first token
            one(**batch, output_hidden_states=True)
    return *found, bounds


def _taker(queue: deque):
    return lambda module, args: queue.append(args[0])


def _giver(queue: deque):
    return lambda module, args: (queue.popleft(), *args[1:])


def _of_test(metrics: dict[str, Any]) -> dict[str, Any]:
    """The measured quality, of the test split where there is one."""
    timed = ("runtime", "per_second", "epoch")
    kept = {name: value for name, value in metrics.items() if not name.endswith(timed)}
    of_test = {name: value for name, value in kept.items() if name.startswith("test_")}
    return of_test or {name: value for name, value in kept.items() if name.startswith("eval_")}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["| layer | error | at most | head by head |", "|---|---|---|---|"]
    for layer in report["layers"]:
        heads = " ".join(f"{error:.2f}" for error in layer["heads"])
        highest = "" if layer["bound"] is None else f"{layer['bound']:.2f}"
        lines.append(f"| {layer['layer']} | {layer['error']:.3f} | {highest} | {heads} |")
    lines += ["", "| metric | before | after the swap | after healing |", "|---|---|---|---|"]
    for name, before in report["before"].items():
        cells = [report[when].get(name) for when in ("after_swap", "after_healing")]
        lines.append(f"| {name} | {before:.4f} | " + " | ".join("" if x is None else f"{x:.4f}" for x in cells) + " |")
    return "\n".join(lines)
