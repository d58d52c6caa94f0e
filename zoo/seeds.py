"""A recipe with `seeds`: one run each, and what they say together."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t

from zoo.errors import UserError
from zoo.files import write_json, write_text
from zoo.model_directory import METRICS, RECIPE, read_metrics
from zoo.recipe import Recipe
from zoo.run_directory import alone, check_directory
from zoo.train import run as run_one

CONFIDENCE = 0.95
_OF_THE_MACHINE = ("runtime", "samples_per_second", "memory_bytes")


def run(recipe: Recipe, output_dir: Path, resume: bool = False) -> dict[str, Any]:
    """Trains with each seed in `seed-<n>` below `output_dir`; returns mean and 95 % interval of every metric.

    Seeds that are finished are not trained again. Raises as `train.run` does.
    """
    check_directory(recipe, output_dir, resume)
    if (output_dir / METRICS).exists():
        return read_metrics(output_dir)
    with alone(output_dir):
        check_directory(recipe, output_dir, resume)
        write_text(output_dir / RECIPE, recipe.to_yaml())
        found = []
        for number, seed in enumerate(recipe.seeds, start=1):
            print(f"seed {seed}, {number} of {len(recipe.seeds)}")
            try:
                found.append(run_one(_of_seed(recipe, seed), output_dir / f"seed-{seed}", resume=True))
            except UserError:
                if not list(output_dir.glob(f"seed-*/{RECIPE}")):
                    # nothing has begun: the directory stays free
                    (output_dir / RECIPE).unlink()
                raise
        metrics = summary(found)
        write_json(output_dir / METRICS, metrics)
        return metrics


def _of_seed(recipe: Recipe, seed: int) -> Recipe:
    single = recipe.model_copy(update={"seeds": [], "train": recipe.train | {"seed": seed}})
    single._file = recipe.file
    return single


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`<metric>_mean`, and the bounds `_low` and `_high` of its 95 % confidence interval (Student's t, n - 1).

    Of the metrics that every run has.
    """
    result: dict[str, Any] = {"seeds": len(runs)}
    for name in (name for name in runs[0] if all(name in metrics for metrics in runs)):
        values = [float(metrics[name]) for metrics in runs]
        mean = statistics.fmean(values)
        result[f"{name}_mean"] = mean
        if not name.endswith(_OF_THE_MACHINE):
            half = interval(values)
            result |= {f"{name}_low": mean - half, f"{name}_high": mean + half}
    return result


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of the mean."""
    if not all(map(math.isfinite, values)):
        return math.nan  # statistics has no answer for them
    error = statistics.stdev(values) / len(values) ** 0.5
    return float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * error)
