"""Attention alone, of every variant, against torch's fused full attention: time, memory, and how both grow.

One text of so many tokens, random queries, keys and values. A round is one turn of each variant; ratios are taken
within a round, and the median counts. Memory is what forward and backward add, in a process of its own.
"""

import itertools
import math
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from zoo.bench.training import accelerator_name, device, now
from zoo.environment import hardware
from zoo.errors import UserError
from zoo.files import write_text
from zoo.memory import peak_memory_bytes, reset_peak_memory
from zoo.models.attention_variants import ATTENTIONS, FULL
from zoo.models.blocked_attention import blocked_attention
from zoo.models.masks import MASKS, takes_layer
from zoo.variants import contradictions

# softmax of all scores in memory, as `attn_implementation: eager` and attention dropout have them
EAGER = "eager"
KWARGS: dict[str, dict[str, Any]] = {name: {} for name in (*MASKS, *ATTENTIONS)} | {
    "local": {"window": 128}, "dilated": {"window": 64, "dilation": 4}, "block": {"size": 256},
    "strided": {"stride": 128}, "fixed": {"stride": 128}, "longformer": {"window": 128}, "sinks": {"window": 128},
    "bigbird": {"block_size": 64}, "linformer": {"rank": 256}, "performer": {"features": 256},
    "nystrom": {"landmarks": 64},
}  # fmt: skip
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
# slopes are those of long texts: at short ones what does not grow is most of the time
SLOPE_FROM = 2048
PASSES = ("forward", "training")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BEGIN, END = "<!-- made by make long-inputs -->\n", "<!-- end -->\n"


