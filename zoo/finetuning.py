"""Which parts of a model are trained, how fast and from when on: what a recipe's section `finetune` says.

Learning rates that fall towards the input, and layers that join from the top, are ULMFiT's (Howard & Ruder 2018, arXiv
1801.06146, sections 3.2 and 3.3); one rate of decay for all layers is ELECTRA's (Clark et al. 2020, arXiv 2003.10555,
appendix B).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from zoo.errors import UserError
from zoo.sections import FinetuneSection

EMBEDDINGS = -1


class Place(NamedTuple):
    """Where a parameter stands.

    stack: the name of its list of layers, "" of embeddings and head. layer: its number there, EMBEDDINGS, or None of
    the head. distance: how far below the head, which has 0; the last layer of each stack has 1.
    """

    stack: str
    layer: int | None
    distance: int


def places(model: nn.Module) -> dict[str, Place]:
    """Of each parameter. Embeddings are all that a model has before its first layer; the head is what is left, the norm
    behind the last layer included. A tied weight is where it is first."""
    stacks: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in stacks):
            stacks[name] = len(module)
    found, begun = {}, False
    for name, _ in model.named_parameters():
        stack = next((stack for stack in stacks if name.startswith((f"{stack}.", _beside(stack)))), None)
        if stack is not None:
            inside = name.removeprefix(f"{stack}.")
            layer = 0 if name == inside else int(inside.partition(".")[0])
            found[name], begun = Place(stack, layer, stacks[stack] - layer), True
        else:
            found[name] = Place("", None, 0) if begun else Place("", EMBEDDINGS, max(stacks.values(), default=0) + 1)
    return found


def _beside(stack: str) -> str:
    """Of a native T5: its position biases, which official classes have in the first layer."""
    return f"{stack.rpartition('.')[0]}.relative_attention_bias."


def apply(model: PreTrainedModel, section: FinetuneSection) -> list[str]:
    """Freezes what stays as it is; returns what is trained, in words. Raises UserError for what the model has not."""
    kept, every = section.freeze, section.gradual_unfreezing
    if not any((section.layerwise_decay, every, kept.embeddings, kept.layers)):
        return []
    where = places(model)
    counts = {place.stack: place.layer + place.distance for place in where.values() if place.layer not in (None, -1)}
    _check(model, section, counts)
    for name, parameter in model.named_parameters():
        layer = where[name].layer
        below = layer is not None and (kept.embeddings if layer == EMBEDDINGS else layer < kept.layers)
        parameter.requires_grad_(parameter.requires_grad and not below)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not any(parameter.ndim > 1 for parameter in trained.values()):
        raise UserError("finetune.freeze: nothing is left to train but norms and biases; freeze less")
    whole, part = (sum(p.numel() for p in some) for some in (model.parameters(), trained.values()))
    names = list(_parts([where[name] for name in trained]))
    notes = [f"trained: {_millions(part)} of {_millions(whole)} parameters ({', '.join(names)})"]
    if kept.embeddings and _is_tied(model):
        notes.append("the output layer is tied to the embeddings, and stays as they are")
    if section.layerwise_decay is not None:
        lowest = section.layerwise_decay ** max(where[name].distance for name in trained)
        notes.append(f"learning rate: {lowest:.3g} of the head's at the lowest of these")
    if every is not None:
        when = "with each epoch" if every == "epoch" else f"after {every} steps each"
        notes.append(f"unfrozen from the top: the head at once, then a layer more {when}")
    return notes


def _check(model: PreTrainedModel, section: FinetuneSection, counts: Mapping[str, int]) -> None:
    if not counts:
        raise UserError(f"finetune: {type(model).__name__} has no list of layers")
    runs = getattr(model.config, "num_hidden_layers", None)
    asked = [key for key in ("layerwise_decay", "gradual_unfreezing") if getattr(section, key) is not None]
    asked += ["freeze.layers"] if section.freeze.layers else []
    if runs is not None and max(counts.values()) < runs and asked:
        raise UserError(f"finetune.{asked[0]}: the {runs} layers of this model share their weights; remove the key")
    for stack, count in counts.items():
        if section.freeze.layers > count:
            of = f" in its {_short(stack)}" if len(counts) > 1 else ""
            raise UserError(f"finetune.freeze.layers: {section.freeze.layers}, but the model has {count} layers{of}")


def _is_tied(model: PreTrainedModel) -> bool:
    output, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    return output is not None and getattr(output, "weight", None) is inputs.weight


def _short(stack: str) -> str:
    """encoder of transformer.encoder.layers."""
    return stack.rpartition(".")[0].rpartition(".")[2]


def _parts(some: Sequence[Place]) -> Iterator[str]:
    """In order from the input: embeddings, layers 4-5, head."""
    stacks = [stack for stack in dict.fromkeys(place.stack for place in some) if stack]
    if any(place.layer == EMBEDDINGS for place in some):
        yield "embeddings"
    for stack in stacks:
        numbers = sorted({place.layer for place in some if place.stack == stack and place.layer is not None})
        span = f"layers {numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"layer {numbers[0]}"
        yield f"{span} of the {_short(stack)}" if len(stacks) > 1 else span
    if any(place.layer is None for place in some):
        yield "head"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count:,}"


def decayed(groups: Iterable[dict[str, Any]], model: Any, decay: float) -> list[dict[str, Any]]:
    """An optimizer's groups, divided by places: the learning rate is multiplied by decay ** distance.

    The head's come first: the rate that is logged is the first group's.
    """
    parameters, where = dict(model.named_parameters()), places(model)
    distances = {id(parameters[name]): place.distance for name, place in where.items()}
    found = []
    for group in groups:
        for distance in sorted({distances[id(one)] for one in group["params"]}):
            some = [one for one in group["params"] if distances[id(one)] == distance]
            found.append((distance, {**group, "params": some, "lr": group["lr"] * decay**distance}))
    return [group for _, group in sorted(found, key=lambda pair: pair[0])]


class Unfreezing(TrainerCallback):
    """Trains the head at first, one more layer from the top with each epoch, or after so many steps each.

    What is trained in a step is a function of its number alone, so that a resumed run goes on as it would have.
    """

    def __init__(self, model: Any, every: int | str):
        where = places(model)
        named = [(where[name].distance, one) for name, one in model.named_parameters() if one.requires_grad]
        self.parameters, self.every = named, every

    def on_step_begin(self, args, state, control, **kwargs):
        reached = int(state.epoch) if self.every == "epoch" else state.global_step // self.every
        for distance, parameter in self.parameters:
            parameter.requires_grad_(distance <= reached)
