"""Writing text token by token: the native class against the official one, and the floor of its matrix products alone.

Both sides have the same random weights and the same prompts, and write the same tokens; a round is one turn of each. A
third is the native class with weights of 8 bits (`zoo quantize --method dynamic-int8`), whose tokens may be others.
"""

import statistics
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, set_seed

from zoo.bench.settings import SHAPES
from zoo.bench.training import SIDES, accelerator_name, device, now
from zoo.errors import RunError, UserError
from zoo.fresh import fresh_config
from zoo.loading import native_class
from zoo.quantized import int8_model
from zoo.sizes import SIZES

AUTO = {"gpt2": "AutoModelForCausalLM", "t5": "AutoModelForSeq2SeqLM"}
INT8 = "int8"
ALL = (*SIDES, INT8)
RAGGED = (16, 24, 32, 48, 64, 96, 112, 128)


@dataclass(frozen=True)
class Case:
    """A size by name, or a family in the shape of six layers of width 384, and the lengths of its prompts."""

    model: str
    prompts: tuple[int, ...] = (64,)

    @property
    def words(self) -> str:
        shape = self.model if self.model in SIZES else f"{self.model}, 6 x 384"
        if len(self.prompts) == 1:
            return f"{shape}, a prompt of {self.prompts[0]} tokens"
        return f"{shape}, {len(self.prompts)} prompts of {min(self.prompts)} to {max(self.prompts)} tokens"


# what has no size by that name is the family in the small shape
CASES = {
    "gpt2": [Case("gpt2"), Case("GPT"), Case("GPT", RAGGED)],
    "t5": [Case("T5"), Case("T5", RAGGED)],
}


def run(family: str, rounds: int, new_tokens: int) -> dict[str, Any]:
    """Milliseconds a step of each case, the ratios, and the floor; see `table`."""
    if family not in CASES:
        raise UserError(f"--family {family}: generates nothing; there are {', '.join(CASES)}")
    with tqdm(total=len(CASES[family]) * rounds, desc="Measuring", unit="round") as bar:
        results = [_measured(family, case, rounds, new_tokens, bar) for case in CASES[family]]
    return {"family": family, "rounds": rounds, "new_tokens": new_tokens, **accelerator_name(), "results": results}


def _measured(family: str, case: Case, rounds: int, new_tokens: int, bar: tqdm) -> dict[str, Any]:
    sides = _sides(family, case)
    inputs = _prompts(case, sides["native"].config.vocab_size, left=family == "gpt2")
    turns: list[dict[str, float]] = []
    written = {}
    for number in range(rounds):
        turn = {}
        for side in ALL if number % 2 == 0 else ALL[::-1]:
            turn[side], written[side] = _turn(sides[side], inputs, new_tokens)
        turns.append(turn | {"floor": _floor(sides["official"], len(case.prompts))})
        bar.update()
    if not torch.equal(written["native"], written["official"]):
        raise RunError(f"bench: {case.words}: the two sides have written different tokens; please report this")
    ratios = [turn["official"] / turn["native"] for turn in turns]
    of_int8 = [turn["official"] / turn[INT8] for turn in turns]
    milliseconds = {name: 1000 * statistics.median(turn[name] for turn in turns) for name in (*ALL, "floor")}
    return {
        "case": case.words,
        "milliseconds_a_step": milliseconds,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "int8_ratio": statistics.median(of_int8),
        "int8_ratio_range": [min(of_int8), max(of_int8)],
    }


def _sides(family: str, case: Case) -> dict[str, PreTrainedModel]:
    """The same weights in both classes."""
    set_seed(0)
    named = case.model in SIZES
    config = fresh_config(case.model if named else family, native=False, **({} if named else SHAPES[family]))
    config.eos_token_id = None
    official = getattr(transformers, AUTO[family]).from_config(config, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as directory:
        official.save_pretrained(directory)
        opened = native_class(family, family, AUTO[family]).from_pretrained(directory, dtype=torch.float32)
    small = int8_model(opened.eval(), "dynamic", {})
    opened.to(device())  # type: ignore[arg-type]
    return {"native": opened, "official": official.to(device()), INT8: small.to(device())}


def _prompts(case: Case, vocabulary: int, left: bool) -> dict[str, torch.Tensor]:
    """Random tokens, padded on the left where a decoder goes on from them."""
    longest, generator = max(case.prompts), torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (len(case.prompts), longest), generator=generator)
    places = torch.arange(longest).expand(len(case.prompts), -1)
    lengths = torch.tensor(case.prompts).unsqueeze(1)
    mask = (places >= longest - lengths if left else places < lengths).long()
    return {"input_ids": (ids * mask).to(device()), "attention_mask": mask.to(device())}


def _turn(model: PreTrainedModel, inputs: dict[str, torch.Tensor], new_tokens: int) -> tuple[float, torch.Tensor]:
    """(seconds a step, tokens), the reading of the prompts among them."""
    settings = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0,
        decoder_start_token_id=0 if model.config.is_encoder_decoder else None,
    )  # fmt: skip
    start = now()
    tokens = model.generate(  # type: ignore[operator]
        **inputs, generation_config=settings
    )
    return (now() - start) / new_tokens, tokens


@torch.no_grad()
def _floor(model: PreTrainedModel, batch: int, repeats: int = 5) -> float:
    """Seconds of one step's matrix products alone: each weight once, for one token of each row."""
    weights = []
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        # GPT-2's official layers hold theirs transposed; an encoder has read its text already
        if isinstance(module, nn.Linear) and not name.startswith("encoder."):
            weights.append(weight)
        elif type(module).__name__ == "Conv1D":
            weights.append(weight.t().contiguous())
    rows = {weight.shape[1]: torch.randn(batch, weight.shape[1], device=weight.device) for weight in weights}
    times = []
    for _ in range(repeats):
        start = now()
        for weight in weights:
            nn.functional.linear(rows[weight.shape[1]], weight)
        times.append(now() - start)
    return statistics.median(times)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown, as docs/performance.md shows it."""
    place = f", {result['accelerator']}" if "accelerator" in result else ""
    lines = [f"greedy, {result['new_tokens']} new tokens, fp32{place}; median of {result['rounds']} rounds", ""]
    lines.append(
        "| what | native ms a step | official ms a step | their matrix products alone | ratio (range) | int8 ms a step "
        "| ratio to official (range) |"
    )
    lines.append("|---|---|---|---|---|---|---|")
    for entry in result["results"]:
        times, (low, high), (small, large) = (
            entry[key] for key in ("milliseconds_a_step", "ratio_range", "int8_ratio_range")
        )
        lines.append(
            f"| {entry['case']} | {times['native']:.1f} | {times['official']:.1f} | {times['floor']:.1f} | "
            f"**{entry['ratio']:.2f}** ({low:.2f}-{high:.2f}) | {times[INT8]:.1f} | "
            f"**{entry['int8_ratio']:.2f}** ({small:.2f}-{large:.2f}) |"
        )
    return "\n".join(lines)