def run(
    names: Sequence[str],
    lengths: Sequence[int],
    rounds: int,
    heads: int,
    width: int,
    causal: bool,
    kwargs: dict,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Times, ratios to full attention, memory and slopes; see `table`. Raises UserError for what there is not."""
    names = list(names) or [EAGER, *(name for name in KWARGS if not causal or _can_be_causal(name))]
    for name in names:
        if name not in (EAGER, FULL) and name not in KWARGS:
            known = ", ".join([EAGER, *KWARGS])
            raise UserError(f"bench attention: no variant is called {name}; there are {known}")
        if causal and not _can_be_causal(name):
            raise UserError(f"bench attention: {name} cannot be causal; leave out --causal, or the name")
    wrong = [text for _, text in contradictions({"attention": list(kwargs)}, kwargs)]
    if wrong:
        raise UserError(f"--attention-kwargs: {wrong[0]}")
    names = [name for name in names if name != FULL]
    shape: dict[str, Any] = {"heads": heads, "width": width, "causal": causal, "dtype": dtype}
    try:
        for name, length in itertools.product(names, lengths):
            _subject(name, length, kwargs=KWARGS | kwargs, **shape)
    except ValueError as error:
        raise UserError(f"bench attention: {error}") from error
    lengths = sorted(set(lengths))
    results: list[dict[str, Any]] = []
    turns = len(lengths) * (len(names) + 1) * (rounds + 1)
    with tqdm(total=turns, desc="Measuring", unit="turn") as bar:
        for length in lengths:
            results.append(_one_length([FULL, *names], length, rounds, shape, KWARGS | kwargs, results, bar))
    slopes = {name: _slopes(name, results) for name in [FULL, *names]}
    used = {name: (KWARGS | kwargs).get(name, {}) for name in names}
    return {
        "rounds": rounds,
        **shape,
        "cpu": hardware()["cpu"],
        **accelerator_name(),
        "attention_kwargs": used,
        "results": results,
        "slopes": slopes,
    }


def _can_be_causal(name: str) -> bool:
    return name not in ATTENTIONS or ATTENTIONS[name].causal


def _one_length(
    names, length: int, rounds: int, shape: dict, kwargs: dict, shorter: list[dict], bar: tqdm
) -> dict[str, Any]:
    subjects, memory = {}, {}
    for name in names:
        bar.set_postfix_str(f"{name}, {length:,} tokens")
        # full attention is what all are compared with
        if name != FULL and _expected_bytes(name, length, shape["heads"], shorter) > _free_bytes():
            bar.update(rounds + 1)
            continue
        memory[name] = _in_own_process(name, length, shape, kwargs)
        subjects[name] = _subject(name, length, kwargs=kwargs, **shape)
        _turn(subjects[name], length, **shape)
        bar.update()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in subjects}
    for number in range(rounds):
        for name in subjects if number % 2 == 0 else [*subjects][::-1]:
            bar.set_postfix_str(f"{name}, {length:,} tokens")
            found[name].append(_turn(subjects[name], length, **shape))
            bar.update()
    full = found[FULL]
    entries = {}
    for name, turns in found.items():
        entry: dict[str, Any] = {"memory_bytes": memory[name]}
        for part in PASSES:
            ratios = [one[part] / other[part] for one, other in zip(full, turns, strict=True)]
            entry[f"{part}_ms"] = 1000 * statistics.median(turn[part] for turn in turns)
            entry[f"{part}_ratio"] = statistics.median(ratios)
            entry[f"{part}_ratio_range"] = [min(ratios), max(ratios)]
        entries[name] = entry
    return {"length": length, "variants": entries}


def _free_bytes() -> int:
    if device().type == "cpu":
        return psutil.virtual_memory().available
    return torch.get_device_module(device()).mem_get_info()[0]


def _expected_bytes(name: str, length: int, heads: int, shorter: list[dict]) -> float:
    """What forward and backward add: five matrices of all scores, or what it was at shorter lengths, as it grew."""
    if name == EAGER:
        return 5 * 4 * heads * length**2
    known = [(r["length"], r["variants"][name]["memory_bytes"]) for r in shorter if name in r["variants"]][-2:]
    if not known:
        return 0
    power = 1.0
    if len(known) == 2:
        (first, less), (second, more) = known
        power = min(2.0, max(1.0, math.log(max(more, 1) / max(less, 1)) / math.log(second / first)))
    return known[-1][1] * (length / known[-1][0]) ** power


def _subject(
    name: str, length: int, heads: int, width: int, causal: bool, kwargs: dict, dtype: str = "float32"
) -> Callable:
    """(tokens, heads, width) of queries, keys and values -> the same of outputs, as a model's layers call it."""
    scaling = width**-0.5
    if name in MASKS:
        layer = {"layer": 0} if takes_layer(name) else {}
        pattern = MASKS[name](causal=causal, **layer, **kwargs[name])
        return lambda q, k, v: blocked_attention(q, k, v, pattern, scaling=scaling)
    if name in ATTENTIONS:
        config = SimpleNamespace(max_position_embeddings=length)
        ATTENTIONS[name].check(config, **kwargs[name])
        kernel = ATTENTIONS[name](config, heads, width, causal, **kwargs[name])
        kernel.initialise()
        kernel.to(device(), DTYPES[dtype])
        return _by_head(partial(kernel, scaling=scaling))
    if name == EAGER:
        return _by_head(partial(_all_scores, scaling=scaling, causal=causal))
    return _by_head(partial(F.scaled_dot_product_attention, is_causal=causal, scale=scaling))


def _by_head(attend: Callable) -> Callable:
    """What takes (1, heads, tokens, width), as it is called here."""

    def called(*states: torch.Tensor) -> torch.Tensor:
        return attend(*(x.transpose(0, 1).unsqueeze(0) for x in states)).squeeze(0).transpose(0, 1)

    return called


def _all_scores(q, k, v, scaling: float, causal: bool) -> torch.Tensor:
    scores = q @ k.transpose(2, 3) * scaling
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -math.inf)
    return torch.softmax(scores, -1) @ v


def _inputs(length: int, heads: int, width: int, dtype: str = "float32") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = (torch.randn(length, heads, width, generator=generator) for _ in range(3))
    return [x.to(device(), DTYPES[dtype]).requires_grad_() for x in states]


def _turn(
    attend: Callable, length: int, heads: int, width: int, causal: bool, dtype: str = "float32"
) -> dict[str, float]:
    """Seconds of a forward pass without gradients, and of one with its backward pass."""
    states = _inputs(length, heads, width, dtype)
    with torch.no_grad():
        start = now()
        attend(*states)
        forward = now() - start
    start = now()
    attend(*states).sum().backward()
    return {"forward": forward, "training": now() - start}


def _in_own_process(name: str, length: int, shape: dict, kwargs: dict) -> int:
    if device().type == "cpu":
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["zoo.bench.attention"])
    else:
        # what has been forked cannot use CUDA
        context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_memory, name, length, shape, kwargs).result()


def _memory(name: str, length: int, shape: dict, kwargs: dict) -> int:
    """Bytes that forward and backward add to what is there."""
    # what is done once, such as a pattern's blocks, is done before
    attend = _subject(name, length, kwargs=kwargs, **shape)
    _turn(attend, min(length, 64), **shape)
    states = _inputs(length, shape["heads"], shape["width"], shape["dtype"])
    module = torch.get_device_module(device())
    peak: Callable[[], int] = getattr(module, "max_memory_allocated", peak_memory_bytes)
    getattr(module, "reset_peak_memory_stats", reset_peak_memory)()
    before = peak()
    attend(*states).sum().backward()
    return max(0, peak() - before)


def _slopes(name: str, results: list[dict[str, Any]]) -> dict[str, float] | None:
    """The power of the length with which times grow, by least squares of the logarithms; None of too few lengths."""
    points = [
        (result["length"], result["variants"][name])
        for result in results
        if name in result["variants"] and result["length"] >= SLOPE_FROM
    ]
    if len(points) < 2:
        return None
    logs = [math.log(length) for length, _ in points]
    return {
        part: statistics.linear_regression(logs, [math.log(entry[f"{part}_ms"]) for _, entry in points]).slope
        for part in PASSES
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown, as docs/long-inputs.md shows it: forward and backward, the ratio to full attention."""
    lengths = [entry["length"] for entry in result["results"]]
    way = "causal" if result["causal"] else "bidirectional"
    place = result.get("accelerator") or f"{torch.get_num_threads()} threads, {result['cpu']}"
    said = f"{way}, {result['heads']} heads of {result['width']}, {place}, {result['dtype']}"
    lines = [f"{said}; median of {result['rounds']} rounds", ""]
    for title, shown in (("Forward and backward", _times), ("Forward alone", _forward), ("Memory", _megabytes)):
        lines.append(f"| {title} | " + " | ".join(f"{length:,}" for length in lengths) + " | slope |")
        lines.append("|---" * (len(lengths) + 2) + "|")
        for name in result["slopes"]:
            cells = [shown(entry["variants"].get(name), name) for entry in result["results"]]
            slope = result["slopes"][name]
            part = {"Forward and backward": "training", "Forward alone": "forward"}.get(title)
            lines.append(
                f"| {_titled(name, result)} | " + " | ".join(cells)
                + f" | {f'{slope[part]:.2f}' if slope and part else ''} |"
            )  # fmt: skip
        lines.append("")
    return "\n".join(lines[:-1])


def _titled(name: str, result: dict[str, Any]) -> str:
    own = result["attention_kwargs"].get(name)
    return f"`{name}`" + (f" {', '.join(f'{key} {value}' for key, value in own.items())}" if own else "")


def _times(entry: dict | None, name: str) -> str:
    return _cell(entry, name, "training")


def _forward(entry: dict | None, name: str) -> str:
    return _cell(entry, name, "forward")


def _cell(entry: dict | None, name: str, part: str) -> str:
    if entry is None:
        return "no room"
    ratio = "" if name == FULL else f", **{entry[f'{part}_ratio']:.2f}x**"
    return f"{entry[f'{part}_ms']:.1f} ms{ratio}"


def _megabytes(entry: dict | None, name: str) -> str:
    return "no room" if entry is None else f"{entry['memory_bytes'] / 2**20:,.0f} MiB"


def draw(result: dict[str, Any], file: Path) -> None:
    """Times and memory over the length, both axes logarithmic, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5))
    for name in result["slopes"]:
        points = [(r["length"], r["variants"][name]) for r in result["results"] if name in r["variants"]]
        lengths = [length for length, _ in points]
        style: dict[str, Any] = {"label": name, "marker": "o", "linewidth": 3 if name == FULL else 1.2}
        axes[0].plot(lengths, [entry["training_ms"] for _, entry in points], **style)
        axes[1].plot(lengths, [max(entry["memory_bytes"], 1) / 2**20 for _, entry in points], **style)
    for axis, label in zip(axes, ("forward and backward, ms", "memory, MiB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axis.set_xticks([r["length"] for r in result["results"]], [f"{r['length']:,}" for r in result["results"]])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"--png {file}: cannot be written: {error}") from error
    plt.close(figure)


def write_page(page: Path) -> None:
    """Measures all variants, both ways, and writes the tables into a page, and their curves beside it."""
    texts = []
    for causal in (False, True):
        result = run([], LENGTHS, rounds=3, heads=12, width=64, causal=causal, kwargs={})
        picture = page.with_name(f"{page.stem}-{'causal' if causal else 'bidirectional'}.png")
        draw(result, picture)
        texts.append(f"![curves]({picture.name})\n\n{date.today()}; {table(result)}\n")
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    write_text(page, before + BEGIN + "\n".join(texts) + END + rest.partition(END)[2])


if __name__ == "__main__":
    write_page(Path("docs/long-inputs.md"))
